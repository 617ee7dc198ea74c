"""Kernels for the gradient of the NLL from recomputed logits: dl = w·(exp(l − L) − 1[v = target]) with known L and row
weights w, times the transform's derivative. dl is written for one span of the vocabulary, in the operands' dtype, and
two matrix products turn it into dz and dE.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .parts import store_parts
from .tiles import LOG2E, logits_tile, row_targets, times_derivative


class RowGradients(NamedTuple):
    """The gradients of each row's log-sum-exp and, with the opposite sign, of its target's logit."""

    grad_lse_ptr: Tensor  # (R,)
    grad_target_ptr: Tensor  # (R,)


@triton.jit
def gradient_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64, or None
    statistics,  # Statistics
    weights,  # RowGradients
    out,  # LogitGradients
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write dl = grad_lse·exp(l − L) − grad_target·1[v = target], times the transform's derivative."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * CLASSES
    row = tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    first_class = out.first_class + first_column
    tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=False)
    dl = logit_gradients(
        tile, logits, target_ptr, statistics, weights, first_row, first_class, EXPERTS=EXPERTS, TILE=TILE
    )
    dl_row = out.dl_ptr + tl.cast(first_row, tl.int64) * out.stride + first_column
    dl_tile = dl_row + (row[:, None] * out.stride + column[None, :])
    inside = (first_row + row < logits.n_rows)[:, None] & (first_column + column < out.n_columns)[None, :]
    store_parts(dl_tile, dl, out.plane, mask=inside)


@triton.jit
def logit_gradients(
    tile,  # (ROWS, CLASSES): logits
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64, or None
    statistics,  # Statistics
    weights,  # RowGradients
    first_row,
    first_class,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dl of one tile, (ROWS, CLASSES) float32; 0 beyond the last class."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    mask = row < logits.n_rows
    grad_lse = tl.load(weights.grad_lse_ptr + row, mask=mask, other=0.0)
    # a row of weight 0 is exactly 0, even if its statistics are not finite
    shift = tl.where(grad_lse != 0, tl.load(statistics.log_total_ptr + row, mask=mask, other=0.0) * LOG2E, float("inf"))
    maximum = tl.load(statistics.maximum_ptr + row, mask=mask, other=0.0)
    dl = tl.exp2((tile - maximum[:, None]) * LOG2E - shift[:, None]) * grad_lse[:, None]
    dl = tl.where(grad_lse[:, None] != 0, dl, 0.0)
    if target_ptr is not None:
        target = row_targets(target_ptr, logits, first_row, first_class, EXPERTS=EXPERTS, TILE=TILE)
        if tl.max(target, 0) >= 0:
            grad_target = tl.load(weights.grad_target_ptr + row, mask=mask, other=0.0)
            dl = tl.where(column[None, :] == target[:, None], dl - grad_target[:, None], dl)
    return times_derivative(dl, tile, logits)


@triton.jit
def move_rows_kernel(
    a_ptr,  # (R, stride)
    source_ptr,  # (M,) int64
    destination_ptr,  # (M,) int64
    n_columns,
    stride,
    COLUMNS: tl.constexpr,
):
    """a[destination] = a[source], for rows that are not both."""
    move = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(a_ptr + tl.load(source_ptr + move) * stride + column, mask=column < n_columns)
    tl.store(a_ptr + tl.load(destination_ptr + move) * stride + column, value, mask=column < n_columns)
