"""The loss: each token's NLL, and the same with the gradient of its sum."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from .. import _backends
from .._backends import from_rows
from .._backends.tracing import is_batched
from . import checks
from .autograd import as_gradients, empty_gradients, empty_statistics, refuse_double_backward

# ------------------------------------------------------------------------------------------------------------------ nll


@custom_op("fused_mos::nll", mutates_args=())
def nll(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    ignore_index: int,
    filter_eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll (N,), and for the backward pass maximum, log_total and target_logit, (N, K) each."""
    inputs = checks.operands(latent, prior_logits, weight, bias, backend)
    return _backends.kernels(backend).nll(*inputs, checks.targets(target, latent), ignore_index)


@nll.register_fake
def _(latent, prior_logits, weight, bias, target, ignore_index, filter_eps, backend):
    statistics = empty_statistics(latent, 3)
    return statistics[0].new_empty(latent.shape[0]), *statistics


@custom_op("fused_mos::nll_backward", mutates_args=())
def nll_backward(
    grad: Tensor,  # (N,)
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    target_logit: Tensor,  # (N, K)
    ignore_index: int,
    filter_eps: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of (latent, prior_logits, weight, bias): dl = g r (exp(l − L) − 1[v = y]), da = g (π − r)."""
    inputs = checks.operands(latent, prior_logits, weight, bias, backend)
    (grad,) = checks.numbers(latent, latent.shape[:1], grad=grad)
    statistics = {"maximum": maximum, "log_total": log_total, "target_logit": target_logit}
    return _backends.kernels(backend).nll_backward(
        grad,
        *inputs,
        checks.targets(target, latent),
        *checks.numbers(latent, latent.shape[:2], **statistics),
        ignore_index,
        filter_eps,
        checks.needed(needs, 4, bias),
    )


@nll_backward.register_fake
def _(
    grad,
    latent,
    prior_logits,
    weight,
    bias,
    target,
    maximum,
    log_total,
    target_logit,
    ignore_index,
    filter_eps,
    needs,
    backend,
):
    return empty_gradients((latent, prior_logits, weight, bias), needs)


def _nll_setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, target, ignore_index, filter_eps, backend = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(latent, prior_logits, weight, bias, target, *statistics)
    ctx.options = ignore_index, filter_eps, backend


def _nll_backward(ctx, grad, *_):
    refuse_double_backward()
    ignore_index, filter_eps, backend = ctx.options
    needs = list(ctx.needs_input_grad[:4])
    gradients = nll_backward(grad.contiguous(), *ctx.saved_tensors, ignore_index, filter_eps, needs, backend)
    return *as_gradients(gradients, needs), None, None, None, None


nll.register_autograd(_nll_backward, setup_context=_nll_setup)


# --------------------------------------------------------------------------------------------------- nll_with_gradients


@custom_op("fused_mos::nll_with_gradients", mutates_args=())
def nll_with_gradients(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    ignore_index: int,
    filter_eps: float,
    mean: bool,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (), which is nll's sum or, over the valid targets, its mean; a divisor (); nll (N,); maximum, log_total
    and target_logit (N, K); and for the inputs that `needs` names the gradients of divisor·loss.

    Backward through the loss only scales them. Backward through `nll` is possible too and recomputes.
    """
    inputs, target = checks.operands(latent, prior_logits, weight, bias, backend), checks.targets(target, latent)
    needs = checks.needed(needs, 4, bias)
    return _backends.kernels(backend).nll_with_gradients(*inputs, target, ignore_index, filter_eps, mean, needs)


@nll_with_gradients.register_fake
def _(latent, prior_logits, weight, bias, target, ignore_index, filter_eps, mean, needs, backend):
    statistics = empty_statistics(latent, 3)
    losses = statistics[0].new_empty(latent.shape[0])
    loss, divisor = losses.new_empty(()), losses.new_empty(())
    return loss, divisor, losses, *statistics, *empty_gradients((latent, prior_logits, weight, bias), needs)


def _nll_with_gradients_setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, target, ignore_index, filter_eps, mean, needs, backend = inputs
    _, divisor, _, *rest = output
    ctx.mark_non_differentiable(divisor, *rest)
    ctx.set_materialize_grads(False)  # an unused output must not cost a recomputing backward pass
    statistics, gradients = rest[:3], rest[3:]
    ctx.save_for_backward(latent, prior_logits, weight, bias, target, *statistics, divisor, *gradients)
    ctx.options = ignore_index, filter_eps, backend


@custom_op("fused_mos::scaled", mutates_args=())
def scaled(
    gradients: Sequence[Tensor],
    factor: Tensor,  # ()
    divisor: Tensor,  # ()
    backend: str,
) -> list[Tensor]:
    """The gradients times factor / divisor, or 0 where the divisor is 0."""
    if not _backends.has_own_small_kernels(backend):
        raise ValueError(f"backend {backend!r} has no kernel of its own for that")
    if len(gradients) != 4:
        raise ValueError(f"gradients must be those of the 4 inputs, got {len(gradients)}")
    for gradient in gradients:
        checks.check_memory("gradients", gradient)
        (factor, divisor) = checks.numbers(gradient, (), factor=factor, divisor=divisor)
    return _backends.kernels(backend).scaled([gradient.contiguous() for gradient in gradients], factor, divisor)


@scaled.register_fake
def _(gradients, factor, divisor, backend):
    return [torch.empty_like(gradient) for gradient in gradients]


def _nll_with_gradients_backward(ctx, grad_loss, _, grad_nll, *__):
    refuse_double_backward()
    ignore_index, filter_eps, backend = ctx.options
    needs = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes what is asked for, and refuses to do so twice
    inputs, divisor, gradients = saved[:8], saved[8], saved[9:]
    result: tuple[Tensor | None, ...] = (None,) * 4
    if grad_loss is not None:
        batched = is_batched(grad_loss)  # which no op of gradients takes
        if batched:
            grad_loss = grad_loss * torch.where(divisor != 0, 1 / divisor, 0)
        # in plain torch it may return what it gets, which an op may not
        multiplied = scaled if _backends.has_own_small_kernels(backend) and not batched else from_rows.scaled
        result = as_gradients(multiplied(gradients, grad_loss, divisor, backend), needs)
    if grad_nll is not None:
        recomputed = nll_backward(grad_nll.contiguous(), *inputs, ignore_index, filter_eps, needs, backend)
        recomputed = as_gradients(recomputed, needs)
        result = (
            recomputed
            if grad_loss is None
            else tuple(a + b if need else None for a, b, need in zip(result, recomputed, needs))
        )
    return *result, None, None, None, None, None, None


nll_with_gradients.register_autograd(_nll_with_gradients_backward, setup_context=_nll_with_gradients_setup)
