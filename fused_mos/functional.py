"""Mixture of Softmaxes as functions: checks, autocast, reductions and the choice of backend.

Shape letters: N tokens, K experts, D latent features, V classes. The arguments `latent`, `weight` and `bias`
share one floating dtype; `prior_logits` has it too, or float32. Results are float32 for 16-bit inputs (the
rounding of bf16 is too coarse for a log-likelihood), otherwise of the inputs' dtype. Under torch.autocast the
products run in the autocast dtype and the prior stays in float32.

Values (not shapes) are checked on CPU tensors outside torch.compile: NaN raises ValueError, a target that is
no class IndexError. Elsewhere a check would stall the device, and such a token's loss is NaN.

Double backward, forward-mode differentiation and the transforms of torch.func are for backend "reference".

`backend` is one of `fused_mos.backends()` or "auto". Source of the mathematics: Yang et al., "Breaking the
Softmax Bottleneck: A High-Rank RNN Language Model", ICLR 2018, section 2.3.
"""

import torch
from torch import Tensor

from . import ops
from ._backends import reference
from ._inputs import REDUCTIONS, prepared
from ._vocabulary import LOCAL, TopK

__all__ = [
    "REDUCTIONS",
    "TopK",
    "mos_log_prob",
    "mos_logsumexp",
    "mos_nll_loss",
    "mos_predict",
    "mos_sample",
    "mos_topk",
]


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
    result = LOCAL.nll_and_loss(
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


def mos_log_prob(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Log-probabilities of all classes under the mixture, (N, V), differentiable.

    Args and errors as in `mos_nll_loss`. Only the result has V columns per token: the K distributions behind it
    are summed tile by tile.
    """
    return LOCAL.mos_log_prob(latent, prior_logits, weight, bias, backend=backend)


def mos_logsumexp(latent: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Each expert's log-normaliser log Σ_v exp(latent · weightᵀ + bias), (N, K), differentiable.

    Args and errors as in `mos_nll_loss`.
    """
    with prepared(latent, None, weight, bias, backend) as operands:
        if operands.backend == "reference":
            return reference.logsumexp(operands.latent, operands.weight, operands.bias)
        latent, _, weight, bias, backend = operands.contiguous()
        return ops.logsumexp(latent, weight, bias, backend)[0]


def mos_predict(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """The most probable class of the mixture, (N,) int64; no (N, V) tensor is written.

    Args and errors as in `mos_nll_loss`.
    """
    return LOCAL.mos_predict(latent, prior_logits, weight, bias, backend=backend)


def mos_topk(
    latent: Tensor, prior_logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, backend: str = "auto"
) -> TopK:
    """The k most probable classes of the mixture and their log-probabilities, (N, k) each, the most probable first.

    They are selected from spans of the vocabulary, so no (N, V) tensor is written; among equal ones the order
    is that of torch.topk, which promises none. Args and errors as in `mos_nll_loss`; 1 ≤ k ≤ V.
    """
    return LOCAL.mos_topk(latent, prior_logits, weight, bias, k=k, backend=backend)


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

    Args and errors as in `mos_nll_loss`. A token without a class to draw, since its prior or all of its logits are −inf
    or NaN, is a ValueError where values are checked, elsewhere its class is −1.
    """
    return LOCAL.mos_sample(
        latent, prior_logits, weight, bias, temperature=temperature, generator=generator, backend=backend
    )
