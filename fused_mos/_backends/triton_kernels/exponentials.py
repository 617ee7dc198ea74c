"""Kernels that store exponentials of logits, a = exp(l − reference), to form gradients in the forward pass.

When the logits are computed, L and the row weights w of dl = w·(exp(l − L) − 1[v = target]) are not known yet. So a
block of tokens stores a, relative to a reference instead of L. Later, the target's entry becomes −Σ of the others, and
dl = f·a with one factor f = w·exp(reference − L) per row. If the logits are transformed, a also contains the
transform's derivative d. The reference is the row's largest logit in the first tile of classes. In a format with
float32's range it can stand in for the maximum.

    reference_kernel       computes the references
    exponentials_kernel    writes a, with 0 at the target, and the sum of each tile's exponentials
    recheck_kernel         repeats this for rows whose reference turned out too small; it normally returns at once

Exponents have base 2: log2(e)·l − reference2 is one fused multiply-add, where reference2 is log2(e)·reference, rounded.
The rounding error is large for a large logit, but it is the same for all of a row. Readers of `a` use the rounded
number too (`loss.py`), so the error cancels.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .parts import store_parts
from .tiles import LOG2E, LOWEST, logits_tile, row_targets, times_derivative

LOWEST_REFERENCE = tl.constexpr(LOWEST.value / 2)
"""The lowest reference: its product with log2(e) is still finite."""

LARGEST_REFERENCE = tl.constexpr(2.0**28)
"""For larger references the rounding error of log2(e)·reference, half a unit in the last place, would mean factors of
2¹⁶ or more."""

MARGIN = tl.constexpr(86.0)
"""Powers of 2 by which a row's sum may exceed 1: 2⁸⁶ and sums of such numbers are far below float32's and bfloat16's
limits."""


TOTALS = tl.constexpr(16)
"""Tiles whose sums are loaded at once: one at a time, each load would wait for the one before."""


class Exponentials(NamedTuple):
    """Results of the forward pass for a block of tokens: a = exp(l − reference)·d, and sums of the exponentials."""

    a_ptr: Tensor  # (R, n_columns): 0 at the target, until mix_kernel writes it, and beyond the last class
    tile_total_ptr: Tensor  # (tiles, R): Σ exp(l − reference) without the target's
    target_logit_ptr: Tensor  # (R,): NaN where the target is no class
    n_columns: int  # number of classes, rounded up to make stores 16 bytes wide
    plane: int | None = None  # elements from one part of a to the next (parts.py)


@triton.jit
def reference_kernel(
    logits,  # Logits of R rows
    reference_ptr,  # (R,) out
    target_logit_ptr,  # (R,) out: NaN
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the largest logit among the first tile's classes."""
    first_row = tl.program_id(0) * TILE.rows
    row = first_row + tl.arange(0, TILE.rows)
    mask = row < logits.n_rows
    tile = logits_tile(logits, first_row, 0, 0, K=1, D=D, TILE=TILE, RESIDENT=False)
    tl.store(reference_ptr + row, tl.maximum(tl.max(tile, 1), LOWEST_REFERENCE), mask=mask)
    tl.store(target_logit_ptr + row, float("nan"), mask=mask)


@triton.jit
def kept_exponentials(
    tile,  # (ROWS, CLASSES): logits
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference,  # (ROWS,)
    out,  # Exponentials
    first_row,
    tile_index,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    ANY_REFERENCE: tl.constexpr,  # if False, rows with a reference above LARGEST_REFERENCE get infinite sums
):
    """Return a of one tile, (ROWS, CLASSES). Write its rows' sums of exponentials and the target logits in it."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    mask = row < logits.n_rows
    target = row_targets(target_ptr, logits, first_row, tile_index * CLASSES, EXPERTS=EXPERTS, TILE=TILE)
    # most tiles hold none of these rows' targets, and masking every tile would cost as much as the exponentials
    if tl.max(target, 0) >= 0:
        hit = column[None, :] == target[:, None]
        target_logit = tl.sum(tl.where(hit, tile, 0.0), 1)
        tl.store(out.target_logit_ptr + row, target_logit, mask=mask & (target >= 0))
        tile = tl.where(hit, float("-inf"), tile)
    is_large = tl.abs(reference) > LARGEST_REFERENCE
    if ANY_REFERENCE:
        exact = (tile - reference[:, None]) * LOG2E
        exponent = tl.where(is_large[:, None], exact, tl.fma(tile, LOG2E, -(reference * LOG2E)[:, None]))
    else:
        exponent = tl.fma(tile, LOG2E, tl.where(is_large, float("inf"), -(reference * LOG2E))[:, None])
    a = tl.exp2(exponent)
    partial = tl.cast(tile_index, tl.int64) * logits.n_rows + row
    tl.store(out.tile_total_ptr + partial, tl.sum(a, 1), mask=mask)
    # maximum drops NaN: with an ignored token's factor of 0 it would still be NaN in dE. Other tokens have NaN factors
    return tl.maximum(times_derivative(a, tile, logits), 0.0)


@triton.jit
def exponentials_tile(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference,  # (ROWS,)
    out,  # Exponentials
    first_row,
    tile_index,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    ANY_REFERENCE: tl.constexpr,
):
    """Write one tile of a, (ROWS, CLASSES), its rows' sums, and the target logits in it."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row = tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    first_class = tile_index * CLASSES
    tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=False)
    a = kept_exponentials(
        tile,
        logits,
        target_ptr,
        reference,
        out,
        first_row,
        tile_index,
        EXPERTS=EXPERTS,
        TILE=TILE,
        ANY_REFERENCE=ANY_REFERENCE,
    )
    a_row = out.a_ptr + tl.cast(first_row, tl.int64) * out.n_columns + first_class
    a_tile = a_row + (row[:, None] * out.n_columns + column[None, :])
    inside = (first_row + row < logits.n_rows)[:, None] & (first_class + column < out.n_columns)[None, :]
    store_parts(a_tile, a, out.plane, mask=inside)


@triton.jit
def exponentials_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference_ptr,  # (R,)
    out,  # Exponentials
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write a and each tile's sums."""
    first_row = tl.program_id(0) * TILE.rows
    row = first_row + tl.arange(0, TILE.rows)
    reference = tl.load(reference_ptr + row, mask=row < logits.n_rows, other=0.0)
    tile_index = tl.program_id(1)
    exponentials_tile(
        logits, target_ptr, reference, out, first_row, tile_index, D=D, EXPERTS=EXPERTS, TILE=TILE, ANY_REFERENCE=False
    )


@triton.jit
def recheck_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference_ptr,  # (R,) in and out
    out,  # Exponentials
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Repeat `exponentials_kernel` with the maximum as reference, for blocks of rows with a sum beyond the margin."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    mask = row < logits.n_rows
    reference = tl.load(reference_ptr + row, mask=mask, other=0.0)
    target_logit = tl.load(out.target_logit_ptr + row, mask=mask, other=0.0)
    n_tiles = tl.cdiv(logits.n_classes, CLASSES)
    total = tl.zeros((ROWS,), tl.float32)
    part = tl.arange(0, TOTALS)
    for first in range(0, n_tiles, TOTALS):
        partial = (first + part)[:, None].to(tl.int64) * logits.n_rows + row[None, :]
        there = (first + part < n_tiles)[:, None] & mask[None, :]
        total += tl.sum(tl.load(out.tile_total_ptr + partial, mask=there, other=0.0), 0)
    # infinite sums are beyond the margin, and so is NaN, which no reference can repair
    beyond = mask & (~(total < tl.exp2(MARGIN)) | ((target_logit - reference) * LOG2E > MARGIN))
    if tl.max(beyond.to(tl.int32), 0) > 0:
        maximum = tl.full((ROWS,), LOWEST_REFERENCE, tl.float32)
        for tile_index in range(0, n_tiles):
            tile = logits_tile(logits, first_row, tile_index * CLASSES, 0, K=1, D=D, TILE=TILE, RESIDENT=False)
            maximum = tl.maximum(maximum, tl.max(tile, 1))
        reference = tl.where(beyond, maximum, reference)
        tl.store(reference_ptr + row, reference, mask=mask)
        # also write the columns beyond the last class, which are NaN for a large reference
        for tile_index in range(0, tl.cdiv(out.n_columns, CLASSES)):
            exponentials_tile(
                logits,
                target_ptr,
                reference,
                out,
                first_row,
                tile_index,
                D=D,
                EXPERTS=EXPERTS,
                TILE=TILE,
                ANY_REFERENCE=True,
            )
