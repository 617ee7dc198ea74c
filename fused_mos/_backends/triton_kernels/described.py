"""Variants of kernels that load operands through descriptors, by the tensor memory accelerator (TMA) of an H100 or
newer GPU. `configurations.Tile.described` chooses them. The loops over tiles and features are fused, so the operands of
the next tile load while this tile is computed.

Kernels that write a tile of a or dl for each tile of logits are persistent: there are as many programs as
multiprocessors, and each loops over tiles.
"""

import triton
import triton.language as tl

from .exponentials import kept_exponentials
from .gradients import logit_gradients
from .rows import store_statistics, updated_statistics
from .tiles import LOWEST, described_logits_tile


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
    """`exponentials.exponentials_kernel` with descriptors."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row_tiles = tl.cdiv(logits.n_rows, ROWS)
    n_tiles = row_tiles * tl.cdiv(out.n_columns, CLASSES)
    # rows vary fastest, so programs that run together read the same tile of E
    for tile_index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        first_row = (tile_index % row_tiles) * ROWS
        class_tile = tile_index // row_tiles
        tile = described_logits_tile(z_tiles, e_tiles, logits, None, first_row, class_tile * CLASSES, D=D, TILE=TILE)
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
        a_tiles.store([first_row, class_tile * CLASSES], a.to(out.a_ptr.dtype.element_ty))


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
    """`gradients.gradient_kernel` with descriptors."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row_tiles = tl.cdiv(logits.n_rows, ROWS)
    n_tiles = row_tiles * tl.cdiv(out.n_columns, CLASSES)
    for tile_index in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        first_row = (tile_index % row_tiles) * ROWS
        first_column = (tile_index // row_tiles) * CLASSES
        first_class = out.first_class + first_column
        tile = described_logits_tile(z_tiles, e_tiles, logits, None, first_row, first_class, D=D, TILE=TILE)
        dl = logit_gradients(
            tile, logits, target_ptr, statistics, weights, first_row, first_class, EXPERTS=EXPERTS, TILE=TILE
        )
        dl_tiles.store([first_row, first_column], dl.to(out.dl_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["tiles_of_split"])
def described_statistics_kernel(
    z_tiles,  # descriptor of (R, D) in (ROWS, FEATURES)
    e_tiles,  # descriptor of (V, D) in (CLASSES, FEATURES)
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64, or None
    out,  # Splits
    tiles_of_split,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`rows.statistics_kernel` with descriptors."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    n_rows = logits.n_rows
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    maximum = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    target_logit = tl.full((ROWS,), float("nan"), tl.float32)
    first_tile = split * tiles_of_split
    last = tl.minimum(first_tile + tiles_of_split, tl.cdiv(logits.n_classes, CLASSES))
    for tile_index in tl.range(first_tile, last, flatten=True):
        first_class = tile_index * CLASSES
        tile = described_logits_tile(z_tiles, e_tiles, logits, None, first_row, first_class, D=D, TILE=TILE)
        maximum, total, target_logit = updated_statistics(
            tile, logits, target_ptr, maximum, total, target_logit, first_row, first_class, EXPERTS=EXPERTS, TILE=TILE
        )
    store_statistics(out, target_ptr, maximum, total, target_logit, split, row, n_rows)
