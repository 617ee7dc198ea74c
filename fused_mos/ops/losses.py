"""Ops for the loss: each token's NLL, and the same with the gradient of its sum."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .. import _backends
from .._backends import from_rows
from .._backends.tracing import is_batched
from . import checks
from .autograd import as_gradients, empty_gradients, empty_statistics, fake_of, refuse_double_backward
from .direct import direct

# ------------------------------------------------------------------------------------------------------------------ nll


def _nll(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    ignore_index: int,
    filter_eps: float,
    backend: str,
    softcap: float = 0.0,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """nll (N,); for the backward pass maximum, log_total and target_logit, (N, K) each; and, `with_lse`,
    lse = maximum + log_total. nll and lse are differentiable."""
    inputs = checks.operands(latent, prior_logits, weight, bias, backend)
    transform = checks.transform(softcap)
    losses, maximum, log_total, target_logit = _backends.kernels(backend).nll(
        *inputs, checks.targets(target, latent), ignore_index, transform
    )
    return losses, maximum, log_total, target_logit, _lse(maximum, log_total, with_lse)


nll = custom_op("fused_mos::nll", _nll, mutates_args=())


def _lse(maximum: Tensor, log_total: Tensor, wanted: bool) -> Tensor:
    return maximum + log_total if wanted else maximum.new_empty(0)


@fake_of(nll)
def _(latent, prior_logits, weight, bias, target, ignore_index, filter_eps, backend, softcap=0.0, with_lse=False):
    statistics = empty_statistics(latent, 3)
    lse = torch.empty_like(statistics[0]) if with_lse else statistics[0].new_empty(0)
    return statistics[0].new_empty(latent.shape[0]), *statistics, lse


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
    softcap: float = 0.0,
    grad_lse: Tensor | None = None,  # (N, K)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (latent, prior_logits, weight, bias): dl = (g r + g_L) exp(l − L) − g r 1[v = y] and
    da = g (π − r). With `grad_lse` no rows are filtered."""
    inputs = checks.operands(latent, prior_logits, weight, bias, backend)
    (grad,) = checks.numbers(latent, latent.shape[:1], grad=grad)
    statistics = {"maximum": maximum, "log_total": log_total, "target_logit": target_logit}
    known: tuple[Any, ...] = grad, *inputs, checks.targets(target, latent)
    known += tuple(checks.numbers(latent, latent.shape[:2], **statistics))
    needs, transform, kernels = checks.needed(needs, 4, bias), checks.transform(softcap), _backends.kernels(backend)
    if grad_lse is None:
        return kernels.nll_backward(*known, ignore_index, filter_eps, needs, transform)
    (grad_lse,) = checks.numbers(latent, latent.shape[:2], grad_lse=grad_lse)
    options = ignore_index, 0.0, needs, transform, grad_lse
    return from_rows.nll_backward(kernels.rows_backward, *known, *options)  # type: ignore[call-arg]


@fake_of(nll_backward)
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
    softcap=0.0,
    grad_lse=None,
):
    return empty_gradients((latent, prior_logits, weight, bias), needs)


def _nll_setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, target, ignore_index, filter_eps, backend, softcap, with_lse = inputs
    statistics = output[1:4]
    ctx.mark_non_differentiable(*statistics, *(() if with_lse else output[4:]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(latent, prior_logits, weight, bias, target, *statistics)
    ctx.options = ignore_index, filter_eps, backend, softcap


def _nll_backward(ctx, grad, *others):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:4])
    return *_recomputed(ctx.options, ctx.saved_tensors, grad, others[-1], needs), *(None,) * 6


def _recomputed(
    options: tuple[int, float, str, float],
    saved: Sequence[Tensor],  # inputs and statistics
    grad: Tensor | None,  # (N,) of nll
    grad_lse: Tensor | None,  # (N, K)
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    ignore_index, filter_eps, backend, softcap = options
    if grad is None and grad_lse is None:
        return (None,) * 4
    grad = saved[5].new_zeros(saved[0].shape[0]) if grad is None else grad.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    gradients = nll_backward(grad, *saved, ignore_index, filter_eps, needs, backend, softcap, grad_lse)
    return as_gradients(gradients, needs)


nll.register_autograd(_nll_backward, setup_context=_nll_setup)
call_nll = direct(nll, _nll, _nll_setup, _nll_backward)


# --------------------------------------------------------------------------------------------------- nll_with_gradients


def _nll_with_gradients(
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
    softcap: float = 0.0,
    with_lse: bool = False,
    loss_weights: Tensor | None = None,  # (3, N)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss (); a divisor (); nll (N,); maximum, log_total and target_logit (N, K); the gradients of divisor·loss
    that `needs` asks for; and, `with_lse`, lse (N, K).

    The loss is the sum of nll, its mean over the valid targets or, with `loss_weights`, that of `Kernels`. The backward
    pass of the loss only scales the gradients. nll and lse are differentiable too, by recomputing the logits.
    """
    inputs, target = checks.operands(latent, prior_logits, weight, bias, backend), checks.targets(target, latent)
    needs, transform = checks.needed(needs, 4, bias), checks.transform(softcap)
    if loss_weights is not None:
        (loss_weights,) = checks.numbers(latent, (3, latent.shape[0]), loss_weights=loss_weights)
        loss_weights = torch.where(target != ignore_index, loss_weights, 0)
        if mean:
            raise ValueError("mean must be False with loss_weights, got True")
    results = _backends.kernels(backend).nll_with_gradients(
        *inputs, target, ignore_index, filter_eps, mean, needs, transform, loss_weights
    )
    return *results, _lse(results[3], results[4], with_lse)


nll_with_gradients = custom_op("fused_mos::nll_with_gradients", _nll_with_gradients, mutates_args=())


@fake_of(nll_with_gradients)
def _(
    latent,
    prior_logits,
    weight,
    bias,
    target,
    ignore_index,
    filter_eps,
    mean,
    needs,
    backend,
    softcap=0.0,
    with_lse=False,
    loss_weights=None,
):
    statistics = empty_statistics(latent, 3)
    losses = statistics[0].new_empty(latent.shape[0])
    loss, divisor = losses.new_empty(()), losses.new_empty(())
    gradients = empty_gradients((latent, prior_logits, weight, bias), needs)
    lse = torch.empty_like(statistics[0]) if with_lse else losses.new_empty(0)
    return loss, divisor, losses, *statistics, *gradients, lse


def _nll_with_gradients_setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, target, ignore_index, filter_eps, _, _, backend, softcap, with_lse, _ = inputs
    _, divisor, _, *rest, lse = output
    ctx.mark_non_differentiable(divisor, *rest, *(() if with_lse else (lse,)))
    ctx.set_materialize_grads(False)  # unused outputs must not cause a backward pass that recomputes
    statistics, gradients = rest[:3], rest[3:]
    ctx.save_for_backward(latent, prior_logits, weight, bias, target, *statistics, divisor, *gradients)
    ctx.options = ignore_index, filter_eps, backend, softcap


def _scaled(
    gradients: Sequence[Tensor],
    factor: Tensor,  # ()
    divisor: Tensor,  # ()
    backend: str,
) -> list[Tensor]:
    """The gradients times factor / divisor, or 0 if the divisor is 0."""
    if not _backends.has_own_small_kernels(backend):
        raise ValueError(f"backend {backend!r} has no kernel of its own for that")
    if len(gradients) != 4:
        raise ValueError(f"gradients must be those of the 4 inputs, got {len(gradients)}")
    for gradient in gradients:
        checks.check_memory("gradients", gradient)
        (factor, divisor) = checks.numbers(gradient, (), factor=factor, divisor=divisor)
    return _backends.kernels(backend).scaled([gradient.contiguous() for gradient in gradients], factor, divisor)


scaled = custom_op("fused_mos::scaled", _scaled, mutates_args=())


@fake_of(scaled)
def _(gradients, factor, divisor, backend):
    return [torch.empty_like(gradient) for gradient in gradients]


call_scaled = direct(scaled, _scaled)


def _nll_with_gradients_backward(ctx, grad_loss, _, grad_nll, *others):
    refuse_double_backward()
    backend, grad_lse = ctx.options[2], others[-1]
    needs = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes it and refuses to do so twice
    inputs, divisor, gradients = saved[:8], saved[8], saved[9:]
    result: tuple[Tensor | None, ...] = (None,) * 4
    if grad_loss is not None:
        batched = is_batched(grad_loss)  # the ops do not take batched gradients
        if batched:
            grad_loss = grad_loss * torch.where(divisor != 0, 1 / divisor, 0)
        # plain torch may return its inputs, which an op may not
        multiplied = call_scaled if _backends.has_own_small_kernels(backend) and not batched else from_rows.scaled
        result = as_gradients(multiplied(gradients, grad_loss, divisor, backend), needs)
    if grad_nll is not None or grad_lse is not None:
        recomputed = _recomputed(ctx.options, inputs, grad_nll, grad_lse, needs)
        result = (
            recomputed
            if grad_loss is None
            else tuple(a + b if need else None for a, b, need in zip(result, recomputed, needs))
        )
    return *result, *(None,) * 9


nll_with_gradients.register_autograd(_nll_with_gradients_backward, setup_context=_nll_with_gradients_setup)
call_nll_with_gradients = direct(
    nll_with_gradients, _nll_with_gradients, _nll_with_gradients_setup, _nll_with_gradients_backward
)
