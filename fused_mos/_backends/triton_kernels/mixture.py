"""Kernels over the mixture's own distribution: log p[n,v] = LSE_k(log π + l − L), its most probable class, and its
backward.

A program owns a tile of (tokens, classes) and sums the K experts in registers; their logits exist one tile at a time.
"""

import triton
import triton.language as tl

from .tiles import LOWEST, logits_tile

TINY = tl.constexpr(1e-37)


@triton.jit
def joint_tile(
    z_ptr,
    e_ptr,
    bias_ptr,
    log_prior_ptr,
    maximum_ptr,
    log_total_ptr,
    n_tokens,
    n_classes,
    first_token,
    first_class,
    expert,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """l − L of one expert, (TOKENS, CLASSES), and log π, (TOKENS,)."""
    token = tl.minimum(first_token + tl.arange(0, TOKENS), n_tokens - 1)
    tile = logits_tile(
        z_ptr + expert * D,
        e_ptr,
        bias_ptr,
        n_tokens,
        n_classes,
        first_token,
        first_class,
        K * D,
        D,
        HAS_BIAS,
        TOKENS,
        CLASSES,
        FEATURES,
        PRECISION,
        RESIDENT,
    )
    statistic = token * K + expert
    maximum = tl.load(maximum_ptr + statistic)
    log_total = tl.load(log_total_ptr + statistic)
    return (tile - maximum[:, None]) - log_total[:, None], tl.load(log_prior_ptr + statistic)


@triton.jit
def log_prob_tile(
    z_ptr,
    e_ptr,
    bias_ptr,
    log_prior_ptr,
    maximum_ptr,
    log_total_ptr,
    n_tokens,
    n_classes,
    first_token,
    first_class,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """log p of (TOKENS, CLASSES); −inf beyond the last class."""
    mixture = tl.zeros((TOKENS, CLASSES), tl.float32)
    for expert in range(0, K):
        log_softmax, log_prior = joint_tile(
            z_ptr,
            e_ptr,
            bias_ptr,
            log_prior_ptr,
            maximum_ptr,
            log_total_ptr,
            n_tokens,
            n_classes,
            first_token,
            first_class,
            expert,
            K,
            D,
            HAS_BIAS,
            TOKENS,
            CLASSES,
            FEATURES,
            PRECISION,
            RESIDENT,
        )
        mixture += tl.exp(log_softmax + log_prior[:, None])
    log_p = tl.log(mixture)
    beyond = (tl.arange(0, CLASSES) >= n_classes - first_class)[None, :]
    if tl.min(tl.where(beyond, 1.0, mixture)) < TINY:
        # all exponents are ≤ 0, so only underflow can do harm, and it is rare: once more with running maxima
        peak = tl.full((TOKENS, CLASSES), LOWEST, tl.float32)
        mixture = tl.zeros((TOKENS, CLASSES), tl.float32)
        for expert in range(0, K):
            log_softmax, log_prior = joint_tile(
                z_ptr,
                e_ptr,
                bias_ptr,
                log_prior_ptr,
                maximum_ptr,
                log_total_ptr,
                n_tokens,
                n_classes,
                first_token,
                first_class,
                expert,
                K,
                D,
                HAS_BIAS,
                TOKENS,
                CLASSES,
                FEATURES,
                PRECISION,
                False,
            )
            joint = log_softmax + log_prior[:, None]
            new_peak = tl.maximum(peak, joint)
            mixture = mixture * tl.exp(peak - new_peak) + tl.exp(joint - new_peak)
            peak = new_peak
        log_p = peak + tl.log(mixture)
    return log_p


@triton.jit
def log_prob_kernel(
    z_ptr,  # (N, K, D)
    e_ptr,  # (V, D)
    bias_ptr,  # (V,)
    log_prior_ptr,  # (N, K)
    maximum_ptr,  # (N, K)
    log_total_ptr,  # (N, K)
    log_prob_ptr,  # (N, V) out
    n_tokens,
    n_classes,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    first_token = tl.program_id(0) * TOKENS
    first_class = tl.program_id(1) * CLASSES
    log_p = log_prob_tile(
        z_ptr,
        e_ptr,
        bias_ptr,
        log_prior_ptr,
        maximum_ptr,
        log_total_ptr,
        n_tokens,
        n_classes,
        first_token,
        first_class,
        K,
        D,
        HAS_BIAS,
        TOKENS,
        CLASSES,
        FEATURES,
        PRECISION,
        RESIDENT,
    )
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, CLASSES)
    out = (
        log_prob_ptr
        + tl.cast(first_token, tl.int64) * n_classes
        + first_class
        + (token.to(tl.int64)[:, None] * n_classes + column[None, :])
    )
    tl.store(out, log_p, mask=(first_token + token < n_tokens)[:, None] & (first_class + column < n_classes)[None, :])


@triton.jit
def predict_kernel(
    z_ptr,  # (N, K, D)
    e_ptr,  # (V, D)
    bias_ptr,  # (V,)
    log_prior_ptr,  # (N, K)
    maximum_ptr,  # (N, K)
    log_total_ptr,  # (N, K)
    best_ptr,  # (splits, N) out: the largest log-probability
    index_ptr,  # (splits, N) int64 out: the first class that has it
    n_tokens,
    n_classes,
    tiles_of_split,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    first_token = tl.program_id(0) * TOKENS
    split = tl.program_id(1)
    token = first_token + tl.arange(0, TOKENS)
    best = tl.full((TOKENS,), float("-inf"), tl.float32)
    index = tl.zeros((TOKENS,), tl.int32)
    first_tile = split * tiles_of_split
    for tile_index in range(first_tile, tl.minimum(first_tile + tiles_of_split, tl.cdiv(n_classes, CLASSES))):
        first_class = tile_index * CLASSES
        log_p = log_prob_tile(
            z_ptr,
            e_ptr,
            bias_ptr,
            log_prior_ptr,
            maximum_ptr,
            log_total_ptr,
            n_tokens,
            n_classes,
            first_token,
            first_class,
            K,
            D,
            HAS_BIAS,
            TOKENS,
            CLASSES,
            FEATURES,
            PRECISION,
            RESIDENT,
        )
        tile_best, tile_index_of_best = tl.max(log_p, 1, return_indices=True)
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        index = tl.where(better, first_class + tile_index_of_best, index)
    start = tl.cast(split, tl.int64) * n_tokens
    tl.store(best_ptr + start + token, best, mask=token < n_tokens)
    tl.store(index_ptr + start + token, index.to(tl.int64), mask=token < n_tokens)


@triton.jit
def mixture_gradient_kernel(
    z_ptr,  # (N, K, D)
    e_ptr,  # (V, D)
    bias_ptr,  # (V,)
    log_prior_ptr,  # (N, K)
    maximum_ptr,  # (N, K)
    log_total_ptr,  # (N, K)
    grad_ptr,  # (N, V): G
    s_ptr,  # (N, K): Σ_v G q; in the first sweep (tiles, N, K) out, the terms of each tile
    dl_ptr,  # second sweep: (N·K, stride) out, of the classes from first_class on
    n_tokens,
    n_classes,
    first_class,
    span,
    stride,
    K: tl.constexpr,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SECOND_SWEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """With q = exp(log π + l − L − log p): s = Σ_v G q in the first sweep, dl = G q − s·exp(l − L) in the second."""
    first_token = tl.program_id(0) * TOKENS
    first_column = tl.program_id(1) * CLASSES
    first_class += first_column
    token = tl.arange(0, TOKENS)
    column = tl.arange(0, CLASSES)
    log_p = log_prob_tile(
        z_ptr,
        e_ptr,
        bias_ptr,
        log_prior_ptr,
        maximum_ptr,
        log_total_ptr,
        n_tokens,
        n_classes,
        first_token,
        first_class,
        K,
        D,
        HAS_BIAS,
        TOKENS,
        CLASSES,
        FEATURES,
        PRECISION,
        RESIDENT,
    )
    inside = (
        (first_token + token < n_tokens)[:, None]
        & (first_class + column < n_classes)[None, :]
        & (first_column + column < span)[None, :]
    )
    in_tile = token.to(tl.int64)[:, None] * n_classes + column[None, :]
    grad = tl.load(
        grad_ptr + tl.cast(first_token, tl.int64) * n_classes + first_class + in_tile, mask=inside, other=0.0
    )
    # a masked class has log p = −inf under every expert, and takes no gradient
    log_p = tl.where(log_p > float("-inf"), log_p, float("inf"))
    row_stride = K * stride
    for expert in range(0, K):
        log_softmax, log_prior = joint_tile(
            z_ptr,
            e_ptr,
            bias_ptr,
            log_prior_ptr,
            maximum_ptr,
            log_total_ptr,
            n_tokens,
            n_classes,
            first_token,
            first_class,
            expert,
            K,
            D,
            HAS_BIAS,
            TOKENS,
            CLASSES,
            FEATURES,
            PRECISION,
            False,
        )
        weighted = grad * tl.exp(log_softmax + log_prior[:, None] - log_p)
        statistic = (first_token + token) * K + expert
        mask = first_token + token < n_tokens
        if SECOND_SWEEP:
            s = tl.load(s_ptr + statistic, mask=mask, other=0.0)
            dl = weighted - s[:, None] * tl.exp(log_softmax)
            row = (tl.cast(first_token, tl.int64) * K + expert) * stride
            out = dl_ptr + row + first_column + (token[:, None] * row_stride + column[None, :])
            tl.store(out, dl.to(dl_ptr.dtype.element_ty), mask=inside)
        else:
            out = s_ptr + tl.cast(tl.program_id(1), tl.int64) * K * n_tokens + statistic
            tl.store(out, tl.sum(tl.where(inside, weighted, 0.0), 1), mask=mask)
