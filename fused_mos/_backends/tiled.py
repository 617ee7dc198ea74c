"""The portable fused backend: plain torch on any device, in one loop over tiles of the vocabulary.

Each tile takes one product, in-place operations on the result and, in the backward passes, two more products. Tiles
live in a workspace of fixed size, so extra memory does not grow with N·K·V.

exp is computed as exp2((l − max)·log2 e), since torch's exp is several times slower than its exp2 on CPUs.
"""

import math

import torch
from torch import Tensor

from . import from_rows
from .from_rows import choose_rows, gradients_of_weighted  # noqa: F401  (unused ones are part of `Kernels`)
from .products import spans
from .random_numbers import Exponentials
from .reference import log_softmax_prior, mix_target
from .row_filter import kept_rows
from .tiled_mixture import log_prob, log_prob_backward, mixture_sum, mixture_sum_backward, predict  # noqa: F401
from .tiled_products import (
    Workspace,
    add_gradients,
    cast_gradients,
    exp_,
    local_target,
    logits_,
    tiles,
    times_slope_,
    widened,
    zero_gradients,
)
from .transform import IDENTITY, Transform

MIN_GRADIENT_ROWS = 128
"""Fewest rows of a block of tokens to form gradients in the forward pass: each block reads and writes the whole weight
gradient, 8·V·D bytes for 2·rows·V·D FLOP, so fewer rows are memory-bound."""


def row_statistics(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:
    return _row_statistics(rows, weight, bias, target, transform, with_entropy=False)[:3]


def row_entropy(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _row_statistics(rows, weight, bias, target, transform, with_entropy=True)


def _row_statistics(
    rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, transform: Transform, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """maximum, log_total, target logit and entropy of each row. The entropy is log_total − Σ_v p_v (l_v − maximum),
    which stays accurate for a large maximum."""
    rows, weight, bias = widened(rows, weight, bias)
    workspace = Workspace(rows, copies=2 if with_entropy else 1)
    n, n_classes = rows.shape[0], weight.shape[0]
    # the running maximum starts finite, so a logit of −inf gives exp(−inf), never inf − inf
    maximum = rows.new_full((n, 1), torch.finfo(workspace.accumulation).min, dtype=workspace.accumulation)
    total, below = torch.zeros_like(maximum), torch.zeros_like(maximum)  # Σ e and Σ e (l − maximum)
    target_logit = torch.full_like(maximum, math.nan)
    for r, c in tiles(workspace, n, n_classes):
        out = workspace.tile(r.stop - r.start, c.stop - c.start)
        tile, _ = logits_(rows[r], weight[c], None if bias is None else bias[c], out, transform)
        if target is not None:
            local, inside = local_target(target[r], c)
            target_logit[r] = torch.where(inside, tile.gather(1, local), target_logit[r])
        new_maximum = torch.maximum(maximum[r], tile.amax(1, keepdim=True))
        shift = maximum[r] - new_maximum
        rescale = torch.exp(shift)
        exponents = tile - new_maximum if with_entropy else tile
        terms = exp_(tile, new_maximum)
        if with_entropy:
            shifted = torch.where(total[r] != 0, total[r] * shift, 0)
            of_tile = torch.where(terms != 0, terms * exponents, 0).sum(1, keepdim=True)
            below[r] = (below[r] + shifted) * rescale + of_tile
        total[r] = total[r] * rescale + terms.sum(1, keepdim=True)
        maximum[r] = new_maximum
    entropy = total.log() - below / total
    return maximum.squeeze(1), total.log_().squeeze(1), target_logit.squeeze(1), entropy.squeeze(1)


def rows_backward(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    maximum: Tensor,  # (R,)
    log_total: Tensor,  # (R,)
    grad_lse: Tensor,  # (R,)
    grad_target: Tensor | None,  # (R,)
    needs: tuple[bool, bool, bool],
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = rows.dtype
    rows, weight, bias = widened(rows, weight, bias)
    workspace = Workspace(rows, copies=2 if transform.softcap else 1)
    accumulation = workspace.accumulation
    grad_rows, grad_weight, grad_bias = zero_gradients(rows, weight, needs, accumulation)
    for r, c in tiles(workspace, rows.shape[0], weight.shape[0]):
        out = workspace.tile(r.stop - r.start, c.stop - c.start)
        tile, slope = logits_(rows[r], weight[c], None if bias is None else bias[c], out, transform, slopes=True)
        exp_(tile, maximum[r, None], log_total[r, None]).mul_(grad_lse[r, None])
        if target is not None and grad_target is not None:
            local, inside = local_target(target[r], c)
            tile.scatter_add_(1, local, torch.where(inside, -grad_target[r, None], 0))
        times_slope_(tile, slope)
        add_gradients(tile, rows[r], weight, c, (grad_rows[r] if needs[0] else None, grad_weight, grad_bias), needs)
    return cast_gradients((grad_rows, grad_weight, grad_bias), dtype)


def gradient_in_forward_pays(n_tokens: int, n_experts: int, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.dtype == torch.float16:  # gradients would round to 0 before the loss scale enlarges them
        return False
    block = Workspace(weight).elements // (n_experts * weight.shape[0])
    return min(block, n_tokens) * n_experts >= min(MIN_GRADIENT_ROWS, n_tokens * n_experts) > 0


def _blocks_with_gradients(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    valid: Tensor,  # (N,) bool
    scale: Tensor,  # ()
    filter_eps: float,
    needs: tuple[bool, bool, bool, bool],
    transform: Transform,
    loss_weights: Tensor | None,  # (3, N)
) -> tuple[Tensor, ...]:
    """nll, statistics and gradients in three products instead of four. The workspace keeps whole rows of a block's
    exponentiated logits until the responsibilities are known, and the gradients are formed from those."""
    n, k, d = latent.shape
    n_classes = weight.shape[0]
    dtype = latent.dtype
    latent, weight, bias = widened(latent, weight, bias)
    workspace = Workspace(latent, copies=2 if transform.softcap else 1)
    accumulation = workspace.accumulation
    block = max(workspace.elements // (k * n_classes), 1)
    product_needs = (needs[0], needs[2], needs[3])
    grad_rows, grad_weight, grad_bias = zero_gradients(latent.view(n * k, d), weight, product_needs, accumulation)
    maximum = latent.new_empty(n, k, dtype=accumulation)
    log_total, target_logit = torch.empty_like(maximum), torch.empty_like(maximum)
    nll = maximum.new_empty(n)
    log_prior = log_softmax_prior(prior_logits).to(accumulation)
    grad_prior = torch.empty_like(log_prior) if needs[1] else log_prior.new_empty(0)
    for t in spans(n, block):
        rows = slice(t.start * k, t.stop * k)
        z = latent.view(n * k, d)[rows]
        out = workspace.tile(rows.stop - rows.start, n_classes)
        tile, slope = logits_(z, weight, bias, out, transform, slopes=True)
        local, inside = local_target(target[t].repeat_interleave(k), slice(0, n_classes))
        target_logit[t] = torch.where(inside, tile.gather(1, local), math.nan).view(-1, k)
        row_maximum = tile.amax(1, keepdim=True).clamp_min(torch.finfo(accumulation).min)
        total = exp_(tile, row_maximum).sum(1, keepdim=True)
        maximum[t], log_total[t] = row_maximum.view(-1, k), total.log().view(-1, k)
        nll[t], responsibility = mix_target(log_prior[t], maximum[t], log_total[t], target_logit[t])
        responsibility = torch.where(valid[t, None], responsibility, 0)
        if loss_weights is None:
            of_lse = of_target = torch.where(responsibility != 0, responsibility * scale, 0).view(-1, 1)
            gradient = torch.where(valid[t, None], log_prior[t].exp() - responsibility, 0) * scale
            kept = kept_rows(responsibility.view(-1), responsibility.view(-1), filter_eps)
        else:
            parts = loss_weights[:, t], log_prior[t].exp(), maximum[t] + log_total[t], responsibility
            of_lse, of_target, gradient = gradients_of_weighted(*parts)
            of_lse, of_target = of_lse.view(-1, 1), of_target.view(-1, 1)
            row_weight = (of_lse.abs() + of_target.abs()).view(-1)
            kept = kept_rows(torch.ones_like(row_weight), row_weight, 0)
        if needs[1]:
            grad_prior[t] = gradient
        tile.mul_(of_lse / total).scatter_add_(1, local, torch.where(inside, -of_target, 0))
        times_slope_(tile, slope)
        gradients = (grad_rows[rows] if needs[0] else None, grad_weight, grad_bias)
        if kept is None:
            add_gradients(tile, z, weight, slice(0, n_classes), gradients, product_needs)
        elif kept.numel():
            z_kept = z[kept]
            kept_gradient = torch.zeros_like(z_kept, dtype=accumulation)
            # copy the kept rows in slices, to stay small compared to the workspace
            for c in spans(n_classes, max(n_classes // 8, 1)):
                add_gradients(
                    tile[:, c][kept], z_kept, weight, c, (kept_gradient, grad_weight, grad_bias), product_needs
                )
            if needs[0]:
                grad_rows[rows][kept] = kept_gradient
    grad_rows, grad_weight, grad_bias = cast_gradients((grad_rows, grad_weight, grad_bias), dtype)
    grad_latent = grad_rows.view(n, k, d) if needs[0] else grad_rows
    return nll, maximum, log_total, target_logit, grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


def nll(*inputs):
    return from_rows.nll(row_statistics, *inputs)


def nll_backward(*inputs):
    return from_rows.nll_backward(rows_backward, *inputs)


def nll_with_gradients(*inputs):
    return from_rows.nll_with_gradients(_blocks_with_gradients, *inputs)


def normalisers(*inputs):
    return from_rows.normalisers(row_statistics, *inputs)


def sample(rows: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, seed: Tensor) -> Tensor:
    """Draw by Gumbel-max, argmax_v (l − log(−log u)), keeping the best class so far over the tiles."""
    exponentials = Exponentials(seed, "classes")
    rows, weight, bias = widened(rows, weight, bias)
    workspace = Workspace(rows, copies=1 + exponentials.n_copies)
    best = rows.new_full((rows.shape[0],), -math.inf, dtype=workspace.accumulation)
    index = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    for r, c in tiles(workspace, rows.shape[0], weight.shape[0]):
        out = workspace.tile(r.stop - r.start, c.stop - c.start)
        tile, _ = logits_(rows[r], weight[c], None if bias is None else bias[c], out, transform)
        noise = exponentials.like(tile, r.start, c.start).log_()  # minus a Gumbel variate
        value, column = tile.sub_(noise).max(dim=1)
        better = value > best[r]
        index[r] = torch.where(better, column + c.start, index[r])
        best[r] = torch.where(better, value, best[r])
    return torch.where(best > -math.inf, index, -1)
