"""Kernels that compute the mixture's loss from sums over its rows, and each row's factor in the gradient.

    combine_kernel       statistics of rows from those of their splits; on request log π and the NLL
    mix_kernel           from exponentials: the statistics, the NLL, da, and each row's factor f of dl = f·a, which
                         scales the other operand of dE = aᵀ·(f z) and the result of dz = f·(a·E)
    row_weights_kernel   from statistics: da and each row's weight w = g·r of dl

A program handles whole tokens, with their K experts side by side. Numbers that change from batch to batch are not
specialised: a kernel is compiled once or twice per model, not once per sequence length.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .exponentials import LARGEST_REFERENCE
from .finish import scale_rows
from .parts import store_parts
from .tiles import LOG2E, LOWEST, times_derivative

LN2 = tl.constexpr(0.6931471805599453)
SMALLEST_WEIGHT = tl.constexpr(2.0**-20)


class MixtureConstants(NamedTuple):
    """Compile-time constants MIX of a kernel over whole tokens: the number of experts and, per program, its tokens, the
    experts rounded up to a power of two, the partial sums to read at once and the features to write at once."""

    k: int
    tokens: int
    experts: int
    partials: int
    features: int


class Splits(NamedTuple):
    """Statistics of R rows for each split of the vocabulary."""

    maximum_ptr: Tensor  # (splits, R)
    total_ptr: Tensor  # (splits, R): Σ exp(l − maximum)
    target_logit_ptr: Tensor | None  # (splits, R), NaN if the target is not in the split; None without targets


class Statistics(NamedTuple):
    """Statistics of R rows. The log-sum-exp of a row is L = maximum + log_total."""

    maximum_ptr: Tensor  # (R,)
    log_total_ptr: Tensor  # (R,)
    target_logit_ptr: Tensor | None  # (R,), NaN where the target is no class


class Targets(NamedTuple):
    """The inputs of a loss besides the logits."""

    prior_logits_ptr: Tensor  # (N, K)
    target_ptr: Tensor | None  # (N,) int64; None if only the prior is wanted
    ignore_index: int


class WeightedLosses(NamedTuple):
    """Each token's weighted loss, c·nll + λ Σ_k π_k L_k + ζ Σ_k π_k L_k²."""

    of_nll_ptr: Tensor  # (N,): c
    of_lse_ptr: Tensor  # (N,): λ
    of_squared_lse_ptr: Tensor  # (N,): ζ
    losses_ptr: Tensor  # (N,) out


class RowFactors(NamedTuple):
    """Each row's factors in the gradient of the sum of losses, which is Σ nll unless they are weighted."""

    responsibility_ptr: Tensor  # (R,), 0 where the target is ignored
    factor_ptr: Tensor  # (R,)
    rows_ptr: Tensor | None  # (R, WIDTH): [f·z, f and its rounding error if COLUMNS is 2, 0 …]
    grad_prior_ptr: Tensor | None  # (N, K)


@triton.jit
def token_rows(n_tokens, MIX: tl.constexpr):
    """The program's tokens (tokens,), the rows of their experts (tokens, experts), and a mask of the valid rows."""
    token = tl.program_id(0) * MIX.tokens + tl.arange(0, MIX.tokens)
    expert = tl.arange(0, MIX.experts)
    mask = (token < n_tokens)[:, None] & (expert < MIX.k)[None, :]
    return token, token[:, None] * MIX.k + expert[None, :], mask


@triton.jit
def log_prior_of(prior_logits_ptr, row, mask):
    """log softmax over the experts, (tokens, experts)."""
    prior_logits = tl.load(prior_logits_ptr + row, mask=mask, other=float("-inf")).to(tl.float32)
    centred = prior_logits - tl.max(prior_logits, 1)[:, None]
    return centred - tl.log(tl.sum(tl.exp(centred), 1))[:, None]


@triton.jit
def mixed(joint):
    """The log-likelihood LSE_k, (tokens,), and the responsibilities, (tokens, experts), of log π + t − L."""
    peak = tl.maximum(tl.max(joint, 1), LOWEST)  # if every expert gives probability 0, all responsibilities are 0
    likelihood = tl.exp(joint - peak[:, None])
    likelihoods = tl.sum(likelihood, 1)
    responsibility = tl.where((likelihoods != 0)[:, None], likelihood / likelihoods[:, None], 0.0)
    return peak + tl.log(likelihoods), responsibility


@triton.jit
def valid_targets(targets, token, n_tokens):
    """The targets (tokens,), and a mask of those that count."""
    target = tl.load(targets.target_ptr + token, mask=token < n_tokens, other=0)
    return target, (token < n_tokens) & (target != targets.ignore_index)


@triton.jit
def weighted_losses(
    weighted,  # WeightedLosses, out
    token,  # (tokens,)
    mask,  # (tokens, experts)
    n_tokens,
    valid,  # (tokens,)
    nll,  # (tokens,)
    log_prior,  # (tokens, experts)
    log_sum_exp,  # (tokens, experts): L
):
    """Write each token's loss. Return its c, (tokens, 1), and the gradients of Σ_k π_k f_k with f = λ L + ζ L², both
    (tokens, experts): π (f − Σ_k π_k f_k) for the prior's logits and π (λ + 2 ζ L) for L."""
    there = token < n_tokens
    c = tl.where(valid, tl.load(weighted.of_nll_ptr + token, mask=there, other=0.0), 0.0)
    of_lse = tl.load(weighted.of_lse_ptr + token, mask=there, other=0.0)[:, None]
    of_squared_lse = tl.load(weighted.of_squared_lse_ptr + token, mask=there, other=0.0)[:, None]
    # terms of weight 0 add nothing, even if they are not finite
    weighs = mask & valid[:, None] & ((of_lse != 0) | (of_squared_lse != 0))
    prior = tl.where(weighs, tl.exp(log_prior), 0.0)
    log_sum_exp = tl.where(prior != 0, log_sum_exp, 0.0)
    of_expert = prior * (log_sum_exp * (of_lse + of_squared_lse * log_sum_exp))
    of_token = tl.sum(of_expert, 1)
    tl.store(weighted.losses_ptr + token, tl.where(c != 0, c * nll, 0.0) + of_token, mask=there)
    return c[:, None], of_expert - prior * of_token[:, None], prior * (of_lse + 2 * of_squared_lse * log_sum_exp)


@triton.jit(do_not_specialize=["n_tokens", "n_splits"])
def combine_kernel(
    splits,  # Splits
    statistics,  # Statistics, out
    targets,  # Targets, or None for statistics alone
    log_prior_ptr,  # (N, K) out, or None
    nll_ptr,  # (N,) out, or None
    weighted,  # WeightedLosses, out, or None
    n_tokens,
    n_splits,
    MIX: tl.constexpr,
):
    """Write the statistics of whole rows and, with `targets`, log π and the NLL."""
    token, row, mask = token_rows(n_tokens, MIX=MIX)
    flat, there_row = tl.reshape(row, (MIX.tokens * MIX.experts,)), tl.reshape(mask, (MIX.tokens * MIX.experts,))
    n_rows = n_tokens * MIX.k
    part = tl.arange(0, MIX.partials)
    maximum = tl.full((MIX.tokens * MIX.experts,), LOWEST, tl.float32)
    for first in range(0, n_splits, MIX.partials):
        there = (first + part < n_splits)[:, None] & there_row[None, :]
        index = (first + part)[:, None].to(tl.int64) * n_rows + flat[None, :]
        maximum = tl.maximum(maximum, tl.max(tl.load(splits.maximum_ptr + index, mask=there, other=LOWEST), 0))
    total = tl.zeros((MIX.tokens * MIX.experts,), tl.float32)
    found = tl.zeros((MIX.tokens * MIX.experts,), tl.float32)
    times_found = tl.zeros((MIX.tokens * MIX.experts,), tl.float32)
    for first in range(0, n_splits, MIX.partials):
        there = (first + part < n_splits)[:, None] & there_row[None, :]
        index = (first + part)[:, None].to(tl.int64) * n_rows + flat[None, :]
        split_maximum = tl.load(splits.maximum_ptr + index, mask=there, other=LOWEST)
        split_total = tl.load(splits.total_ptr + index, mask=there, other=0.0)
        total += tl.sum(split_total * tl.exp(split_maximum - maximum[None, :]), 0)
        if splits.target_logit_ptr is not None:
            logit = tl.load(splits.target_logit_ptr + index, mask=there, other=float("nan"))
            found += tl.sum(tl.where(logit == logit, logit, 0.0), 0)
            times_found += tl.sum((logit == logit).to(tl.float32), 0)
    log_total = tl.log(total)
    tl.store(statistics.maximum_ptr + flat, maximum, mask=there_row)
    tl.store(statistics.log_total_ptr + flat, log_total, mask=there_row)
    if log_prior_ptr is not None:
        tl.store(log_prior_ptr + row, log_prior_of(targets.prior_logits_ptr, row, mask), mask=mask)
    if splits.target_logit_ptr is not None:
        target_logit = tl.reshape(tl.where(times_found > 0, found, float("nan")), (MIX.tokens, MIX.experts))
        if nll_ptr is not None:
            log_likelihood = target_logit - tl.reshape(maximum, (MIX.tokens, MIX.experts))
            log_likelihood -= tl.reshape(log_total, (MIX.tokens, MIX.experts))
            log_prior = log_prior_of(targets.prior_logits_ptr, row, mask)
            joint = log_prior + log_likelihood
            mixture, _ = mixed(tl.where(mask, joint, float("-inf")))
            _, valid = valid_targets(targets, token, n_tokens)
            tl.store(nll_ptr + token, tl.where(valid, -mixture, 0.0), mask=token < n_tokens)
            if weighted is not None:
                log_sum_exp = tl.reshape(maximum + log_total, (MIX.tokens, MIX.experts))
                weighted_losses(weighted, token, mask, n_tokens, valid, -mixture, log_prior, log_sum_exp)
            target_logit = tl.where(valid[:, None], target_logit, 0.0)
        tl.store(
            statistics.target_logit_ptr + row, target_logit, mask=mask
        )  # only here: stores from two layouts would race


@triton.jit(do_not_specialize=["n_tokens"])
def mix_kernel(
    z_ptr,  # (R, STRIDE), with D features
    reference_ptr,  # (R,)
    exponentials,  # Exponentials; writes the targets' entries of a
    targets,  # Targets
    nll_ptr,  # (N,) out
    log_total_ptr,  # (R,) out, relative to the reference
    out,  # RowFactors
    scales,  # Scales
    weighted,  # WeightedLosses, out, or None
    n_tokens,
    n_classes,
    n_tiles,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MIX: tl.constexpr,
):
    """Write the losses of a block of tokens, the responsibilities, and the factors that turn a into dl."""
    token, row, mask = token_rows(n_tokens, MIX=MIX)
    flat, there_row = tl.reshape(row, (MIX.tokens * MIX.experts,)), tl.reshape(mask, (MIX.tokens * MIX.experts,))
    n_rows = n_tokens * MIX.k
    part = tl.arange(0, MIX.partials)
    sums = tl.zeros((MIX.tokens * MIX.experts,), tl.float32)
    for first in range(0, n_tiles, MIX.partials):
        there = (first + part < n_tiles)[:, None] & there_row[None, :]
        index = (first + part)[:, None].to(tl.int64) * n_rows + flat[None, :]
        sums += tl.sum(tl.load(exponentials.tile_total_ptr + index, mask=there, other=0.0), 0)
    others = tl.reshape(sums, (MIX.tokens, MIX.experts))  # exponentials without the target's
    reference = tl.load(reference_ptr + row, mask=mask, other=0.0)
    target, valid = valid_targets(targets, token, n_tokens)
    target_logit = tl.load(exponentials.target_logit_ptr + row, mask=mask, other=0.0)
    target_logit = tl.where(valid[:, None], target_logit, float("-inf"))
    # the rounded reference of the exponents in a, and its exact rounding error
    reference2 = reference * LOG2E
    is_large = tl.abs(reference) > LARGEST_REFERENCE  # then the reference was subtracted before the multiplication
    lost = tl.where(is_large, 0.0, tl.fma(reference, LOG2E, -reference2))
    target2 = tl.where(is_large, (target_logit - reference) * LOG2E, tl.fma(target_logit, LOG2E, -reference2))
    total = others + tl.exp2(target2)
    log_total2 = tl.log2(total)
    tl.store(log_total_ptr + row, (log_total2 - lost) * LN2, mask=mask)

    log_prior = log_prior_of(targets.prior_logits_ptr, row, mask)
    log_likelihood, responsibility = mixed(tl.where(mask, log_prior + (target2 - log_total2) * LN2, float("-inf")))
    tl.store(exponentials.target_logit_ptr + row, 0.0, mask=mask & ~valid[:, None])
    tl.store(nll_ptr + token, tl.where(valid, -log_likelihood, 0.0), mask=token < n_tokens)
    responsibility = tl.where(valid[:, None], responsibility, 0.0)
    tl.store(out.responsibility_ptr + row, responsibility, mask=mask)
    if weighted is not None:
        # dl = A p − B 1[v = target] with B = c r and A = B + C; its entry at the target is f·(total·C/A − others)
        log_sum_exp = reference + (log_total2 - lost) * LN2
        c, grad_prior, other_weight = weighted_losses(
            weighted, token, mask, n_tokens, valid, -log_likelihood, log_prior, log_sum_exp
        )
        target_weight = tl.where(c != 0, c * responsibility, 0.0)
        row_weight = target_weight + other_weight
        # bound |A| from below by 2⁻²⁰ B, so that C/A fits 16 bits where B and C nearly cancel
        least = tl.abs(target_weight) * SMALLEST_WEIGHT
        clipped = tl.where(row_weight < 0, -least, least)
        row_weight = tl.where(tl.abs(row_weight) < least, clipped, row_weight)
        factor = tl.where(row_weight != 0, row_weight / total, 0.0)
    else:
        factor = tl.where(responsibility != 0, responsibility / total, 0.0)
    tl.store(out.factor_ptr + row, factor, mask=mask)
    if out.grad_prior_ptr is not None:
        if weighted is not None:
            grad_prior += tl.where(c != 0, c * tl.exp(log_prior), 0.0) - target_weight
        else:
            grad_prior = tl.where(valid[:, None], tl.exp(log_prior) - responsibility, 0.0)
        tl.store(out.grad_prior_ptr + row, grad_prior.to(out.grad_prior_ptr.dtype.element_ty), mask=mask)
    place = exponentials.a_ptr + row.to(tl.int64) * exponentials.n_columns + target[:, None]
    is_class = (target >= 0) & (target < n_classes)
    entry = -others
    if weighted is not None:
        entry += tl.where(other_weight != 0, total * (other_weight / row_weight), 0.0)
    entry = times_derivative(entry, target_logit, scales)
    store_parts(place, entry, exponentials.plane, mask=mask & is_class[:, None])
    if out.rows_ptr is not None:
        flat_factor = tl.reshape(factor, (MIX.tokens * MIX.experts,))
        scale_rows(
            z_ptr, flat, there_row, there_row, flat_factor, out.rows_ptr, STRIDE, D, WIDTH, COLUMNS, MIX.features, False
        )


@triton.jit(do_not_specialize=["n_tokens"])
def row_weights_kernel(
    grad_ptr,  # (N,)
    statistics,  # Statistics of R rows
    targets,  # Targets
    weight_ptr,  # (R,) out
    responsibility_ptr,  # (R,) out
    grad_prior_ptr,  # (N, K) out, or None
    n_tokens,
    MIX: tl.constexpr,
):
    """Write each row's weight g·r in dl, and da = g (π − r)."""
    token, row, mask = token_rows(n_tokens, MIX=MIX)
    maximum = tl.load(statistics.maximum_ptr + row, mask=mask, other=0.0)
    log_total = tl.load(statistics.log_total_ptr + row, mask=mask, other=0.0)
    target_logit = tl.load(statistics.target_logit_ptr + row, mask=mask, other=0.0)
    log_prior = log_prior_of(targets.prior_logits_ptr, row, mask)
    joint = log_prior + ((target_logit - maximum) - log_total)
    _, responsibility = mixed(tl.where(mask, joint, float("-inf")))
    _, valid = valid_targets(targets, token, n_tokens)
    grad = tl.load(grad_ptr + token, mask=token < n_tokens, other=0.0).to(tl.float32)
    grad = tl.where(valid, grad, 0.0)[:, None]
    # an ignored token has weight 0 even if its statistics are not finite
    weight = tl.where(grad != 0, grad * responsibility, 0.0)
    tl.store(weight_ptr + row, weight, mask=mask)
    tl.store(responsibility_ptr + row, responsibility, mask=mask)
    if grad_prior_ptr is not None:
        grad_prior = tl.exp(log_prior) * grad - weight
        tl.store(grad_prior_ptr + row, grad_prior.to(grad_prior_ptr.dtype.element_ty), mask=mask)
