"""Mixture of Softmaxes as functions: checks, autocast, reductions and the choice of backend.

Shape letters: N tokens, K experts, D latent features, V classes. The arguments `latent`, `weight` and `bias`
share one floating dtype; `prior_logits` has it too, or float32. Results are float32 for 16-bit inputs (the
rounding of bf16 is too coarse for a log-likelihood), otherwise of the inputs' dtype. Under torch.autocast the
products run in the autocast dtype and the prior stays in float32.

Values (not shapes) are checked on CPU tensors outside torch.compile: NaN raises ValueError, a target that is
no class IndexError. Elsewhere a check would stall the device, and such a token's loss is NaN.

Double backward, forward-mode differentiation and the transforms of torch.func are for backend "reference". While a
graph is traced, `mos_predict`, `mos_topk` and `mos_sample` are those of "tiled", which is plain torch.

`backend` is one of `fused_mos.backends()` or "auto". Source of the mathematics: Yang et al., "Breaking the
Softmax Bottleneck: A High-Rank RNN Language Model", ICLR 2018, section 2.3.
"""

import contextlib
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from . import _backends, ops
from ._backends import reference
from ._backends.reference import log_softmax_prior

REDUCTIONS = ("mean", "sum", "none")

TOPK_BYTES = 32 * 2**20
"""Bytes of the log-probabilities that `mos_topk` holds at once."""


def mos_nll_loss(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    grad_filter_eps: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of `target` under the mixture p = Σ_k π_k softmax(latent_k · weightᵀ + bias).

    Args:
        latent: (N, K, D), one vector per expert.
        prior_logits: (N, K); π = softmax over K.
        weight: (V, D), the output embedding.
        target: (N,) int64 classes in [0, V), or `ignore_index`.
        bias: (V,) or None.
        ignore_index: a target of this value has loss 0, gradient 0, and is not counted by the mean.
        reduction: "mean" over the counted targets (NaN if there are none, as in F.cross_entropy), "sum" or "none".
        grad_filter_eps: in the backward pass, drop the (token, expert) pairs whose responsibility
            r = p(expert | target) is below this value: a token loses at most K·eps of its unit of gradient
            weight. 0 drops only what is exactly 0. The gradient of `prior_logits` stays exact, the
            loss always is. `reference` ignores it.

    Returns:
        () for "mean" and "sum", (N,) for "none", in nats.

    Raises:
        TypeError, ValueError, IndexError: bad input (see the module's docstring). RuntimeError: `backend` is not
        available, or double backward.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    result = nll_and_loss(
        latent,
        prior_logits,
        weight,
        target,
        bias,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
        grad_filter_eps=grad_filter_eps,
    )
    return result.loss


class NLL(NamedTuple):
    nll: Tensor  # (N,)
    loss: Tensor  # () or (N,)


def nll_and_loss(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    backend: str,
    grad_filter_eps: float,
) -> NLL:
    """`mos_nll_loss` before and after its reduction; both are differentiable.

    When the loss is one number, all tokens have the same weight in it, so the gradient can be formed in the
    forward pass, one product cheaper; gradients that arrive through `nll` are then recomputed.
    """
    _check_inputs(latent, prior_logits, weight, bias)
    _check_target(target, latent, weight.shape[0], ignore_index)
    if not 0 <= grad_filter_eps < 1:
        raise ValueError(f"grad_filter_eps must be in [0, 1), got {grad_filter_eps}")
    latent, prior_logits, weight, bias = _autocast(latent, prior_logits, weight, bias)
    backend = _backends.resolve(backend, latent.device, latent.dtype)
    with _without_autocast(latent.device.type):
        if backend == "reference":
            nll = reference.nll(latent, prior_logits, weight, bias, target, ignore_index)
        else:
            inputs = _contiguous(latent, prior_logits, weight, bias)
            needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]
            kernels = _backends.kernels(backend)
            in_forward = reduction != "none" and any(needs)
            if in_forward and kernels.gradient_in_forward_pays(latent.shape[0], latent.shape[1], weight):
                mean = reduction == "mean"
                loss, nll = ops.nll_with_gradients(
                    *inputs, target, ignore_index, grad_filter_eps, mean, needs, backend
                )[:2]
                return NLL(nll, loss)
            nll = ops.nll(*inputs, target, ignore_index, grad_filter_eps, backend)[0]
    return _reduced(nll, target, ignore_index, reduction)


def _reduced(nll: Tensor, target: Tensor, ignore_index: int, reduction: str) -> NLL:
    """The loss of nll (N,), which is 0 where the target is ignored."""
    if reduction == "none":
        return NLL(nll, nll)
    if reduction == "sum":
        return NLL(nll, nll.sum())
    return NLL(nll, nll.sum() / (target != ignore_index).sum())


def mos_log_prob(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Log-probabilities of all classes under the mixture, (N, V), differentiable.

    Args and errors as in `mos_nll_loss`. Only the result has V columns per token: the K distributions behind it
    are summed tile by tile.
    """
    _check_inputs(latent, prior_logits, weight, bias)
    latent, prior_logits, weight, bias = _autocast(latent, prior_logits, weight, bias)
    backend = _backends.resolve(backend, latent.device, latent.dtype)
    with _without_autocast(latent.device.type):
        if backend == "reference":
            return reference.log_prob(latent, prior_logits, weight, bias)
        inputs = _contiguous(latent, prior_logits, weight, bias)
        if decoder := _backends.decoder(backend, *inputs):
            log_p = decoder.log_prob(inputs[0], log_softmax_prior(prior_logits).float(), *inputs[2:])
            if log_p is not None:
                return log_p
        return ops.log_prob(*inputs, backend)[0]


def mos_logsumexp(latent: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Each expert's log-normaliser log Σ_v exp(latent · weightᵀ + bias), (N, K), differentiable.

    Args and errors as in `mos_nll_loss`.
    """
    _check_inputs(latent, None, weight, bias)
    latent, _, weight, bias = _autocast(latent, None, weight, bias)
    backend = _backends.resolve(backend, latent.device, latent.dtype)
    with _without_autocast(latent.device.type):
        if backend == "reference":
            return reference.logsumexp(latent, weight, bias)
        return ops.logsumexp(*_contiguous(latent, weight, bias), backend)[0]


@torch.no_grad()
def mos_predict(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """The most probable class of the mixture, (N,) int64; no (N, V) tensor is written.

    Args and errors as in `mos_nll_loss`.
    """
    _check_inputs(latent, prior_logits, weight, bias)
    latent, prior_logits, weight, bias = _autocast(latent, prior_logits, weight, bias)
    backend = _backends.resolve(backend, latent.device, latent.dtype)
    with _without_autocast(latent.device.type):
        if backend == "reference":
            return reference.log_prob(latent, prior_logits, weight, bias).argmax(-1)
        latent, weight, bias = _contiguous(latent, weight, bias)
        _, maximum, log_total = ops.logsumexp(latent, weight, bias, backend)
        log_prior = log_softmax_prior(prior_logits).to(maximum.dtype)
        return _backends.traceable(backend).predict(latent, log_prior, weight, bias, maximum, log_total)


class TopK(NamedTuple):
    values: Tensor  # (N, k) log-probabilities, descending
    indices: Tensor  # (N, k) int64 classes


@torch.no_grad()
def mos_topk(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, backend: str = "auto"
) -> TopK:
    """The k most probable classes of the mixture and their log-probabilities, (N, k) each, the most probable first.

    They are selected from spans of the vocabulary, so no (N, V) tensor is written; among equal ones the order
    is that of torch.topk, which promises none. Args and errors as in `mos_nll_loss`; 1 ≤ k ≤ V.
    """
    _check_inputs(latent, prior_logits, weight, bias)
    _check_k(k, weight.shape[0])
    latent, prior_logits, weight, bias = _autocast(latent, prior_logits, weight, bias)
    backend = _backends.resolve(backend, latent.device, latent.dtype)
    with _without_autocast(latent.device.type):
        if backend == "reference":
            return TopK(*reference.log_prob(latent, prior_logits, weight, bias).topk(k))
        latent, weight, bias = _contiguous(latent, weight, bias)
        if decoder := _backends.decoder(backend):
            top = decoder.topk(latent, log_softmax_prior(prior_logits).float(), weight, bias, k)
            if top is not None:
                return TopK(*top)
        _, maximum, log_total = ops.logsumexp(latent, weight, bias, backend)
        return _topk_of_spans(
            latent, log_softmax_prior(prior_logits).to(maximum.dtype), weight, bias, maximum, log_total, k, backend
        )


def _topk_of_spans(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    k: int,
    backend: str,
) -> TopK:
    """The k most probable of these classes, all of them where they are fewer; the normalisers are given."""
    n, n_classes = latent.shape[0], weight.shape[0]
    values, indices = maximum.new_empty(n, 0), torch.empty(n, 0, dtype=torch.int64, device=latent.device)
    columns = max(TOPK_BYTES // (maximum.itemsize * max(n, 1)), 2 * k, 256)
    for start in range(0, n_classes, columns):
        span = slice(start, start + columns)
        log_p = _backends.traceable(backend).log_prob(
            latent, log_prior, weight[span], bias if bias is None else bias[span], maximum, log_total
        )
        candidates = log_p.topk(min(k, log_p.shape[1]))
        candidates_of_all = torch.cat([indices, candidates.indices + start], 1)
        values = torch.cat([values, candidates.values], 1)
        values, chosen = values.topk(min(k, values.shape[1]))
        indices = candidates_of_all.gather(1, chosen)
    return TopK(values, indices)


def _check_k(k: int, n_classes: int) -> None:
    if not isinstance(k, Integral):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= n_classes:
        raise ValueError(f"k must be in [1, V = {n_classes}], got {k}")


@torch.no_grad()
def mos_sample(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draws one class per token from Σ_k π_k softmax(l_k / temperature), (N,) int64.

    The expert is drawn from the prior, then the class from that expert alone, so a sample costs one softmax
    instead of K. The temperature (> 0) divides each expert's logits and leaves the prior as it is: towards 0 it
    draws the best class of a random expert, not that of the mixture, which is `mos_predict`'s.
    `generator` lives on the inputs' device; each backend turns its state into other samples.

    Args and errors as in `mos_nll_loss`.
    """
    _check_inputs(latent, prior_logits, weight, bias)
    _check_temperature(temperature)
    latent, prior_logits, weight, bias = _autocast(latent, prior_logits, weight, bias)
    backend = _backends.resolve(backend, latent.device, latent.dtype)
    with _without_autocast(latent.device.type):
        if backend == "reference":
            return reference.sample(latent, prior_logits, weight, bias, temperature, generator)
        n = latent.shape[0]
        if n == 0:  # torch.multinomial refuses an empty batch
            return torch.empty(0, dtype=torch.int64, device=latent.device)
        expert = torch.multinomial(log_softmax_prior(prior_logits).exp(), 1, generator=generator).squeeze(1)
        chosen = latent[torch.arange(n, device=latent.device), expert]
        return _backends.traceable(backend).sample(chosen, *_contiguous(weight, bias), temperature, generator)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature} (predict, or topk with k = 1, is greedy)")


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """On the meta device, which has none, it does nothing."""
    return torch.autocast(device_type, enabled=False) if device_type != "meta" else contextlib.nullcontext()


def _is_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What the fused backends take (see `_backends.Kernels`). Raises RuntimeError for what they would ignore:
    tangents."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None
    ):
        raise RuntimeError("the fused MoS ops have no forward-mode derivative; use backend='reference' for that")
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _autocast(
    latent: Tensor, prior_logits: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Casts as torch.autocast would, but keeps the prior, whose product is small, in float32."""
    device = latent.device.type
    if not _is_autocast(device) or latent.dtype == torch.float64:
        return latent, prior_logits, weight, bias
    dtype = torch.get_autocast_dtype(device)
    prior_logits = prior_logits if prior_logits is None else prior_logits.float()
    return latent.to(dtype), prior_logits, weight.to(dtype), bias if bias is None else bias.to(dtype)


def _check_inputs(latent: Tensor, prior_logits: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    named = {"latent": latent, "prior_logits": prior_logits, "weight": weight, "bias": bias}
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    autocast = isinstance(latent, Tensor) and _is_autocast(latent.device.type)
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
        if tensor.device != latent.device:
            raise ValueError(f"{name} is on {tensor.device} but latent is on {latent.device}")
        allowed = (latent.dtype, torch.float32) if name == "prior_logits" else (latent.dtype,)
        if tensor.dtype not in allowed and not autocast:
            raise TypeError(f"{name} must have latent's dtype {latent.dtype}, got {tensor.dtype}")
    if latent.dim() != 3:
        raise ValueError(f"latent must be (N, K, D), got shape {tuple(latent.shape)}")
    n, k, d = latent.shape
    if k == 0:
        raise ValueError(f"latent must have at least one expert, got K = 0 in shape {tuple(latent.shape)}")
    if prior_logits is not None and prior_logits.shape != (n, k):
        raise ValueError(f"prior_logits must be (N, K) = {(n, k)} to match latent, got {tuple(prior_logits.shape)}")
    if weight.dim() != 2 or weight.shape[1] != d:
        raise ValueError(f"weight must be (V, D) with latent's D = {d}, got {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one class, got V = 0 in shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be (V,) = {(weight.shape[0],)} to match weight, got {tuple(bias.shape)}")
    if _values_can_be_read(latent):
        for name, tensor in named.items():
            # max propagates NaN and, unlike isnan().any(), allocates nothing
            if tensor.numel() and tensor.detach().amax().isnan():
                raise ValueError(f"{name} contains NaN ({int(tensor.isnan().sum())} of {tensor.numel()} values)")


def _check_target(target: Tensor, latent: Tensor, n_classes: int, ignore_index: int) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must have dtype torch.int64, got {target.dtype}")
    if target.device != latent.device:
        raise ValueError(f"target is on {target.device} but latent is on {latent.device}")
    if target.shape != latent.shape[:1]:
        raise ValueError(f"target must be (N,) = {(latent.shape[0],)} to match latent, got {tuple(target.shape)}")
    if _values_can_be_read(target):
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= n_classes))]
        if wrong.numel():
            raise IndexError(
                f"target must be in [0, V = {n_classes}) or ignore_index = {ignore_index}, got {int(wrong[0])}"
            )


def _values_can_be_read(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return False
    return not isinstance(tensor, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
