"""Ops for a sum over the mixture's classes together with the target's log-probability. One backward pass of three
products serves both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from .. import _backends
from .._backends import Sum
from .._backends.reference import log_softmax_prior, mix_target
from . import checks
from .autograd import as_gradients, empty_gradients, empty_statistics, fake_of, refuse_double_backward


def _sum(
    latent: Tensor,
    weight: Tensor,
    kind: str,
    class_weight: Tensor | None,
    mixture_temperature: float,
    value: Tensor | None = None,
) -> Sum:
    if kind not in ("classes", "entropy", "tempered"):
        raise ValueError(f"kind must be classes, entropy or tempered, got {kind!r}")
    if class_weight is not None:
        (class_weight,) = checks.numbers(latent, weight.shape[:1], class_weight=class_weight)
    if value is not None:
        (value,) = checks.numbers(latent, latent.shape[:1], value=value)
    return Sum(kind, class_weight, checks.check_temperature(mixture_temperature, "mixture_temperature"), value)


@custom_op("fused_mos::mixture_sum", mutates_args=())
def mixture_sum(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D): all classes, or some of them
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K), of all classes
    log_total: Tensor,  # (N, K), of all classes
    kind: str,
    class_weight: Tensor | None,  # (V,)
    mixture_temperature: float,
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over the classes in `weight`, (N,); their contribution to s (N, K); and the most probable of them, (N,)
    int64, with its log p, (N,). Not differentiable."""
    given = checks.given_normalisers(latent, log_prior, weight, bias, maximum, log_total, backend)
    sum_ = _sum(latent, weight, kind, class_weight, mixture_temperature)
    return _backends.kernels(backend).mixture_sum(sum_, *given, checks.transform(softcap, temperature))


@fake_of(mixture_sum)
def _(
    latent,
    log_prior,
    weight,
    bias,
    maximum,
    log_total,
    kind,
    class_weight,
    mixture_temperature,
    backend,
    softcap=0.0,
    temperature=1.0,
):
    value, s = maximum.new_empty(latent.shape[0]), torch.empty_like(maximum)
    return value, s, latent.new_empty(latent.shape[0], dtype=torch.int64), torch.empty_like(value)


@custom_op("fused_mos::mixture_sum_backward", mutates_args=())
def mixture_sum_backward(
    grad: Tensor,  # (N,), gradient of the sum
    grad_target: Tensor,  # (N,), gradient of log p[target]
    grad_lse: Tensor,  # (N, K)
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    target_logit: Tensor,  # (N, K)
    s: Tensor,  # (N, K), completed, over all classes
    value: Tensor,  # (N,), result of `mixture_sum` over all classes
    kind: str,
    class_weight: Tensor | None,  # (V,)
    mixture_temperature: float,
    needs: Sequence[bool],
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (latent, prior_logits, weight, bias). A target that is not among the classes of `weight` gets no
    gradient here. Its logit is NaN if it is no class at all."""
    latent, prior_logits, weight, bias = checks.operands(latent, prior_logits, weight, bias, backend)
    named = {"grad_lse": grad_lse, "maximum": maximum, "log_total": log_total, "target_logit": target_logit, "s": s}
    numbers = checks.numbers(latent, latent.shape[:2], **named)
    grad_lse, maximum, log_total, target_logit, s = numbers
    grad, grad_target = checks.numbers(latent, latent.shape[:1], grad=grad, grad_target=grad_target)
    target, needs = checks.targets(target, latent), checks.needed(needs, 4, bias)
    log_prior = log_softmax_prior(prior_logits).to(maximum.dtype)
    _, responsibility = mix_target(log_prior, maximum, log_total, target_logit)
    s = grad[:, None] * s + torch.where(grad_target[:, None] != 0, grad_target[:, None] * responsibility, 0)
    sum_ = _sum(latent, weight, kind, class_weight, mixture_temperature, value)
    grad_latent, grad_prior, grad_weight, grad_bias = _backends.kernels(backend).mixture_sum_backward(
        sum_,
        grad,
        grad_target,
        target,
        s,
        grad_lse,
        latent,
        log_prior,
        weight,
        bias,
        maximum,
        log_total,
        needs,
        checks.transform(softcap, temperature),
    )
    return grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


@fake_of(mixture_sum_backward)
def _(
    grad,
    grad_target,
    grad_lse,
    latent,
    prior_logits,
    weight,
    bias,
    target,
    maximum,
    log_total,
    target_logit,
    s,
    value,
    kind,
    class_weight,
    mixture_temperature,
    needs,
    backend,
    softcap=0.0,
    temperature=1.0,
):
    return empty_gradients((latent, prior_logits, weight, bias), needs)


@custom_op("fused_mos::likelihood_and_sum", mutates_args=())
def likelihood_and_sum(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    kind: str,
    class_weight: Tensor | None,  # (V,)
    mixture_temperature: float,
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The target's log p (N,), NaN where it is no class; lse (N, K); the sum (N,); and a mask (N,) bool of the targets
    that no class beats. The first three are differentiable. Further results are for the backward pass."""
    inputs, target = checks.operands(latent, prior_logits, weight, bias, backend), checks.targets(target, latent)
    transform, kernels = checks.transform(softcap, temperature), _backends.kernels(backend)
    (n, k, d), log_prior = latent.shape, log_softmax_prior(prior_logits)
    rows, of_rows = inputs[0].view(n * k, d), target.repeat_interleave(k)
    if k == 1 and kind == "entropy":  # the product for the normaliser gives the entropy and the best class, too
        *statistics, value = kernels.row_entropy(rows, *inputs[2:], of_rows, transform)
        maximum, log_total, target_logit = (statistic[:, None] for statistic in statistics)
        likelihood, is_top1 = ((target_logit - maximum) - log_total).squeeze(1), at_top(statistics[2], statistics[0])
        return likelihood, maximum + log_total, value, is_top1, maximum, log_total, target_logit, (value - 1)[:, None]
    statistics = kernels.row_statistics(rows, *inputs[2:], of_rows, transform)
    maximum, log_total, target_logit = (statistic.view(n, k) for statistic in statistics)
    log_prior = log_prior.to(maximum.dtype)
    nll, _ = mix_target(log_prior, maximum, log_total, target_logit)
    sum_ = _sum(latent, weight, kind, class_weight, mixture_temperature)
    given = inputs[0], log_prior, *inputs[2:], maximum, log_total, transform
    value, s, best, log_p = kernels.mixture_sum(sum_, *given)
    is_top1 = (best == target) | at_top(-nll, log_p)
    return -nll, maximum + log_total, value, is_top1, maximum, log_total, target_logit, sum_.completed(s, log_prior)


def at_top(value: Tensor, largest: Tensor) -> Tensor:
    """A mask of the values that equal the largest up to rounding."""
    return largest - value <= 4 * torch.finfo(value.dtype).eps * largest.abs().clamp_min(1)


@fake_of(likelihood_and_sum)
def _(
    latent,
    prior_logits,
    weight,
    bias,
    target,
    kind,
    class_weight,
    mixture_temperature,
    backend,
    softcap=0.0,
    temperature=1.0,
):
    lse, *others = empty_statistics(latent, 5)
    likelihood, value = lse.new_empty(latent.shape[0]), lse.new_empty(latent.shape[0])
    return likelihood, lse, value, torch.empty_like(target, dtype=torch.bool), *others


def _setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, target, kind, class_weight, mixture_temperature, *options = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(latent, prior_logits, weight, bias, target, *output[4:], output[2], class_weight)
    ctx.kind, ctx.temperature, ctx.options = kind, mixture_temperature, options


def _backward(ctx, grad_likelihood, grad_lse, grad_value, *_):
    refuse_double_backward()
    *saved, class_weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = (grad.contiguous() for grad in (grad_value, grad_likelihood, grad_lse))
    gradients = mixture_sum_backward(*grads, *saved, ctx.kind, class_weight, ctx.temperature, needs, *ctx.options)
    return *as_gradients(gradients, needs), *(None,) * 7


likelihood_and_sum.register_autograd(_backward, setup_context=_setup)
