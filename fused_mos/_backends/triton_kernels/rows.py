"""Kernels over R = N·K independent rows of logits: their log-sum-exp, and samples from their softmax.

A program owns a block of rows and a split of the vocabulary. It loops over the tiles of the split and updates a running
result. The results of the splits are combined in a fixed order, so equal calls give equal bits.
"""

import triton
import triton.language as tl

from .loss import Splits  # noqa: F401  (what statistics_kernel writes)
from .tiles import LOG2E, LOWEST, logits_tile, row_targets


@triton.jit
def updated_statistics(
    tile,  # (ROWS, CLASSES): logits
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64, or None
    maximum,  # (ROWS,)
    total,  # (ROWS,): Σ exp(l − maximum)
    target_logit,  # (ROWS,)
    first_row,
    first_class,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each row's maximum, Σ exp(l − maximum) and target logit, updated with one more tile."""
    if target_ptr is not None:
        target = row_targets(target_ptr, logits, first_row, first_class, EXPERTS=EXPERTS, TILE=TILE)
        # most tiles hold none of these rows' targets, and masking every tile would cost as much as the exponentials
        if tl.max(target, 0) >= 0:
            column = tl.arange(0, TILE.classes)
            found = tl.sum(tl.where(column[None, :] == target[:, None], tile, 0.0), 1)
            target_logit = tl.where(target >= 0, found, target_logit)
    new_maximum = tl.maximum(maximum, tl.max(tile, 1))
    # subtract the maximum first: fused with log2(e), its rounding error would enter the exponents
    total = total * tl.exp2((maximum - new_maximum) * LOG2E)
    total += tl.sum(tl.exp2((tile - new_maximum[:, None]) * LOG2E), 1)
    return new_maximum, total, target_logit


@triton.jit
def store_statistics(out, target_ptr, maximum, total, target_logit, split, row, n_rows):
    """Write the statistics of one split to `out`, Splits."""
    start = tl.cast(split, tl.int64) * n_rows
    tl.store(out.maximum_ptr + start + row, maximum, mask=row < n_rows)
    tl.store(out.total_ptr + start + row, total, mask=row < n_rows)
    if target_ptr is not None:
        tl.store(out.target_logit_ptr + start + row, target_logit, mask=row < n_rows)


@triton.jit(do_not_specialize=["tiles_of_split"])
def statistics_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64, or None
    out,  # Splits
    tiles_of_split,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write each row's maximum, Σ exp(l − maximum) and target logit in one split."""
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
    for tile_index in range(first_tile, tl.minimum(first_tile + tiles_of_split, tl.cdiv(logits.n_classes, CLASSES))):
        first_class = tile_index * CLASSES
        tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=TILE.resident)
        maximum, total, target_logit = updated_statistics(
            tile, logits, target_ptr, maximum, total, target_logit, first_row, first_class, EXPERTS=EXPERTS, TILE=TILE
        )
    store_statistics(out, target_ptr, maximum, total, target_logit, split, row, n_rows)


@triton.jit
def gumbel(bits):
    """A Gumbel variate −log e, with e exponentially distributed, from 32 random bits."""
    # in (0, 1], with steps of 2⁻³² near 0: the smallest exponentials win
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(
        uniform < 0.01, uniform * (1 + uniform * (0.5 + uniform * (1 / 3 + 0.25 * uniform))), -tl.log(1 - uniform)
    )
    # 1 − uniform is 0 if the 32 bits round up to 1; the exponential is then huge and never wins
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["tiles_of_split"])
def sample_kernel(
    logits,  # Logits of R rows
    seed_ptr,  # (1,) int64
    best_ptr,  # (splits, R) out
    index_ptr,  # (splits, R) int64 out
    tiles_of_split,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Draw by Gumbel-max in one split: argmax_v (l − log e) with e exponentially distributed and determined by the
    seed, the row and v."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    n_rows = logits.n_rows
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    seed = tl.load(seed_ptr)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.full((ROWS,), -1, tl.int32)  # remains if the row has no class to draw: every logit is −inf or NaN
    first_tile = split * tiles_of_split
    for tile_index in range(first_tile, tl.minimum(first_tile + tiles_of_split, tl.cdiv(logits.n_classes, CLASSES))):
        first_class = tile_index * CLASSES
        tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=TILE.resident)
        counter_of_class = (first_class + column)[None, :] + tl.zeros((ROWS, CLASSES), tl.int32)
        counter_of_row = row[:, None] + tl.zeros((ROWS, CLASSES), tl.int32)
        bits, _, _, _ = tl.philox(seed, counter_of_class, counter_of_row, 0, 0)
        value = tile + gumbel(bits)
        tile_best, tile_index_of_best = tl.max(value, 1, return_indices=True)
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        index = tl.where(better, first_class + tile_index_of_best, index)
    start = tl.cast(split, tl.int64) * n_rows
    tl.store(best_ptr + start + row, best, mask=row < n_rows)
    tl.store(index_ptr + start + row, index.to(tl.int64), mask=row < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def first_of_best_kernel(
    best_ptr,  # (splits, R)
    index_ptr,  # (splits, R) int64
    result_ptr,  # (R,) int64 out
    n_rows,
    n_splits,
    BLOCK: tl.constexpr,
):
    """Write each row's class from its best split, the first one of equals."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < n_rows
    best = tl.load(best_ptr + row, mask=mask, other=0.0)
    index = tl.load(index_ptr + row, mask=mask, other=0)
    for split in range(1, n_splits):
        place = tl.cast(split, tl.int64) * n_rows + row
        value = tl.load(best_ptr + place, mask=mask, other=0.0)
        better = value > best
        best = tl.where(better, value, best)
        index = tl.where(better, tl.load(index_ptr + place, mask=mask, other=0), index)
    tl.store(result_ptr + row, index, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def choose_rows_kernel(
    latent_ptr,  # (N, K, D)
    prior_logits_ptr,  # (N, K)
    seed_ptr,  # (1,) int64
    rows_ptr,  # (N, D) out
    n_tokens,
    D: tl.constexpr,
    MIX: tl.constexpr,
):
    """Copy the latent vector of one expert per token, drawn from the prior by Gumbel-max; NaN if none can be drawn."""
    TOKENS: tl.constexpr = MIX.tokens
    EXPERTS: tl.constexpr = MIX.experts
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    mask = (token < n_tokens)[:, None] & (expert < MIX.k)[None, :]
    row = token[:, None] * MIX.k + expert[None, :]
    prior_logits = tl.load(prior_logits_ptr + row, mask=mask, other=float("-inf")).to(tl.float32)
    none = tl.zeros((TOKENS, EXPERTS), tl.int32)
    # the third counter makes these numbers independent of those in sample_kernel
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), none + expert[None, :], none + token[:, None], 1, 0)
    value = tl.where(mask, prior_logits + gumbel(bits), float("-inf"))
    best, chosen = tl.max(value, 1, return_indices=True)
    n_nan = tl.sum((value != value).to(tl.int32), 1)
    drawable = ((n_nan == 0) & (best > float("-inf")) & (best < float("inf")))[:, None]
    source = (token.to(tl.int64) * MIX.k + tl.minimum(chosen, MIX.k - 1)) * D
    for first in range(0, D, MIX.features):
        feature = (first + tl.arange(0, MIX.features))[None, :]
        inside = (token < n_tokens)[:, None] & (feature < D)
        copied = tl.load(latent_ptr + source[:, None] + feature, mask=inside, other=0.0)
        copied = tl.where(drawable, copied.to(tl.float32), float("nan")).to(rows_ptr.dtype.element_ty)
        tl.store(rows_ptr + token.to(tl.int64)[:, None] * D + feature, copied, mask=inside)
