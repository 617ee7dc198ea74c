"""The kernels that write a tile of a or dl for each tile of logits, once more as persistent ones: as many programs as
multiprocessors, each of which walks through tiles, so that the operands of the next are on their way while the numbers
of this one are made. Operands and results pass through descriptors, which the tensor memory accelerator (TMA) of an
H100 and newer GPUs reads and writes by itself.

A configuration chooses them (`configurations.Tile.persistent`). Nobody has measured yet where they are faster.
"""

import triton
import triton.language as tl

from .exponentials import kept_exponentials
from .gradients import logit_gradients
from .tiles import class_bias, rounded_to_tf32, transformed


@triton.jit
def described_logits_tile(
    z_tiles,  # descriptor of (R, D) in (ROWS, FEATURES)
    e_tiles,  # descriptor of (V, D) in (CLASSES, FEATURES)
    logits,  # Logits of R rows
    first_row,
    first_class,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """The logits of (ROWS, CLASSES), as `tiles.logits_tile`."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    FEATURES: tl.constexpr = TILE.features
    tile = tl.zeros((ROWS, CLASSES), tl.float32)
    for feature in range(0, D, FEATURES):
        z = z_tiles.load([first_row, feature])
        e = e_tiles.load([first_class, feature])
        if TILE.rounds:
            e = rounded_to_tf32(e)
        tile = tl.dot(z, e.T, tile, input_precision=TILE.precision)
    return transformed(tile + class_bias(logits, first_class, TILE=TILE)[None, :], logits, first_class, TILE=TILE)


@triton.jit
def persistent_exponentials_kernel(
    z_tiles,  # descriptor of (R, D) in (ROWS, FEATURES)
    e_tiles,  # descriptor of (V, D) in (CLASSES, FEATURES)
    a_tiles,  # descriptor of (R, n_columns) in (ROWS, CLASSES)
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference_ptr,  # (R,)
    out,  # Exponentials
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `exponentials.exponentials_kernel`."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row_tiles = tl.cdiv(logits.n_rows, ROWS)
    n_tiles = row_tiles * tl.cdiv(out.n_columns, CLASSES)
    # down the rows first, so that programs that run together read one tile of E
    for tile_index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        first_row = (tile_index % row_tiles) * ROWS
        class_tile = tile_index // row_tiles
        tile = described_logits_tile(z_tiles, e_tiles, logits, first_row, class_tile * CLASSES, D=D, TILE=TILE)
        row = first_row + tl.arange(0, ROWS)
        reference = tl.load(reference_ptr + row, mask=row < logits.n_rows, other=0.0)
        a = kept_exponentials(
            tile,
            logits,
            target_ptr,
            reference,
            out,
            first_row,
            class_tile,
            EXPERTS=EXPERTS,
            TILE=TILE,
            ANY_REFERENCE=False,
        )
        a_tiles.store([first_row, class_tile * CLASSES], a)


@triton.jit
def persistent_gradient_kernel(
    z_tiles,  # descriptor of (R, D) in (ROWS, FEATURES)
    e_tiles,  # descriptor of (V, D) in (CLASSES, FEATURES)
    dl_tiles,  # descriptor of (R, n_columns) in (ROWS, CLASSES)
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64, or None
    statistics,  # Statistics
    weights,  # RowGradients
    out,  # LogitGradients
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `gradients.gradient_kernel`."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row_tiles = tl.cdiv(logits.n_rows, ROWS)
    n_tiles = row_tiles * tl.cdiv(out.n_columns, CLASSES)
    for tile_index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        first_row = (tile_index % row_tiles) * ROWS
        first_column = (tile_index // row_tiles) * CLASSES
        first_class = out.first_class + first_column
        tile = described_logits_tile(z_tiles, e_tiles, logits, first_row, first_class, D=D, TILE=TILE)
        dl = logit_gradients(
            tile, logits, target_ptr, statistics, weights, first_row, first_class, EXPERTS=EXPERTS, TILE=TILE
        )
        dl_tiles.store([first_row, first_column], dl.to(out.dl_ptr.dtype.element_ty))
