"""torch.library custom ops: the autograd, fake kernels and backend dispatch between `functional` and the backends.

Four differentiable ops, each opaque to torch.compile, so that no (N, K, V) tensor can appear in a graph:

    fused_mos::nll                 per-token NLL; its backward recomputes the logits (4 products)
    fused_mos::nll_with_gradients  the same and the gradient of its sum, formed in the forward pass (3 products)
    fused_mos::logsumexp           log Σ_v exp l, (N, K)
    fused_mos::log_prob            log-probabilities of all classes, (N, V)

Their outputs are float32 for 16-bit inputs, gradients have the dtype of their input. Double backward is
refused: the `reference` backend, which is plain torch, has it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from . import _backends
from ._backends import from_rows
from ._backends.reference import accumulation_dtype, log_softmax_prior


def _empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised contiguous gradients, of no elements where not needed: what the ops promise their callers."""
    like = next(tensor for tensor in inputs if tensor is not None)
    tensors = (like if tensor is None else tensor for tensor in inputs)
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(tensors, needs))


def _empty_statistics(latent: Tensor, count: int) -> list[Tensor]:
    """Uninitialised (N, K) tensors of the accumulation dtype."""
    return [latent.new_empty(latent.shape[:2], dtype=accumulation_dtype(latent.dtype)) for _ in range(count)]


def _as_gradients(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs))


def refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused MoS ops cannot be differentiated twice (create_graph=True); use backend='reference' for that"
        )


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
    return _backends.kernels(backend).nll(latent, prior_logits, weight, bias, target, ignore_index)


@nll.register_fake
def _(latent, prior_logits, weight, bias, target, ignore_index, filter_eps, backend):
    statistics = _empty_statistics(latent, 3)
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
    statistics = maximum, log_total, target_logit
    return _backends.kernels(backend).nll_backward(
        grad, latent, prior_logits, weight, bias, target, *statistics, ignore_index, filter_eps, needs
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
    return _empty_gradients((latent, prior_logits, weight, bias), needs)


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
    return *_as_gradients(gradients, needs), None, None, None, None


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
    return _backends.kernels(backend).nll_with_gradients(
        latent, prior_logits, weight, bias, target, ignore_index, filter_eps, mean, needs
    )


@nll_with_gradients.register_fake
def _(latent, prior_logits, weight, bias, target, ignore_index, filter_eps, mean, needs, backend):
    statistics = _empty_statistics(latent, 3)
    losses = statistics[0].new_empty(latent.shape[0])
    loss, divisor = losses.new_empty(()), losses.new_empty(())
    return loss, divisor, losses, *statistics, *_empty_gradients((latent, prior_logits, weight, bias), needs)


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
    return _backends.kernels(backend).scaled(gradients, factor, divisor)


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
        # in plain torch it may return what it gets, which an op may not
        multiplied = scaled if _backends.has_own_small_kernels(backend) else from_rows.scaled
        result = _as_gradients(multiplied(gradients, grad_loss, divisor, backend), needs)
    if grad_nll is not None:
        recomputed = nll_backward(grad_nll.contiguous(), *inputs, ignore_index, filter_eps, needs, backend)
        recomputed = _as_gradients(recomputed, needs)
        result = (
            recomputed
            if grad_loss is None
            else tuple(a + b if need else None for a, b, need in zip(result, recomputed, needs))
        )
    return *result, None, None, None, None, None, None


nll_with_gradients.register_autograd(_nll_with_gradients_backward, setup_context=_nll_with_gradients_setup)


# ------------------------------------------------------------------------------------------------------------ logsumexp


@custom_op("fused_mos::logsumexp", mutates_args=())
def logsumexp(latent: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """L[n,k] = log Σ_v exp l[n,k,v]: (N, K, D), (V, D), (V,) -> (N, K), and its two terms maximum and log_total."""
    n, k, d = latent.shape
    maximum, log_total, _ = _backends.kernels(backend).row_statistics(latent.view(n * k, d), weight, bias, None)
    return (maximum + log_total).view(n, k), maximum.view(n, k), log_total.view(n, k)


@logsumexp.register_fake
def _(latent, weight, bias, backend):
    return tuple(_empty_statistics(latent, 3))


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
    n, k, d = latent.shape
    grad_rows, grad_weight, grad_bias = _backends.kernels(backend).rows_backward(
        latent.view(n * k, d),
        weight,
        bias,
        None,
        maximum.view(-1),
        log_total.view(-1),
        grad.view(-1),
        None,
        tuple(needs),
    )
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_weight, grad_bias


@logsumexp_backward.register_fake
def _(grad, latent, weight, bias, maximum, log_total, needs, backend):
    return _empty_gradients((latent, weight, bias), needs)


def _logsumexp_setup(ctx, inputs, output):
    latent, weight, bias, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(latent, weight, bias, *output[1:])


def _logsumexp_backward(ctx, grad, *_):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:3])
    gradients = logsumexp_backward(grad.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
    return *_as_gradients(gradients, needs), None


logsumexp.register_autograd(_logsumexp_backward, setup_context=_logsumexp_setup)


# ---------------------------------------------------------------------------------------------------------- normalisers


@custom_op("fused_mos::normalisers", mutates_args=())
def normalisers(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """log π and the terms maximum and log_total of each expert's log Σ_v exp l, (N, K) each; not differentiable."""
    return _backends.kernels(backend).normalisers(latent, prior_logits, weight, bias)


@normalisers.register_fake
def _(latent, prior_logits, weight, bias, backend):
    return tuple(_empty_statistics(latent, 3))


# ------------------------------------------------------------------------------------------------------------- log_prob


@custom_op("fused_mos::log_prob", mutates_args=())
def log_prob(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """log p (N, V), and maximum and log_total (N, K) for the backward pass."""
    kernels = _backends.kernels(backend)
    log_prior, maximum, log_total = kernels.normalisers(latent, prior_logits, weight, bias)
    return kernels.log_prob(latent, log_prior, weight, bias, maximum, log_total), maximum, log_total


@log_prob.register_fake
def _(latent, prior_logits, weight, bias, backend):
    statistics = _empty_statistics(latent, 2)
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
    log_prior = log_softmax_prior(prior_logits).to(maximum.dtype)
    grad_latent, grad_prior, grad_weight, grad_bias = _backends.kernels(backend).log_prob_backward(
        grad, latent, log_prior, weight, bias, maximum, log_total, tuple(needs)
    )
    return grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


@log_prob_backward.register_fake
def _(grad, latent, prior_logits, weight, bias, maximum, log_total, needs, backend):
    return _empty_gradients((latent, prior_logits, weight, bias), needs)


def _log_prob_setup(ctx, inputs, output):
    latent, prior_logits, weight, bias, ctx.backend = inputs
    statistics = output[1:]
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(latent, prior_logits, weight, bias, *statistics)


def _log_prob_backward(ctx, grad, *_):
    refuse_double_backward()
    needs = list(ctx.needs_input_grad[:4])
    gradients = log_prob_backward(grad.contiguous(), *ctx.saved_tensors, needs, ctx.backend)
    return *_as_gradients(gradients, needs), None


log_prob.register_autograd(_log_prob_backward, setup_context=_log_prob_setup)
