"""The mixture's own distribution in plain torch: log-probabilities, sums over them, and the gradients of both.

As in `tiled`, everything is a loop over tiles of the vocabulary. A tile here holds whole tokens with all their experts.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .sums import Sum
from .tiled_products import (
    Workspace,
    add_gradients,
    cast_gradients,
    exp_,
    logits_,
    tiles,
    times_slope_,
    widened,
    zero_gradients,
)
from .transform import IDENTITY, Transform


class Tile(NamedTuple):
    """A tile of n tokens and a span of classes. Its tensors may be modified in place."""

    tokens: slice
    columns: slice
    log_p: Tensor  # (n, columns)
    posterior: Tensor  # (n, K, columns): q = π exp(l − L) / p; empty if not requested
    softmax: Tensor  # (n, K, columns): exp(l − L); empty if not requested
    slope: Tensor | float  # (n·K, columns): the derivative of the transform


class Experts(NamedTuple):
    """A mixture with its normalisers, the operands of `Kernels.log_prob`."""

    latent: Tensor  # (N, K, D)
    log_prior: Tensor  # (N, K)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    maximum: Tensor  # (N, K)
    log_total: Tensor  # (N, K)
    transform: Transform

    def tiles(self, with_posterior: bool = True, with_softmax: bool = False) -> Iterator[Tile]:
        """Iterate over all tiles, with one product each. q is a softmax over the experts, so it sums to 1 however large
        the logits are."""
        n, k, d = self.latent.shape
        latent, weight, bias = widened(self.latent, self.weight, self.bias)
        workspace = Workspace(latent, copies=1 + with_softmax * (2 if self.transform.softcap else 1))
        log_scale = self.log_prior - self.log_total
        for rows, c in tiles(workspace, n * k, weight.shape[0], group=k):
            tokens = slice(rows.start // k, rows.stop // k)
            out = workspace.tile(rows.stop - rows.start, c.stop - c.start)
            z, of_columns = latent.view(n * k, d)[rows], None if bias is None else bias[c]
            logits, slope = logits_(z, weight[c], of_columns, out, self.transform, slopes=with_softmax)
            below = logits.view(-1, k, c.stop - c.start).sub_(self.maximum[tokens, :, None])
            softmax = below.new_empty(0)
            if with_softmax:
                softmax = exp_(below.clone(), self.log_total[tokens, :, None])
            joint = below.add_(log_scale[tokens, :, None])
            # all exponents are ≤ 0; subtracting the largest keeps the sum over experts from underflowing
            largest = joint.amax(1).clamp_min_(torch.finfo(joint.dtype).min)
            terms = exp_(joint, largest[:, None])
            total = terms.sum(1)
            log_p = total.log().add_(largest)
            # the largest term is 1, so the sum is ≥ 1, except for a masked class, where all terms are 0
            posterior = terms.div_(total.clamp_min_(1)[:, None]) if with_posterior else terms.new_empty(0)
            yield Tile(tokens, c, log_p, posterior, softmax, slope)

    def gradients(
        self,
        grad_log_p: Callable[[Tile], Tensor],  # -> (n, columns): G
        s: Tensor,  # (N, K): Σ_v G q
        grad_lse: Tensor | None,  # (N, K)
        needs: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of (latent, prior_logits, weight, bias), in three products: dl = G q − (s − g_L) exp(l − L) and
        da = s − π Σ_k s."""
        (n, k, d), dtype = self.latent.shape, self.latent.dtype
        latent, weight, _ = widened(self.latent, self.weight, self.bias)
        rows, product_needs = latent.view(n * k, d), (needs[0], needs[2], needs[3])
        sums = zero_gradients(rows, weight, product_needs, s.dtype)
        of_softmax = s if grad_lse is None else s - grad_lse
        for tile in self.tiles(with_softmax=True) if any(product_needs) else ():
            weighted = tile.softmax.mul_(of_softmax[tile.tokens, :, None])
            dl = tile.posterior.mul_(grad_log_p(tile)[:, None]).sub_(weighted).view(-1, tile.log_p.shape[1])
            times_slope_(dl, tile.slope)
            r = slice(tile.tokens.start * k, tile.tokens.stop * k)
            add_gradients(dl, rows[r], weight, tile.columns, (sums[0][r], *sums[1:]), product_needs)
        grad_prior = s - self.log_prior.exp() * s.sum(-1, keepdim=True) if needs[1] else s.new_empty(0)
        grad_rows, grad_weight, grad_bias = cast_gradients(sums, dtype)
        return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


def log_prob(
    latent: Tensor,
    log_prior: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    transform: Transform = IDENTITY,
) -> Tensor:
    result = maximum.new_empty(latent.shape[0], weight.shape[0])
    for tile in Experts(latent, log_prior, weight, bias, maximum, log_total, transform).tiles(with_posterior=False):
        result[tile.tokens, tile.columns] = tile.log_p
    return result


def predict(
    latent: Tensor,
    log_prior: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    transform: Transform = IDENTITY,
) -> Tensor:
    best = _Best(maximum)
    for tile in Experts(latent, log_prior, weight, bias, maximum, log_total, transform).tiles(with_posterior=False):
        best.update(tile)
    return best.index


class _Best:
    def __init__(self, like: Tensor):  # (N, …)
        self.value = like.new_full(like.shape[:1], -math.inf)
        self.index = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)

    def update(self, tile: Tile) -> None:
        value, column = tile.log_p.max(dim=1)
        better = value > self.value[tile.tokens]  # not ≥: the first of equal values wins, as in torch.argmax
        self.index[tile.tokens] = torch.where(better, column + tile.columns.start, self.index[tile.tokens])
        self.value[tile.tokens] = torch.where(better, value, self.value[tile.tokens])


def log_prob_backward(
    grad: Tensor,  # (N, V)
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    needs: tuple[bool, bool, bool, bool],
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in two sweeps: the first finds s[n,k] = Σ_v G q, the second forms dl = G q − s·exp(l − L)."""
    experts = Experts(latent, log_prior, weight, bias, maximum, log_total, transform)
    s = torch.zeros_like(maximum)
    for tile in experts.tiles():
        s[tile.tokens] += tile.posterior.mul_(grad[tile.tokens, tile.columns][:, None]).sum(-1)
    return experts.gradients(lambda tile: grad[tile.tokens, tile.columns], s, None, needs)


def mixture_sum(
    sum_: Sum,
    latent: Tensor,
    log_prior: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum in one sweep. "tempered" is summed relative to a running maximum of the exponents."""
    best, value, s = _Best(maximum), torch.zeros_like(maximum[:, 0]), torch.zeros_like(maximum)
    peak = torch.full_like(value, torch.finfo(value.dtype).min)
    for tile in Experts(latent, log_prior, weight, bias, maximum, log_total, transform).tiles():
        t = tile.tokens
        best.update(tile)
        if sum_.kind == "tempered":
            exponent = tile.log_p / sum_.temperature
            new_peak = torch.maximum(peak[t], exponent.amax(1))
            rescale = torch.exp(peak[t] - new_peak)
            terms = exp_(exponent, new_peak[:, None])
            value[t] = value[t] * rescale + terms.sum(1)
            s[t] = s[t] * rescale[:, None] + tile.posterior.mul_(terms[:, None]).sum(-1)
            peak[t] = new_peak
        else:
            terms, of_posterior = sum_.terms(tile.log_p, tile.columns)
            value[t] += terms.sum(1)
            s[t] += tile.posterior.mul_(of_posterior[:, None]).sum(-1)
    if sum_.kind == "tempered":  # over a part of the vocabulary it may be log 0
        s = torch.where(value[:, None] != 0, s / (value * sum_.temperature)[:, None], 0)
        value = peak + value.log()
    return value, s, best.index, best.value


def mixture_sum_backward(
    sum_: Sum,
    grad: Tensor,  # (N,), gradient of the sum
    grad_target: Tensor,  # (N,), gradient of log p[target]
    target: Tensor,  # (N,) int64
    s: Tensor,  # (N, K)
    grad_lse: Tensor,  # (N, K)
    latent: Tensor,
    log_prior: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    needs: tuple[bool, bool, bool, bool],
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def grad_log_p(tile: Tile) -> Tensor:
        t, c = tile.tokens, tile.columns
        result = sum_.derivative(tile.log_p, c, t) * grad[t, None]
        local = target[t, None] - c.start
        inside = (local >= 0) & (local < c.stop - c.start)
        return result.scatter_add_(1, torch.where(inside, local, 0), torch.where(inside, grad_target[t, None], 0))

    experts = Experts(latent, log_prior, weight, bias, maximum, log_total, transform)
    return experts.gradients(grad_log_p, s, grad_lse, needs)
