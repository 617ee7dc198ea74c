"""Ops over single experts: log-normalisers, and log-probabilities of given classes. Together with the prior, plain
torch computes the mixture at those classes from them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from .. import _backends
from .._backends.gather import add_gathered_gradients, gathered_logits, inside
from . import checks
from .autograd import as_gradients, empty_gradients, empty_statistics, fake_of, refuse_double_backward

# ------------------------------------------------------------------------------------------------------- row statistics


@custom_op("fused_mos::row_statistics", mutates_args=())
def row_statistics(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (N,) int64
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """maximum, log_total and target logit of each row, (N, K) each: the statistics of a part of a softmax. The target
    logit is NaN without targets and where the target is no class."""
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    n, k, d = latent.shape
    row_target = None if target is None else checks.targets(target, latent).repeat_interleave(k)
    transform = checks.transform(softcap, temperature)
    found = _backends.kernels(backend).row_statistics(latent.view(n * k, d), weight, bias, row_target, transform)
    return tuple(statistic.view(n, k) for statistic in found)


@fake_of(row_statistics)
def _(latent, weight, bias, target, backend, softcap=0.0, temperature=1.0):
    return tuple(empty_statistics(latent, 3))


# ------------------------------------------------------------------------------------------------------------ logsumexp


@custom_op("fused_mos::logsumexp", mutates_args=())
def logsumexp(
    latent: Tensor, weight: Tensor, bias: Tensor | None, backend: str, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """L[n,k] = log Σ_v exp l[n,k,v] and its two terms maximum and log_total: (N, K, D), (V, D), (V,) -> (N, K) each."""
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    n, k, d = latent.shape
    rows, transform = latent.view(n * k, d), checks.transform(softcap)
    maximum, log_total, _ = _backends.kernels(backend).row_statistics(rows, weight, bias, None, transform)
    return (maximum + log_total).view(n, k), maximum.view(n, k), log_total.view(n, k)


@fake_of(logsumexp)
def _(latent, weight, bias, backend, softcap=0.0):
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
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    n, k, d = latent.shape
    given = {"grad": grad, "maximum": maximum, "log_total": log_total}
    grad, maximum, log_total = (t.view(-1) for t in checks.numbers(latent, (n, k), **given))
    needs = checks.needed(needs, 3, bias)
    grad_rows, grad_weight, grad_bias = _backends.kernels(backend).rows_backward(
        latent.view(n * k, d),
        weight,
        bias,
        None,
        maximum,
        log_total,
        grad,
        None,
        needs,
        transform=checks.transform(softcap),
    )
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_weight, grad_bias


@fake_of(logsumexp_backward)
def _(grad, latent, weight, bias, maximum, log_total, needs, backend, softcap=0.0):
    return empty_gradients((latent, weight, bias), needs)


def _logsumexp_setup(ctx, inputs, output):
    latent, weight, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(latent, weight, bias, *output[1:])


def _logsumexp_backward(ctx, grad, *_):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:3])
    gradients = logsumexp_backward(grad.contiguous(), *ctx.saved_tensors, needs, *ctx.options)
    return *as_gradients(gradients, needs), None, None


logsumexp.register_autograd(_logsumexp_backward, setup_context=_logsumexp_setup)


# ------------------------------------------------------------------------------------- given classes


@custom_op("fused_mos::expert_log_prob", mutates_args=())
def expert_log_prob(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (N, M) int64
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """l − L of the classes in `index`, (N, K, M), NaN for entries that are no class, and L, (N, K). Both are
    differentiable. Then, for the backward pass, the terms maximum and log_total of L, and l."""
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    index, transform = checks.indices(index, latent), checks.transform(softcap, temperature)
    (n, k, d), n_each = latent.shape, index.shape[1]
    of_rows = index[:, 0].repeat_interleave(k) if n_each == 1 else None
    statistics = _backends.kernels(backend).row_statistics(latent.view(n * k, d), weight, bias, of_rows, transform)
    maximum, log_total, found = (statistic.view(n, k) for statistic in statistics)
    logits = found[..., None] if n_each == 1 else gathered_logits(latent, weight, bias, index, transform)
    log_prob = (logits - maximum[..., None]) - log_total[..., None]
    return log_prob, maximum + log_total, maximum, log_total, logits.contiguous()


@fake_of(expert_log_prob)
def _(latent, weight, bias, index, backend, softcap=0.0, temperature=1.0):
    lse, maximum, log_total = empty_statistics(latent, 3)
    log_prob = lse.new_empty(*latent.shape[:2], index.shape[1])
    return log_prob, lse, maximum, log_total, torch.empty_like(log_prob)


@custom_op("fused_mos::expert_log_prob_backward", mutates_args=())
def expert_log_prob_backward(
    grad: Tensor,  # (N, K, M)
    grad_lse: Tensor,  # (N, K)
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (N, M) int64
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    logits: Tensor,  # (N, K, M)
    needs: Sequence[bool],
    backend: str,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (latent, weight, bias) for dl = (g_L − Σ_m g) exp(l − L) + Σ_m g 1[v = index]."""
    latent, _, weight, bias = checks.operands(latent, None, weight, bias, backend)
    index, transform = checks.indices(index, latent), checks.transform(softcap, temperature)
    (n, k, d), n_each = latent.shape, index.shape[1]
    statistics = {"grad_lse": grad_lse, "maximum": maximum, "log_total": log_total}
    grad_lse, maximum, log_total = checks.numbers(latent, (n, k), **statistics)
    grad, logits = checks.numbers(latent, (n, k, n_each), grad=grad, logits=logits)
    needs = checks.needed(needs, 3, bias)
    of_lse = (grad_lse - grad.sum(2)).view(-1)
    of_rows, of_target = None, None
    if n_each == 1:
        is_class = inside(index, weight).expand(n, k)
        of_rows, of_target = index[:, 0].repeat_interleave(k), torch.where(is_class, -grad[..., 0], 0).view(-1)
    operands: tuple[Tensor | None, ...] = latent.view(n * k, d), weight, bias
    if n_each > 1:  # in a trained model the two parts of a gradient nearly cancel, and 16 bits are too few for each
        operands = tuple(tensor if tensor is None else tensor.to(grad.dtype) for tensor in operands)
    grad_rows, grad_weight, grad_bias = _backends.kernels(backend).rows_backward(
        *operands, of_rows, maximum.view(-1), log_total.view(-1), of_lse, of_target, needs, transform=transform
    )
    gradients = grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_weight, grad_bias
    if n_each == 1:
        return gradients
    wanted = needs[0], needs[1], needs[2]
    add_gathered_gradients(grad, logits, latent, weight, index, gradients, wanted, transform)
    return tuple(gradient.to(latent.dtype) for gradient in gradients)


@fake_of(expert_log_prob_backward)
def _(
    grad,
    grad_lse,
    latent,
    weight,
    bias,
    index,
    maximum,
    log_total,
    logits,
    needs,
    backend,
    softcap=0.0,
    temperature=1.0,
):
    return empty_gradients((latent, weight, bias), needs)


def _expert_log_prob_setup(ctx, inputs, output):
    latent, weight, bias, index, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(latent, weight, bias, index, *output[2:])


def _expert_log_prob_backward(ctx, grad, grad_lse, *_):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:3])
    given = grad.contiguous(), grad_lse.contiguous(), *ctx.saved_tensors
    gradients = expert_log_prob_backward(*given, needs, *ctx.options)
    return *as_gradients(gradients, needs), None, None, None, None


expert_log_prob.register_autograd(_expert_log_prob_backward, setup_context=_expert_log_prob_setup)
