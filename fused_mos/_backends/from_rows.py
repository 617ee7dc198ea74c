"""The mixture's functions of `Kernels` in plain torch, built on a backend's functions of single rows.

`tiled` and `cpu` use them. A backend whose device would wait for the launches of many small operations has its own.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .random_numbers import Exponentials
from .reference import accumulation_dtype, log_softmax_prior, mix_target
from .row_filter import backward_of_kept, kept_rows
from .tracing import has_memory
from .transform import IDENTITY, Transform


def nll(
    row_statistics: Callable[..., tuple[Tensor, Tensor, Tensor]],
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    ignore_index: int,
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k, d = latent.shape
    valid, target = _valid_target(target, ignore_index)
    row_target = target.repeat_interleave(k)
    maximum, log_total, target_logit = (
        statistic.view(n, k) for statistic in row_statistics(latent.view(n * k, d), weight, bias, row_target, transform)
    )
    losses, _ = mix_target(log_softmax_prior(prior_logits).to(maximum.dtype), maximum, log_total, target_logit)
    return torch.where(valid, losses, 0), maximum, log_total, target_logit


def nll_backward(
    rows_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad: Tensor,  # (N,)
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    target_logit: Tensor,  # (N, K)
    ignore_index: int,
    filter_eps: float,
    needs: Sequence[bool],
    transform: Transform = IDENTITY,
    grad_lse: Tensor | None = None,  # (N, K)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dl = (g r + g_L) exp(l − L) − g r 1[v = y] and da = g (π − r). With `grad_lse` no rows are filtered."""
    n, k, d = latent.shape
    valid, target = _valid_target(target, ignore_index)
    log_prior = log_softmax_prior(prior_logits).to(maximum.dtype)
    _, responsibility = mix_target(log_prior, maximum, log_total, target_logit)
    grad = torch.where(valid, grad.to(maximum.dtype), 0)[:, None]
    # an ignored token has weight 0 even if its statistics are not finite
    row_weight = torch.where(grad != 0, grad * responsibility, 0)
    grad_prior = (log_prior.exp() * grad - row_weight).to(prior_logits.dtype) if needs[1] else prior_logits.new_empty(0)

    product_needs = (needs[0], needs[2], needs[3])
    if not any(product_needs):
        return latent.new_empty(0), grad_prior, latent.new_empty(0), latent.new_empty(0)
    row_weight = row_weight.view(-1)
    rows, row_target = latent.view(n * k, d), target.repeat_interleave(k)
    if grad_lse is None:
        of_lse, kept = row_weight, kept_rows(responsibility.view(-1), row_weight, filter_eps)
    else:
        of_lse = row_weight + grad_lse.view(-1)
        kept = kept_rows(torch.ones_like(of_lse), of_lse.abs() + row_weight.abs(), 0)
    per_row = row_target, maximum.view(-1), log_total.view(-1), of_lse, row_weight
    of_rows = partial(rows_backward, transform=transform)
    if kept is None:
        grad_rows, *others = of_rows(rows, weight, bias, *per_row, product_needs)
    else:
        grad_rows, *others = backward_of_kept(of_rows, kept, rows, weight, bias, per_row, product_needs)
    grad_weight, grad_bias = others
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


def nll_with_gradients(
    blocks_with_gradients: Callable[..., tuple[Tensor, ...]],
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    ignore_index: int,
    filter_eps: float,
    mean: bool,
    needs: Sequence[bool],
    transform: Transform = IDENTITY,
    loss_weights: Tensor | None = None,  # (3, N)
) -> tuple[Tensor, ...]:
    """`Kernels.nll_with_gradients` on top of a backend's loop over blocks of tokens.

    Args:
        blocks_with_gradients: (latent, prior_logits, weight, bias, target, valid, scale, filter_eps, needs, transform,
            loss_weights) -> nll (N,), statistics (N, K), and the gradients of scale·nll[valid].sum() or, with loss
            weights, of the sum of `weighted`.
    """
    valid, target = _valid_target(target, ignore_index)
    one = torch.ones((), dtype=accumulation_dtype(latent.dtype), device=latent.device)
    count = valid.sum().to(one.dtype) if mean else one
    # as in F.cross_entropy, a mean over nothing is NaN and its gradients are 0
    scale = 1 / count.clamp_min(1)
    losses, maximum, log_total, *rest = blocks_with_gradients(
        latent, prior_logits, weight, bias, target, valid, scale, filter_eps, tuple(needs), transform, loss_weights
    )
    losses = torch.where(valid, losses, 0)
    if loss_weights is None:
        loss = losses.sum() * (1 / count)
    else:
        loss = weighted(losses, maximum + log_total, log_softmax_prior(prior_logits), loss_weights).sum()
    return loss, one, losses, maximum, log_total, *rest


def weighted(
    nll: Tensor,  # (N,)
    lse: Tensor,  # (N, K)
    log_prior: Tensor,  # (N, K)
    loss_weights: Tensor,  # (3, N): c, λ and ζ
) -> Tensor:  # (N,)
    """c·nll + λ Σ_k π_k L_k + ζ Σ_k π_k L_k². A term of weight 0 is 0 even if its other factor is not finite."""
    prior = log_prior.exp().to(lse.dtype)
    terms = nll, (prior * lse).sum(1), (prior * lse.square()).sum(1)
    zero = nll.new_zeros(())
    return sum((torch.where(w != 0, w * term, 0) for w, term in zip(loss_weights, terms)), zero)


def gradients_of_weighted(
    loss_weights: Tensor,  # (3, N)
    prior: Tensor,  # (N, K): π
    lse: Tensor,  # (N, K)
    responsibility: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor, Tensor]:  # (N, K) each
    """A, B and da of the gradient of `weighted`: dl = A exp(l − L) − B 1[v = y] with A = c r + π (λ + 2ζL) and B = c r,
    and da = c (π − r) + π (f − Σ_k π f) with f = λL + ζL²."""
    c, linear, square = loss_weights[..., None]
    of_target = torch.where(c != 0, c * responsibility, 0)
    counted = (linear != 0) | (square != 0)
    of_lse = of_target + torch.where(counted, prior * (linear + 2 * square * lse), 0)
    f = torch.where(counted, linear * lse + square * lse.square(), 0)
    grad_prior = c * prior - of_target + prior * (f - (prior * f).sum(1, keepdim=True))
    return of_lse, of_target, grad_prior


def scaled(gradients: Sequence[Tensor], factor: Tensor, divisor: Tensor, backend: str) -> Sequence[Tensor]:
    """The gradients times the factor; the divisor is always 1 here.

    On a CPU, where reading the factor costs nothing, a factor of 1 (as in loss.backward()) returns the gradients
    themselves: copying the weight's gradient takes 2 % of the step. If the graph is retained they are copied, since its
    next backward pass would see the caller's changes. (Tensors of a traced graph are of a subclass and have no value.)
    """
    readable = type(factor) is Tensor and has_memory(factor) and factor.device.type == "cpu"
    if readable and factor == 1 and not torch._C._autograd._get_current_graph_task_keep_graph():
        return gradients
    return [(gradient * factor).to(gradient.dtype) for gradient in gradients]


def normalisers(
    row_statistics: Callable[..., tuple[Tensor, Tensor, Tensor]],
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:
    n, k, d = latent.shape
    maximum, log_total, _ = row_statistics(latent.view(n * k, d), weight, bias, None, transform)
    return log_softmax_prior(prior_logits).to(maximum.dtype), maximum.view(n, k), log_total.view(n, k)


def choose_rows(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    seed: Tensor,  # (1,)
) -> Tensor:  # (N, D)
    """Draw one expert per token by Gumbel-max and return its latent vector, NaN if no expert can be drawn.

    Unlike torch.multinomial, this has no device-side assertion.
    """
    log_prior = log_softmax_prior(prior_logits)
    noise = Exponentials(seed, "experts").like(log_prior).log_()  # minus a Gumbel variate
    best, expert = (log_prior - noise).max(1)
    rows = latent[torch.arange(latent.shape[0], device=latent.device), expert]
    return rows.masked_fill_(~best.isfinite()[:, None], torch.nan)


def _valid_target(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    valid = target != ignore_index
    return valid, torch.where(valid, target, 0)
