"""Kernels over R = N·K independent rows of logits: their log-sum-exp, and samples from their softmax.

A program owns a block of rows and a split of the vocabulary, and walks through the tiles of the split with a running
result. The splits' results are combined in a fixed order, so equal calls give equal bits.
"""

import triton
import triton.language as tl

from .tiles import LOWEST, logits_tile, row_targets


@triton.jit
def statistics_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R,) int64, or None
    maximum_ptr,  # (splits, R) out
    total_ptr,  # (splits, R) out: Σ exp(l − maximum)
    target_logit_ptr,  # (R,) out, only where the target is a class
    tiles_of_split,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """The maximum and Σ exp(l − maximum) of each row's logits in one split, and the target's logit."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    n_rows = logits.n_rows
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    maximum = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    target_logit = tl.full((ROWS,), float("nan"), tl.float32)
    first_tile = split * tiles_of_split
    for tile_index in range(first_tile, tl.minimum(first_tile + tiles_of_split, tl.cdiv(logits.n_classes, CLASSES))):
        first_class = tile_index * CLASSES
        tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=TILE.resident)
        if target_ptr is not None:
            target = row_targets(target_ptr, first_row, n_rows, first_class, EXPERTS=1, ROWS=ROWS)
            here = (target >= 0) & (target < CLASSES)
            # most tiles hold no target of these rows: looking for one in each would cost as much as the exponentials
            if tl.max(here.to(tl.int32), 0) > 0:
                found = tl.sum(tl.where(column[None, :] == target[:, None], tile, 0.0), 1)
                target_logit = tl.where(here, found, target_logit)
        new_maximum = tl.maximum(maximum, tl.max(tile, 1))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(tile - new_maximum[:, None]), 1)
        maximum = new_maximum
    if target_ptr is not None:
        tl.store(target_logit_ptr + row, target_logit, mask=(row < n_rows) & (target_logit == target_logit))
    start = tl.cast(split, tl.int64) * n_rows
    tl.store(maximum_ptr + start + row, maximum, mask=row < n_rows)
    tl.store(total_ptr + start + row, total, mask=row < n_rows)


@triton.jit
def combined(
    maximum_ptr,  # (splits, R), or (R,) with a stride of 0
    total_ptr,  # (splits, R)
    row,  # (BLOCK,)
    mask,
    n_splits,
    maximum_stride,
    total_stride,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The maximum and Σ exp(l − maximum) of whole rows from those of their splits, (BLOCK,) each."""
    part = tl.arange(0, SPLITS)
    maximum = tl.full((BLOCK,), LOWEST, tl.float32)
    for first in range(0, n_splits, SPLITS):
        there = (first + part < n_splits)[:, None] & mask[None, :]
        index = (first + part)[:, None].to(tl.int64) * maximum_stride + row[None, :]
        maximum = tl.maximum(maximum, tl.max(tl.load(maximum_ptr + index, mask=there, other=LOWEST), 0))
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n_splits, SPLITS):
        there = (first + part < n_splits)[:, None] & mask[None, :]
        index = (first + part)[:, None].to(tl.int64)
        split_maximum = tl.load(maximum_ptr + index * maximum_stride + row[None, :], mask=there, other=LOWEST)
        split_total = tl.load(total_ptr + index * total_stride + row[None, :], mask=there, other=0.0)
        total += tl.sum(split_total * tl.exp(split_maximum - maximum[None, :]), 0)
    return maximum, total


@triton.jit
def combine_kernel(
    maximum_ptr,  # (splits, R)
    total_ptr,  # (splits, R)
    row_maximum_ptr,  # (R,) out
    log_total_ptr,  # (R,) out
    n_rows,
    n_splits,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A row's statistics from those of its splits: its maximum and log Σ exp(l − maximum)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < n_rows
    maximum, total = combined(maximum_ptr, total_ptr, row, mask, n_splits, n_rows, n_rows, BLOCK=BLOCK, SPLITS=SPLITS)
    tl.store(row_maximum_ptr + row, maximum, mask=mask)
    tl.store(log_total_ptr + row, tl.log(total), mask=mask)


@triton.jit
def sample_kernel(
    logits,  # Logits of R rows
    seed_ptr,  # (1,) int64
    best_ptr,  # (splits, R) out
    index_ptr,  # (splits, R) int64 out
    inverse_temperature,
    tiles_of_split,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gumbel-max: argmax_v (l / temperature − log e) with e exponentially distributed, drawn by its place (row, v)."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    n_rows = logits.n_rows
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    seed = tl.load(seed_ptr)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int32)
    first_tile = split * tiles_of_split
    for tile_index in range(first_tile, tl.minimum(first_tile + tiles_of_split, tl.cdiv(logits.n_classes, CLASSES))):
        first_class = tile_index * CLASSES
        tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=TILE.resident)
        counter_of_class = (first_class + column)[None, :] + tl.zeros((ROWS, CLASSES), tl.int32)
        counter_of_row = row[:, None] + tl.zeros((ROWS, CLASSES), tl.int32)
        bits, _, _, _ = tl.philox(seed, counter_of_class, counter_of_row, 0, 0)
        # in (0, 1], with steps of 2⁻³² near 0, where the winners' small exponentials come from
        uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
        exponential = tl.where(
            uniform < 0.01, uniform * (1 + uniform * (0.5 + uniform * (1 / 3 + 0.25 * uniform))), -tl.log(1 - uniform)
        )
        # 1 − uniform is 0 where the 32 bits round up to 1: such an exponential is huge, and never wins
        value = tile * inverse_temperature - tl.log(exponential)
        tile_best, tile_index_of_best = tl.max(value, 1, return_indices=True)
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        index = tl.where(better, first_class + tile_index_of_best, index)
    start = tl.cast(split, tl.int64) * n_rows
    tl.store(best_ptr + start + row, best, mask=row < n_rows)
    tl.store(index_ptr + start + row, index.to(tl.int64), mask=row < n_rows)
