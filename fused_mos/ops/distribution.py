"""Ops over the mixture's distribution: normalisers, log-probabilities, most probable classes and samples."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from .. import _backends
from .._backends import Transform
from .._backends.products import spans
from .._backends.reference import accumulation_dtype, log_softmax_prior
from . import checks
from .autograd import as_gradients, empty_gradients, empty_statistics, fake_of, refuse_double_backward

# ---------------------------------------------------------------------------------------------------------- normalisers


@custom_op("fused_mos::normalisers", mutates_args=())
def normalisers(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log π, and the two terms maximum and log_total of each expert's log Σ_v exp l, (N, K) each. Not
    differentiable."""
    inputs, transform = (
        checks.operands(latent, prior_logits, weight, bias, backend),
        checks.transform(softcap, temperature),
    )
    return _backends.kernels(backend).normalisers(*inputs, transform)


@fake_of(normalisers)
def _(latent, prior_logits, weight, bias, backend, softcap=0.0, temperature=1.0):
    return tuple(empty_statistics(latent, 3))


# ------------------------------------------------------------------------------------------------------------- log_prob


@custom_op("fused_mos::log_prob", mutates_args=())
def log_prob(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p (N, V), and for the backward pass maximum and log_total (N, K)."""
    kernels, transform = _backends.kernels(backend), checks.transform(softcap, temperature)
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    if _backends.one_sweep_pays(backend, *latent.shape[:2], *weight.shape):
        return kernels.log_prob_and_normalisers(latent, prior_logits, weight, bias, transform)
    log_prior, maximum, log_total = kernels.normalisers(latent, prior_logits, weight, bias, transform)
    return kernels.log_prob(latent, log_prior, weight, bias, maximum, log_total, transform), maximum, log_total


@fake_of(log_prob)
def _(latent, prior_logits, weight, bias, backend, softcap=0.0, temperature=1.0):
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
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    (grad,) = checks.numbers(latent, (latent.shape[0], weight.shape[0]), grad=grad)
    maximum, log_total = checks.numbers(latent, latent.shape[:2], maximum=maximum, log_total=log_total)
    log_prior = log_softmax_prior(prior_logits).to(maximum.dtype)
    grad_latent, grad_prior, grad_weight, grad_bias = _backends.kernels(backend).log_prob_backward(
        grad,
        latent,
        log_prior,
        weight,
        bias,
        maximum,
        log_total,
        checks.needed(needs, 4, bias),
        checks.transform(softcap, temperature),
    )
    return grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


@fake_of(log_prob_backward)
def _(grad, latent, prior_logits, weight, bias, maximum, log_total, needs, backend, softcap=0.0, temperature=1.0):
    return empty_gradients((latent, prior_logits, weight, bias), needs)


def _log_prob_setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, *ctx.options = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(latent, prior_logits, weight, bias, *statistics)


def _log_prob_backward(ctx, grad, *_):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:4])
    gradients = log_prob_backward(grad.contiguous(), *ctx.saved_tensors, needs, *ctx.options)
    return *as_gradients(gradients, needs), None, None, None


log_prob.register_autograd(_log_prob_backward, setup_context=_log_prob_setup)


# ------------------------------------------------------------------------------------------------ given the normalisers


@custom_op("fused_mos::mixture_log_prob", mutates_args=())
def mixture_log_prob(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D): all classes, or some of them
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K), of all classes
    log_total: Tensor,  # (N, K), of all classes
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """log p of the classes in `weight`, (N, V). Not differentiable."""
    given = checks.given_normalisers(latent, log_prior, weight, bias, maximum, log_total, backend)
    return _backends.kernels(backend).log_prob(*given, checks.transform(softcap, temperature))


@fake_of(mixture_log_prob)
def _(latent, log_prior, weight, bias, maximum, log_total, backend, softcap=0.0, temperature=1.0):
    return maximum.new_empty(latent.shape[0], weight.shape[0])


TOPK_BYTES = 32 * 2**20
"""Most bytes of log-probabilities that `topk` holds at once."""


@custom_op("fused_mos::mixture_topk", mutates_args=())
def mixture_topk(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D): all classes, or some of them
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K), of all classes
    log_total: Tensor,  # (N, K), of all classes
    k: int,
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The k most probable of the classes in `weight`, or all if there are fewer: their log-probabilities, descending,
    and the classes, (N, ≤ k) each."""
    given = checks.given_normalisers(latent, log_prior, weight, bias, maximum, log_total, backend)
    return _topk_of_spans(*given, checks.count(k), backend, checks.transform(softcap, temperature))


def _topk_of_spans(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    k: int,
    backend: str,
    transform: Transform,
) -> tuple[Tensor, Tensor]:
    """Select the k best classes from one span of the vocabulary after another."""
    n, n_classes = latent.shape[0], weight.shape[0]
    values, indices = maximum.new_empty(n, 0), torch.empty(n, 0, dtype=torch.int64, device=latent.device)
    columns = max(TOPK_BYTES // (maximum.itemsize * max(n, 1)), 2 * k, 256)
    for start in range(0, n_classes, columns):
        span = slice(start, start + columns)
        log_p = _backends.kernels(backend).log_prob(
            latent, log_prior, weight[span], bias if bias is None else bias[span], maximum, log_total, transform
        )
        candidates = log_p.topk(min(k, log_p.shape[1]))
        candidates_of_all = torch.cat([indices, candidates.indices + start], 1)
        values = torch.cat([values, candidates.values], 1)
        values, chosen = values.topk(min(k, values.shape[1]))
        indices = candidates_of_all.gather(1, chosen)
    return values, indices


@fake_of(mixture_topk)
def _(latent, log_prior, weight, bias, maximum, log_total, k, backend, softcap=0.0, temperature=1.0):
    shape = latent.shape[0], min(k, weight.shape[0])
    return maximum.new_empty(shape), maximum.new_empty(shape, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ most probable classes


@custom_op("fused_mos::predict", mutates_args=())
def predict(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    backend: str,
    softcap: float = 0.0,
) -> Tensor:
    """The most probable class, (N,) int64."""
    kernels, transform = _backends.kernels(backend), checks.transform(softcap)
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    if _backends.one_sweep_pays(backend, *latent.shape[:2], *weight.shape):
        return kernels.predict_in_one_sweep(latent, prior_logits, weight, bias, transform)
    log_prior, maximum, log_total = kernels.normalisers(latent, prior_logits, weight, bias, transform)
    return kernels.predict(latent, log_prior, weight, bias, maximum, log_total, transform)


@fake_of(predict)
def _(latent, prior_logits, weight, bias, backend, softcap=0.0):
    return latent.new_empty(latent.shape[0], dtype=torch.int64)


@custom_op("fused_mos::topk", mutates_args=())
def topk(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    k: int,
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The k most probable classes, or all if there are fewer: their log-probabilities, descending, and the classes,
    (N, ≤ k) each."""
    kernels, transform = _backends.kernels(backend), checks.transform(softcap, temperature)
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    k, n, n_classes = checks.count(k), latent.shape[0], weight.shape[0]
    if not _backends.one_sweep_pays(backend, *latent.shape[:2], *weight.shape):
        log_prior, maximum, log_total = kernels.normalisers(latent, prior_logits, weight, bias, transform)
        return _topk_of_spans(latent, log_prior, weight, bias, maximum, log_total, k, backend, transform)
    found = []
    for t in spans(n, max(TOPK_BYTES // (accumulation_dtype(latent.dtype).itemsize * n_classes), 1)):
        log_p, _, _ = kernels.log_prob_and_normalisers(latent[t], prior_logits[t], weight, bias, transform)
        found.append(log_p.topk(min(k, n_classes)))
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


@fake_of(topk)
def _(latent, prior_logits, weight, bias, k, backend, softcap=0.0, temperature=1.0):
    (like,) = empty_statistics(latent, 1)
    shape = latent.shape[0], min(k, weight.shape[0])
    return like.new_empty(shape), like.new_empty(shape, dtype=torch.int64)


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
    softcap: float = 0.0,
) -> Tensor:
    """Draw an expert from the prior and one of its classes for each token, (N,) int64; −1 if none can be drawn."""
    kernels, transform = _backends.kernels(backend), checks.transform(softcap, temperature)
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    seed = checks.seeds(seed, latent)
    return kernels.sample(kernels.choose_rows(latent, prior_logits, seed), weight, bias, transform, seed)


@fake_of(sample)
def _(latent, prior_logits, weight, bias, temperature, seed, backend, softcap=0.0):
    return latent.new_empty(latent.shape[0], dtype=torch.int64)
