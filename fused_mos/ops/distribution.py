"""The distribution: its normalisers, its log-probabilities, its most probable classes, and samples of it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from .. import _backends
from .._backends.reference import log_softmax_prior
from .._inputs import check_temperature
from . import checks
from .autograd import as_gradients, empty_gradients, empty_statistics, refuse_double_backward

# ------------------------------------------------------------------------------------------------------------ logsumexp


@custom_op("fused_mos::logsumexp", mutates_args=())
def logsumexp(latent: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """L[n,k] = log Σ_v exp l[n,k,v]: (N, K, D), (V, D), (V,) -> (N, K), and its two terms maximum and log_total."""
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    n, k, d = latent.shape
    maximum, log_total, _ = _backends.kernels(backend).row_statistics(latent.view(n * k, d), weight, bias, None)
    return (maximum + log_total).view(n, k), maximum.view(n, k), log_total.view(n, k)


@logsumexp.register_fake
def _(latent, weight, bias, backend):
    return tuple(empty_statistics(latent, 3))


@custom_op("fused_mos::logsumexp_backward", mutates_args=())
def logsumexp_backward(
    grad: Tensor,  # (N, K)
    latent: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    n, k, d = latent.shape
    given = {"grad": grad, "maximum": maximum, "log_total": log_total}
    grad, maximum, log_total = (t.view(-1) for t in checks.numbers(latent, (n, k), **given))
    needs = checks.needed(needs, 3, bias)
    grad_rows, grad_weight, grad_bias = _backends.kernels(backend).rows_backward(
        latent.view(n * k, d), weight, bias, None, maximum, log_total, grad, None, needs
    )
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_weight, grad_bias


@logsumexp_backward.register_fake
def _(grad, latent, weight, bias, maximum, log_total, needs, backend):
    return empty_gradients((latent, weight, bias), needs)


def _logsumexp_setup(ctx, inputs, output):
    latent, weight, bias, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(latent, weight, bias, *output[1:])


def _logsumexp_backward(ctx, grad, *_):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:3])
    gradients = logsumexp_backward(grad.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
    return *as_gradients(gradients, needs), None


logsumexp.register_autograd(_logsumexp_backward, setup_context=_logsumexp_setup)


# ---------------------------------------------------------------------------------------------------------- normalisers


@custom_op("fused_mos::normalisers", mutates_args=())
def normalisers(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """log π and the terms maximum and log_total of each expert's log Σ_v exp l, (N, K) each; not differentiable."""
    return _backends.kernels(backend).normalisers(*checks.operands(latent, prior_logits, weight, bias, backend))


@normalisers.register_fake
def _(latent, prior_logits, weight, bias, backend):
    return tuple(empty_statistics(latent, 3))


# ------------------------------------------------------------------------------------------------------------- log_prob


@custom_op("fused_mos::log_prob", mutates_args=())
def log_prob(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """log p (N, V), and maximum and log_total (N, K) for the backward pass."""
    kernels = _backends.kernels(backend)
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    log_prior, maximum, log_total = kernels.normalisers(latent, prior_logits, weight, bias)
    return kernels.log_prob(latent, log_prior, weight, bias, maximum, log_total), maximum, log_total


@log_prob.register_fake
def _(latent, prior_logits, weight, bias, backend):
    statistics = empty_statistics(latent, 2)
    return statistics[0].new_empty(latent.shape[0], weight.shape[0]), *statistics


@custom_op("fused_mos::log_prob_backward", mutates_args=())
def log_prob_backward(
    grad: Tensor,  # (N, V)
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    (grad,) = checks.numbers(latent, (latent.shape[0], weight.shape[0]), grad=grad)
    maximum, log_total = checks.numbers(latent, latent.shape[:2], maximum=maximum, log_total=log_total)
    log_prior = log_softmax_prior(prior_logits).to(maximum.dtype)
    grad_latent, grad_prior, grad_weight, grad_bias = _backends.kernels(backend).log_prob_backward(
        grad, latent, log_prior, weight, bias, maximum, log_total, checks.needed(needs, 4, bias)
    )
    return grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


@log_prob_backward.register_fake
def _(grad, latent, prior_logits, weight, bias, maximum, log_total, needs, backend):
    return empty_gradients((latent, prior_logits, weight, bias), needs)


def _log_prob_setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, ctx.backend = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(latent, prior_logits, weight, bias, *statistics)


def _log_prob_backward(ctx, grad, *_):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:4])
    gradients = log_prob_backward(grad.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
    return *as_gradients(gradients, needs), None


log_prob.register_autograd(_log_prob_backward, setup_context=_log_prob_setup)


# ------------------------------------------------------------------------------------------------ given the normalisers


def _given(
    latent: Tensor,
    log_prior: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    statistics = {"log_prior": log_prior, "maximum": maximum, "log_total": log_total}
    log_prior, maximum, log_total = checks.numbers(latent, latent.shape[:2], **statistics)
    return latent, log_prior, weight, bias, maximum, log_total


@custom_op("fused_mos::mixture_log_prob", mutates_args=())
def mixture_log_prob(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D): all classes, or some
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K), of all classes
    log_total: Tensor,  # (N, K), of all classes
    backend: str,
) -> Tensor:
    """log p of the classes in `weight`, (N, V); not differentiable."""
    given = _given(latent, log_prior, weight, bias, maximum, log_total, backend)
    return _backends.kernels(backend).log_prob(*given)


@mixture_log_prob.register_fake
def _(latent, log_prior, weight, bias, maximum, log_total, backend):
    return maximum.new_empty(latent.shape[0], weight.shape[0])


@custom_op("fused_mos::predict", mutates_args=())
def predict(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    backend: str,
) -> Tensor:
    """The most probable class, (N,) int64."""
    given = _given(latent, log_prior, weight, bias, maximum, log_total, backend)
    return _backends.kernels(backend).predict(*given)


@predict.register_fake
def _(latent, log_prior, weight, bias, maximum, log_total, backend):
    return latent.new_empty(latent.shape[0], dtype=torch.int64)


TOPK_BYTES = 32 * 2**20
"""Bytes of the log-probabilities that `topk` holds at once."""


@custom_op("fused_mos::topk", mutates_args=())
def topk(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D): all classes, or some
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K), of all classes
    log_total: Tensor,  # (N, K), of all classes
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The k most probable of the classes in `weight`, all of them where they are fewer: their log-probabilities,
    descending, and the classes, (N, ≤ k) each. They are selected from spans of the vocabulary."""
    given = _given(latent, log_prior, weight, bias, maximum, log_total, backend)
    latent, log_prior, weight, bias, maximum, log_total = given
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    n, n_classes = latent.shape[0], weight.shape[0]
    values, indices = maximum.new_empty(n, 0), torch.empty(n, 0, dtype=torch.int64, device=latent.device)
    columns = max(TOPK_BYTES // (maximum.itemsize * max(n, 1)), 2 * k, 256)
    for start in range(0, n_classes, columns):
        span = slice(start, start + columns)
        log_p = _backends.kernels(backend).log_prob(
            latent, log_prior, weight[span], bias if bias is None else bias[span], maximum, log_total
        )
        candidates = log_p.topk(min(k, log_p.shape[1]))
        candidates_of_all = torch.cat([indices, candidates.indices + start], 1)
        values = torch.cat([values, candidates.values], 1)
        values, chosen = values.topk(min(k, values.shape[1]))
        indices = candidates_of_all.gather(1, chosen)
    return values, indices


@topk.register_fake
def _(latent, log_prior, weight, bias, maximum, log_total, k, backend):
    shape = latent.shape[0], min(k, weight.shape[0])
    return maximum.new_empty(shape), maximum.new_empty(shape, dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------------- samples


@custom_op("fused_mos::sample", mutates_args=())
def sample(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    temperature: float,
    seed: Tensor,  # (1,) int64
    backend: str,
) -> Tensor:
    """A class of an expert, which is drawn from the prior, for each token, (N,) int64; −1 where none can be drawn."""
    kernels = _backends.kernels(backend)
    temperature = check_temperature(temperature)
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    seed = checks.seeds(seed, latent)
    transform = _backends.Transform(temperature=temperature)
    return kernels.sample(kernels.choose_rows(latent, prior_logits, seed), weight, bias, transform, seed)


@sample.register_fake
def _(latent, prior_logits, weight, bias, temperature, seed, backend):
    return latent.new_empty(latent.shape[0], dtype=torch.int64)


# --------------------------------------------------------------------------- statistics of rows, for parts of a softmax


@custom_op("fused_mos::row_statistics", mutates_args=())
def row_statistics(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (N,) int64
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """maximum, log_total and target logit of each row, (N, K); NaN where the target is no class, or there is none."""
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    n, k, d = latent.shape
    row_target = None if target is None else checks.targets(target, latent).repeat_interleave(k)
    found = _backends.kernels(backend).row_statistics(latent.view(n * k, d), weight, bias, row_target)
    return tuple(statistic.view(n, k) for statistic in found)


@row_statistics.register_fake
def _(latent, weight, bias, target, backend):
    return tuple(empty_statistics(latent, 3))
