"""Kernels over the mixture's own distribution: log p[n,v] = LSE_k(log π + l − L), its most probable class, and its
backward.

A program owns a tile of (tokens, classes) and sums the K experts in registers; their logits exist one tile at a time.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .loss import LN2
from .parts import store_parts
from .tiles import LOG2E, LOWEST, described_logits_tile, logits_tile, times_derivative

TINY = tl.constexpr(1e-30)
"""Smaller sums are computed again. exp2 flushes terms below 2⁻¹²⁶ to 0, and a hundred of them are less than the
rounding error of a larger sum."""


class Mixture(NamedTuple):
    """The experts' log-priors and softmax statistics. An expert's log-sum-exp is L = maximum + log_total."""

    log_prior_ptr: Tensor  # (N, K)
    maximum_ptr: Tensor  # (N, K)
    log_total_ptr: Tensor  # (N, K)


@triton.jit
def joint_tile(
    z_tiles,  # descriptor of (K, N, D) in (1, TOKENS, FEATURES), or None
    e_tiles,  # descriptor of (V, D) in (CLASSES, FEATURES), or None
    logits,  # Logits of N rows of K experts
    mixture,  # Mixture
    first_token,
    first_class,
    expert,
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """l − maximum of one expert, (TOKENS, CLASSES), and its maximum, log_total and log π, (TOKENS,) each."""
    token = tl.minimum(first_token + tl.arange(0, TILE.rows), logits.n_rows - 1)
    if z_tiles is not None:
        tile = described_logits_tile(z_tiles, e_tiles, logits, expert, first_token, first_class, D=D, TILE=TILE)
    else:
        tile = logits_tile(logits, first_token, first_class, expert, K=K, D=D, TILE=TILE, RESIDENT=RESIDENT)
    statistic = token * K + expert
    # subtract the maximum first: the sum of a large maximum and the others would be rounded
    maximum = tl.load(mixture.maximum_ptr + statistic)
    below = tile - maximum[:, None]
    return below, maximum, tl.load(mixture.log_total_ptr + statistic), tl.load(mixture.log_prior_ptr + statistic)


@triton.jit
def prob_tile(
    z_tiles,  # as in joint_tile
    e_tiles,
    logits,  # Logits of N rows of K experts
    mixture,  # Mixture
    first_token,
    first_class,
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """p of (TOKENS, CLASSES); 0 beyond the last class."""
    TOKENS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    total = tl.zeros((TOKENS, CLASSES), tl.float32)
    for expert in tl.range(0, K, flatten=TILE.described):
        below, _, log_total, log_prior = joint_tile(
            z_tiles,
            e_tiles,
            logits,
            mixture,
            first_token,
            first_class,
            expert,
            K=K,
            D=D,
            TILE=TILE,
            RESIDENT=TILE.resident,
        )
        total += tl.exp2(tl.fma(below, LOG2E, ((log_prior - log_total) * LOG2E)[:, None]))
    return total


@triton.jit
def underflows(
    total,  # (TOKENS, CLASSES): p
    logits,
    first_class,
    TILE: tl.constexpr,
):
    """True if the probability of some class is too small to take its logarithm. All exponents are ≤ 0, so only
    underflow can do harm."""
    beyond = (tl.arange(0, TILE.classes) >= logits.n_classes - first_class)[None, :]
    return tl.min(tl.where(beyond, 1.0, total)) < TINY


@triton.jit
def small_log2_prob_tile(
    logits,  # Logits of N rows of K experts
    mixture,  # Mixture
    first_token,
    first_class,
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """log2 p of (TOKENS, CLASSES), accurate however small, with running maxima; −inf beyond the last class."""
    TOKENS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    peak = tl.full((TOKENS, CLASSES), LOWEST, tl.float32)
    total = tl.zeros((TOKENS, CLASSES), tl.float32)
    for expert in range(0, K):
        below, _, log_total, log_prior = joint_tile(
            None, None, logits, mixture, first_token, first_class, expert, K=K, D=D, TILE=TILE, RESIDENT=False
        )
        joint2 = tl.fma(below, LOG2E, ((log_prior - log_total) * LOG2E)[:, None])
        new_peak = tl.maximum(peak, joint2)
        total = total * tl.exp2(peak - new_peak) + tl.exp2(joint2 - new_peak)
        peak = new_peak
    return peak + tl.log2(total)


@triton.jit
def log2_prob_tile(
    z_tiles,  # as in joint_tile
    e_tiles,
    logits,  # Logits of N rows of K experts
    mixture,  # Mixture
    first_token,
    first_class,
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """log2 p of (TOKENS, CLASSES); −inf beyond the last class."""
    total = prob_tile(z_tiles, e_tiles, logits, mixture, first_token, first_class, K=K, D=D, TILE=TILE)
    log2_p = tl.log2(total)
    if underflows(total, logits, first_class, TILE=TILE):
        log2_p = small_log2_prob_tile(logits, mixture, first_token, first_class, K=K, D=D, TILE=TILE)
    return log2_p


@triton.jit
def store_log_prob(
    log_p,  # (TOKENS, CLASSES)
    logits,
    log_prob_ptr,  # (N, V) out
    first_token,
    first_class,
    TILE: tl.constexpr,
):
    n_classes = logits.n_classes
    token = tl.arange(0, TILE.rows)
    column = tl.arange(0, TILE.classes)
    out_row = log_prob_ptr + tl.cast(first_token, tl.int64) * n_classes + first_class
    out = out_row + (token.to(tl.int64)[:, None] * n_classes + column[None, :])
    inside = (first_token + token < logits.n_rows)[:, None] & (first_class + column < n_classes)[None, :]
    tl.store(out, log_p, mask=inside)


@triton.jit
def log_prob_kernel(
    z_tiles,  # as in joint_tile
    e_tiles,
    logits,  # Logits of N rows of K experts
    mixture,  # Mixture
    log_prob_ptr,  # (N, V) out
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,  # TileConstants for a part of the tile's classes
):
    """Write log p[n,v] = LSE_k(log π + l − L)."""
    first_token = tl.program_id(0) * TILE.rows
    first_class = tl.program_id(1) * TILE.classes
    total = prob_tile(z_tiles, e_tiles, logits, mixture, first_token, first_class, K=K, D=D, TILE=TILE)
    store_log_prob(tl.log2(total) * LN2, logits, log_prob_ptr, first_token, first_class, TILE=TILE)
    if underflows(total, logits, first_class, TILE=TILE):
        # rare: compute them again, a part of the classes at a time, to leave registers to the sums above
        tl.debug_barrier()  # these stores come from other threads than the first ones, and must come after them
        end = tl.minimum(first_class + TILE.classes, logits.n_classes)
        for first_of_part in range(first_class, end, PART.classes):
            log2_p = small_log2_prob_tile(logits, mixture, first_token, first_of_part, K=K, D=D, TILE=PART)
            store_log_prob(log2_p * LN2, logits, log_prob_ptr, first_token, first_of_part, TILE=PART)


@triton.jit(do_not_specialize=["tiles_of_split"])
def predict_kernel(
    z_tiles,  # as in joint_tile
    e_tiles,
    logits,  # Logits of N rows of K experts
    mixture,  # Mixture
    best_ptr,  # (splits, N) out: the largest probability
    index_ptr,  # (splits, N) int64 out: the first class that has it
    tiles_of_split,
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the most probable class of each token in one split."""
    TOKENS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    n_tokens = logits.n_rows
    first_token = tl.program_id(0) * TOKENS
    split = tl.program_id(1)
    token = first_token + tl.arange(0, TOKENS)
    best = tl.zeros((TOKENS,), tl.float32)
    index = tl.zeros((TOKENS,), tl.int32)
    first_tile = split * tiles_of_split
    for tile_index in range(first_tile, tl.minimum(first_tile + tiles_of_split, tl.cdiv(logits.n_classes, CLASSES))):
        first_class = tile_index * CLASSES
        # the largest probability is at least 1/V, far above underflow
        prob = prob_tile(z_tiles, e_tiles, logits, mixture, first_token, first_class, K=K, D=D, TILE=TILE)
        tile_best, tile_index_of_best = tl.max(prob, 1, return_indices=True)
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        index = tl.where(better, first_class + tile_index_of_best, index)
    start = tl.cast(split, tl.int64) * n_tokens
    tl.store(best_ptr + start + token, best, mask=token < n_tokens)
    tl.store(index_ptr + start + token, index.to(tl.int64), mask=token < n_tokens)


@triton.jit
def mixture_gradient_kernel(
    z_tiles,  # as in joint_tile
    e_tiles,
    logits,  # Logits of N rows of K experts
    mixture,  # Mixture
    grad_ptr,  # (N, V): G
    s_ptr,  # (N, K): Σ_v G q; in the first sweep (tiles, N, K) out, the sum of each tile
    gradients,  # LogitGradients of N·K rows: the span of classes; written in the second sweep
    K: tl.constexpr,
    D: tl.constexpr,
    SECOND_SWEEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write s = Σ_v G q in the first sweep and dl = G q − s·exp(l − L), times the transform's derivative, in the
    second, with q = exp(log π + l − L − log p)."""
    TOKENS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    n_tokens = logits.n_rows
    n_classes = logits.n_classes
    first_token = tl.program_id(0) * TOKENS
    first_column = tl.program_id(1) * CLASSES
    first_class = gradients.first_class + first_column
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, CLASSES)
    log2_p = log2_prob_tile(z_tiles, e_tiles, logits, mixture, first_token, first_class, K=K, D=D, TILE=TILE)
    written = (first_token + token < n_tokens)[:, None] & (first_column + column < gradients.n_columns)[None, :]
    inside = written & (first_class + column < n_classes)[None, :]
    in_tile = token.to(tl.int64)[:, None] * n_classes + column[None, :]
    grad_tile = grad_ptr + tl.cast(first_token, tl.int64) * n_classes + first_class + in_tile
    grad = tl.load(grad_tile, mask=inside, other=0.0)
    # a masked class has log p = −inf under every expert and gets no gradient
    log2_p = tl.where(log2_p > float("-inf"), log2_p, float("inf"))
    row_stride = K * gradients.stride
    for expert in tl.range(0, K, flatten=TILE.described):
        below, maximum, log_total, log_prior = joint_tile(
            z_tiles, e_tiles, logits, mixture, first_token, first_class, expert, K=K, D=D, TILE=TILE, RESIDENT=False
        )
        # the same exponents as in the sum p: for a single expert q is then 1 up to the rounding of log2
        joint2 = tl.fma(below, LOG2E, ((log_prior - log_total) * LOG2E)[:, None])
        weighted = grad * tl.exp2(joint2 - log2_p)
        statistic = (first_token + token) * K + expert
        mask = first_token + token < n_tokens
        if SECOND_SWEEP:
            s = tl.load(s_ptr + statistic, mask=mask, other=0.0)
            dl = weighted - s[:, None] * tl.exp2(tl.fma(below, LOG2E, -(log_total * LOG2E)[:, None]))
            dl = times_derivative(dl, below + maximum[:, None], logits)
            row = (tl.cast(first_token, tl.int64) * K + expert) * gradients.stride
            out = gradients.dl_ptr + row + first_column + (token[:, None] * row_stride + column[None, :])
            store_parts(out, dl, gradients.plane, mask=written)  # 0 beyond the last class
        else:
            out = s_ptr + tl.cast(tl.program_id(1), tl.int64) * K * n_tokens + statistic
            tl.store(out, tl.sum(tl.where(inside, weighted, 0.0), 1), mask=mask)
