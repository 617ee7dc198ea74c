"""What the kernels share: one tile of logits.

Index arithmetic: where a tile starts is a 64-bit scalar (V·D and N·K·V pass 2³¹ at 1-Billion-Word size), places within
a tile are 32-bit. Rows and classes beyond the last are clamped to it, not masked, so that loads need no predicate;
their results are masked when stored.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Where running maxima start: finite, so that a logit of −inf gives exp(−inf), never inf − inf."""


@triton.jit
def logits_tile(
    z_ptr,  # (n_rows, row_stride), of which D features
    e_ptr,  # (n_classes, D)
    bias_ptr,  # (n_classes,)
    n_rows,
    n_classes,
    first_row,
    first_class,
    ROW_STRIDE: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,  # see configurations.Tile
):
    """z·Eᵀ + b of (ROWS, CLASSES), float32; −inf in the columns beyond the last class."""
    row = tl.minimum(tl.arange(0, ROWS), n_rows - 1 - first_row)
    column = tl.arange(0, CLASSES)
    clamped = tl.minimum(column, n_classes - 1 - first_class)
    feature = tl.arange(0, FEATURES)
    z_tile = z_ptr + tl.cast(first_row, tl.int64) * ROW_STRIDE + (row[:, None] * ROW_STRIDE + feature[None, :])
    e_tile = e_ptr + tl.cast(first_class, tl.int64) * D + (clamped[None, :] * D + feature[:, None])
    tile = tl.zeros((ROWS, CLASSES), tl.float32)
    if RESIDENT:
        # unrolled: from a loop of the caller that stores nothing, the compiler moves the loads that do not change out
        for d in tl.static_range(0, D, FEATURES):
            tile = add_product(z_tile + d, e_tile + d, feature, tile, D - d, FEATURES, PRECISION)
    else:
        for d in range(0, D, FEATURES):
            tile = add_product(z_tile, e_tile, feature, tile, D - d, FEATURES if D % FEATURES else 0, PRECISION)
            z_tile += FEATURES
            e_tile += FEATURES
    inside = column < n_classes - first_class
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_class + clamped).to(tl.float32)
    else:
        bias = tl.zeros((CLASSES,), tl.float32)
    return tile + tl.where(inside, bias, float("-inf"))[None, :]


@triton.jit
def add_product(z_tile, e_tile, feature, tile, features_left, FEATURES: tl.constexpr, PRECISION: tl.constexpr):
    """tile + z·e of one step; FEATURES is 0 where every step has all of them."""
    if FEATURES == 0:
        z = tl.load(z_tile)
        e = tl.load(e_tile)
    else:
        z = tl.load(z_tile, mask=feature[None, :] < features_left, other=0.0)
        e = tl.load(e_tile, mask=feature[:, None] < features_left, other=0.0)
    return tl.dot(z, e, tile, input_precision=PRECISION)


@triton.jit
def row_targets(target_ptr, first_row, n_rows, first_class, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Each row's target as a column of the tile that starts at `first_class`: (ROWS,) int32, −1 where it is far
    away."""
    row = tl.minimum(first_row + tl.arange(0, ROWS), n_rows - 1)
    column = tl.load(target_ptr + row // EXPERTS) - first_class
    return tl.where((column >= 0) & (column < 65536), column, -1).to(tl.int32)
