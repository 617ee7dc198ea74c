"""Shared by the kernels: one tile of logits, and its operands.

Operands that travel together form a NamedTuple. Its members are tensors and numbers on the host, pointers and scalars
in a kernel. Triton specialises each member like a separate argument; None and 1 become constants.

Index arithmetic: the start of a tile is a 64-bit scalar, since V·D and N·K·V exceed 2³¹ for the One Billion Word
benchmark. Offsets within a tile are 32-bit. Rows and classes beyond the last are clamped to it instead of masked, so
loads need no predicate; their results are masked when stored.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..transform import Transform

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Start of running maxima. It is finite, so a logit of −inf gives exp(−inf), never inf − inf."""


class TileConstants(NamedTuple):
    """The tile as compile-time constants TILE of a kernel; see `configurations.Tile`."""

    rows: int
    classes: int
    features: int
    precision: str  # float32 products: "tf32x3", "tf32" or "ieee"; not used for 16-bit operands
    resident: bool
    rounds: bool = False  # round e to TF32 here, since it is not rounded in memory
    described: bool = (
        False  # load operands through descriptors, in one fused loop over tiles and features, which prefetches
    )


class Scales(NamedTuple):
    """A `Transform` for kernels: l′ = scale·tanh(inverse_softcap·l), or scale·l without a soft cap."""

    inverse_softcap: float | None  # 1 / c; None without a soft cap
    scale: float | None  # c / T, or 1 / T without a soft cap; None for 1


def scales(transform: Transform) -> Scales:
    if transform.softcap:
        return Scales(1 / transform.softcap, transform.softcap / transform.temperature)
    return Scales(None, None if transform.temperature == 1 else 1 / transform.temperature)


class Logits(NamedTuple):
    """The operands of l = z·Eᵀ + b and its transform. Kernels call the transformed logits l too."""

    z_ptr: Tensor  # (n_rows, K, D), K being 1 for single rows
    e_ptr: Tensor  # (n_classes, D)
    bias_ptr: Tensor | None  # (n_classes,)
    n_rows: int
    n_classes: int
    inverse_softcap: float | None = None  # as in `Scales`
    scale: float | None = None


class LogitGradients(NamedTuple):
    """The output dl of all rows, for a span of the vocabulary."""

    dl_ptr: Tensor | None  # (R, stride) out, of which n_columns are written; None to give only the span
    first_class: int  # of the first column
    n_columns: int
    stride: int
    plane: int | None = None  # elements from one part of dl to the next (parts.py)


@triton.jit
def logits_tile(
    logits,  # Logits
    first_row,
    first_class,
    expert,  # index into a row's K vectors
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,  # TileConstants
    RESIDENT: tl.constexpr,  # TILE.resident, or False if the caller keeps no operand between tiles
):
    """One tile of logits, (ROWS, CLASSES) float32, −inf beyond the last class."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    FEATURES: tl.constexpr = TILE.features
    STRIDE: tl.constexpr = K * D
    row = tl.minimum(tl.arange(0, ROWS), logits.n_rows - 1 - first_row)
    column = tl.arange(0, CLASSES)
    clamped = tl.minimum(column, logits.n_classes - 1 - first_class)
    feature = tl.arange(0, FEATURES)
    z_row = logits.z_ptr + expert * D + tl.cast(first_row, tl.int64) * STRIDE
    z_tile = z_row + (row[:, None] * STRIDE + feature[None, :])
    e_tile = logits.e_ptr + tl.cast(first_class, tl.int64) * D + (clamped[None, :] * D + feature[:, None])
    tile = tl.zeros((ROWS, CLASSES), tl.float32)
    if RESIDENT:
        # unrolled, the compiler can hoist loads that do not change out of the caller's loop, if that stores nothing
        for d in tl.static_range(0, D, FEATURES):
            tile = add_product(z_tile + d, e_tile + d, feature, tile, D - d, TILE=TILE, MASKED=True)
    else:
        for d in range(0, D, FEATURES):
            tile = add_product(z_tile, e_tile, feature, tile, D - d, TILE=TILE, MASKED=D % FEATURES != 0)
            z_tile += FEATURES
            e_tile += FEATURES
    return transformed(tile + class_bias(logits, first_class, TILE=TILE)[None, :], logits, first_class, TILE=TILE)


@triton.jit
def described_logits_tile(
    z_tiles,  # descriptor of (n_rows, D) in (ROWS, FEATURES), or of an expert's rows: (K, n_rows, D) in (1, ROWS, …)
    e_tiles,  # descriptor of (n_classes, D) in (CLASSES, FEATURES)
    logits,  # Logits
    expert,  # None for rows without experts
    first_row,
    first_class,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """`logits_tile` with operands loaded through descriptors."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    FEATURES: tl.constexpr = TILE.features
    tile = tl.zeros((ROWS, CLASSES), tl.float32)
    for feature in range(0, D, FEATURES):
        if expert is None:
            z = z_tiles.load([first_row, feature])
        else:
            z = tl.reshape(z_tiles.load([expert, first_row, feature]), (ROWS, FEATURES))
        e = e_tiles.load([first_class, feature])
        if TILE.rounds:
            e = rounded_to_tf32(e)
        tile = tl.dot(z, e.T, tile, input_precision=TILE.precision)
    return transformed(tile + class_bias(logits, first_class, TILE=TILE)[None, :], logits, first_class, TILE=TILE)


@triton.jit
def transformed(
    tile,  # (ROWS, CLASSES): z·Eᵀ + b, −inf beyond the last class
    logits,  # Logits
    first_class,
    TILE: tl.constexpr,
):
    """The transformed logits, −inf beyond the last class, where a soft cap alone would give −c/T."""
    if logits.inverse_softcap is not None:
        beyond = tl.arange(0, TILE.classes) >= logits.n_classes - first_class
        tile = tl.fma(tanh(tile * logits.inverse_softcap), logits.scale, tl.where(beyond, float("-inf"), 0.0)[None, :])
    elif logits.scale is not None:
        tile = tile * logits.scale
    return tile


@triton.jit
def times_derivative(
    gradient,
    logit,  # transformed, of the same shape
    scales,  # Scales, or Logits
):
    """The gradient of z·Eᵀ + b from the gradient of the transformed logit, or from a multiple of it."""
    if scales.inverse_softcap is not None:
        # (1 − tanh²) / T, computed from the transformed logit; 0 instead of −inf beyond the last class
        slope = tl.fma(logit * logit, -(scales.inverse_softcap / scales.scale), scales.inverse_softcap * scales.scale)
        gradient = gradient * tl.maximum(slope, 0.0)
    elif scales.scale is not None:
        gradient = gradient * scales.scale
    return gradient


@triton.jit
def tanh(x):
    """tanh within about two units in the last place. (Triton's interpreter cannot run its own tanh, from libdevice.)"""
    square = x * x
    # near 0 the difference exp − 1 would lose digits, so below 0.55 use the odd polynomial of degree 9 with the least
    # relative error, 4e-8
    polynomial = tl.fma(square, 0.01643758, -0.05267181)
    polynomial = tl.fma(square, polynomial, 0.13320725)
    polynomial = tl.fma(square, polynomial, -0.33332947)
    near = tl.fma(x * square, polynomial, x)
    far = 1 - 2 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))


@triton.jit
def class_bias(logits, first_class, TILE: tl.constexpr):
    """The tile's part of the bias, (CLASSES,) float32, −inf beyond the last class."""
    CLASSES: tl.constexpr = TILE.classes
    column = tl.arange(0, CLASSES)
    if logits.bias_ptr is not None:
        clamped = tl.minimum(column, logits.n_classes - 1 - first_class)
        bias = tl.load(logits.bias_ptr + first_class + clamped).to(tl.float32)
    else:
        bias = tl.zeros((CLASSES,), tl.float32)
    return tl.where(column < logits.n_classes - first_class, bias, float("-inf"))


@triton.jit
def add_product(
    z_tile,  # (ROWS, FEATURES) pointers
    e_tile,  # (FEATURES, CLASSES) pointers
    feature,  # (FEATURES,)
    tile,  # (ROWS, CLASSES)
    features_left,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """tile + z·e for one step of features. MASKED if the last step may have fewer features."""
    if MASKED:
        z = tl.load(z_tile, mask=feature[None, :] < features_left, other=0.0)
        e = tl.load(e_tile, mask=feature[:, None] < features_left, other=0.0)
    else:
        z = tl.load(z_tile)
        e = tl.load(e_tile)
    if TILE.rounds:
        e = rounded_to_tf32(e)
    return tl.dot(z, e, tile, input_precision=TILE.precision)


@triton.jit
def rounded_to_tf32(x):
    """Round to the 11 bits of TF32, to nearest with ties away from 0, like cvt.rna. TF32 products would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def row_targets(
    target_ptr,  # (n_rows / EXPERTS,) int64
    logits,  # Logits
    first_row,
    first_class,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each row's target as a column of the tile that starts at `first_class`, (ROWS,) int32; −1 if it is not in the
    tile or is no class."""
    row = tl.minimum(first_row + tl.arange(0, TILE.rows), logits.n_rows - 1)
    column = tl.load(target_ptr + row // EXPERTS) - first_class
    here = (column >= 0) & (column < tl.minimum(TILE.classes, logits.n_classes - first_class))
    return tl.where(here, column, -1).to(tl.int32)
