"""Calls to the native CPU kernels for the mixture's own distribution: log-probabilities, sums over them, and the
gradients of both.
"""

import torch
from torch import Tensor

from .. import _cpu  # type: ignore[attr-defined]  # compiled, without stubs
from . import tiled_mixture
from .cpu_operands import Gradients, address, head_of
from .gather import gathered_logits
from .log_prob_gradient import LogProbGradient
from .sums import Sum
from .transform import IDENTITY, Transform


def _mixture(latent: Tensor, log_prior: Tensor, maximum: Tensor, log_total: Tensor) -> _cpu.Mixture:
    return _cpu.Mixture(
        latent=address(latent),
        log_prior=address(log_prior),
        maximum=address(maximum),
        log_total=address(log_total),
        n_tokens=latent.shape[0],
        n_experts=latent.shape[1],
    )


def log_prob(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    transform: Transform = IDENTITY,
) -> Tensor:  # (N, V)
    head, bias = head_of(weight, bias, transform)
    result = maximum.new_empty(latent.shape[0], weight.shape[0])
    mixture = _mixture(latent, log_prior, maximum, log_total)
    _cpu.mixture(head, mixture, log_prob=address(result), best=0, mean_log_prob=0)
    return _undefined_is_nan(result, log_prior, maximum, log_total)


def _undefined_is_nan(result: Tensor, log_prior: Tensor, maximum: Tensor, log_total: Tensor) -> Tensor:
    """Set tokens (first dimension) with undefined statistics to NaN. The kernels' exponentials treat NaN as a small
    number."""
    undefined = (log_prior + maximum + log_total).isnan().any(1)
    return result.masked_fill_(undefined[:, None], torch.nan) if undefined.any() else result


def predict(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    transform: Transform = IDENTITY,
) -> Tensor:  # (N,)
    head, bias = head_of(weight, bias, transform)
    result = torch.empty(latent.shape[0], dtype=torch.int64, device=latent.device)
    mixture = _mixture(latent, log_prior, maximum, log_total)
    _cpu.mixture(head, mixture, log_prob=0, best=address(result), mean_log_prob=0)
    return result


def score(
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K)
    """The most probable class of the mixture, and Σ_v softmax_k(l)_v log p_v of each expert, in one product. Summed
    with weights −π_k, the latter give the mixture's entropy."""
    head, bias = head_of(weight, bias, transform)
    best = torch.empty(latent.shape[0], dtype=torch.int64, device=latent.device)
    mean_log_prob = torch.empty_like(maximum)
    mixture = _mixture(latent, log_prior, maximum, log_total)
    _cpu.mixture(head, mixture, log_prob=0, best=address(best), mean_log_prob=address(mean_log_prob))
    return best, _undefined_is_nan(mean_log_prob, log_prior, maximum, log_total)


def mixture_sum(
    sum_: Sum,
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Native for "entropy"; other sums use the tiled backend."""
    given = latent, log_prior, weight, bias, maximum, log_total, transform
    if sum_.kind != "entropy":
        return tiled_mixture.mixture_sum(sum_, *given)
    best, mean_log_prob = score(*given)
    prior = log_prior.exp()
    s = torch.where(prior != 0, -prior * mean_log_prob, 0)
    of_best = gathered_logits(latent, weight, bias, best[:, None], transform).squeeze(2)
    log_p = torch.logsumexp(log_prior + ((of_best - maximum) - log_total), 1)
    return s.sum(1), s, best, log_p


def mixture_sum_backward(
    sum_: Sum,
    grad: Tensor,  # (N,)
    grad_target: Tensor,  # (N,)
    target: Tensor,  # (N,)
    s: Tensor,  # (N, K)
    grad_lse: Tensor,  # (N, K)
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    needs: tuple[bool, bool, bool, bool],
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Native except for "tempered", which uses the tiled backend."""
    given = latent, log_prior, weight, bias, maximum, log_total
    if sum_.kind == "tempered":
        return tiled_mixture.mixture_sum_backward(
            sum_, grad, grad_target, target, s, grad_lse, *given, needs, transform
        )
    if sum_.kind == "entropy":
        log_p_gradient = LogProbGradient(at_target=grad_target, target=target, entropy=grad)
    else:
        of_class = weight.new_ones(weight.shape[0]) if sum_.class_weight is None else sum_.class_weight
        log_p_gradient = LogProbGradient(grad, of_class, grad_target, target)
    # dl takes s − grad_lse, the prior's gradient s itself
    others = needs[0], False, needs[2], needs[3]
    grad_latent, _, grad_weight, grad_bias = log_prob_backward(log_p_gradient, *given, others, transform, s - grad_lse)
    grad_prior = s - log_prior.exp() * s.sum(1, keepdim=True) if needs[1] else s.new_empty(0)
    return grad_latent, grad_prior, grad_weight, grad_bias


def _log_prob_gradient(grad: Tensor | LogProbGradient) -> tuple[_cpu.LogProbGradient, dict[str, Tensor]]:
    """The gradient of log p as the kernels take it, and the tensors that it points to, which must outlive it."""
    given = {"dense": grad} if isinstance(grad, Tensor) else grad._asdict()
    tensors = {
        name: tensor.contiguous() if name == "target" else tensor.float().contiguous()
        for name, tensor in given.items()
        if tensor is not None
    }
    return _cpu.LogProbGradient(**{name: address(tensor) for name, tensor in tensors.items()}), tensors


def log_prob_backward(
    grad: Tensor | LogProbGradient,  # (N, V)
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    needs: tuple[bool, bool, bool, bool],
    transform: Transform = IDENTITY,
    mean_gradient: Tensor | None = None,  # (N, K)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (latent, prior_logits, weight, bias). If `mean_gradient`, s[n,k] = Σ_v G π_k exp(l − L) / p, is
    known, it saves one of four products."""
    head, bias = head_of(weight, bias, transform)
    gradients = Gradients(latent, weight, (needs[0], needs[2], needs[3]))
    grad_prior = torch.zeros_like(maximum) if needs[1] else maximum.new_empty(0)
    kernel_grad, alive = _log_prob_gradient(grad)
    mean_gradient = None if mean_gradient is None else mean_gradient.float().contiguous()
    _cpu.mixture_backward(
        head,
        _mixture(latent, log_prior, maximum, log_total),
        grad=kernel_grad,
        mean_gradient=address(mean_gradient),
        grad_prior=address(grad_prior),
        gradients=gradients.addresses(),
    )
    grad_latent, grad_weight, grad_bias = gradients.results()
    return grad_latent, grad_prior, grad_weight, grad_bias
