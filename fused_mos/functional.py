"""Mixture of Softmaxes as functions: checks, autocast, reductions and the choice of backend.

Shape letters: N tokens, K experts, D latent features, V classes. The arguments `latent`, `weight` and `bias`
share one floating dtype; `prior_logits` has it too, or float32. Results are float32 for 16-bit inputs (the
rounding of bf16 is too coarse for a log-likelihood), otherwise of the inputs' dtype. Under torch.autocast the
products run in the autocast dtype and the prior stays in float32.

Values (not shapes) are checked on CPU tensors outside torch.compile: NaN raises ValueError, a target that is
no class IndexError. Elsewhere a check would stall the device, and such a token's loss is NaN.

`softcap` c, where a function has it, replaces each expert's logits l, bias included, by c·tanh(l/c) before anything
else is done with them (Gemma Team, "Gemma 2", 2024, section 2), at the same number of products.

What a function costs is said in products: one is the 2·N·K·D·V floating point operations of all logits.

Double backward, forward-mode differentiation and the transforms of torch.func are for backend "reference".

`backend` is one of `fused_mos.backends()` or "auto". Source of the mathematics: Yang et al., "Breaking the
Softmax Bottleneck: A High-Rank RNN Language Model", ICLR 2018, section 2.3.
"""

import torch
from torch import Tensor

from . import ops
from ._backends import Transform, reference
from ._inputs import REDUCTIONS, prepared
from ._linear import linear_cross_entropy
from ._local import LOCAL
from ._vocabulary import ExpertLogProb, Score, TopK

__all__ = [
    "REDUCTIONS",
    "ExpertLogProb",
    "Score",
    "TopK",
    "linear_cross_entropy",
    "mos_expert_log_prob",
    "mos_log_prob",
    "mos_log_prob_at",
    "mos_logsumexp",
    "mos_nll_loss",
    "mos_predict",
    "mos_sample",
    "mos_score",
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
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    target_prob: Tensor | None = None,
    extra_log_prob: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Negative log-likelihood of `target` under the mixture p = Σ_k π_k softmax(latent_k · weightᵀ + bias).

    With all options, the loss of a token of target y, of weight u and with the classes' weights w is

        u ((1 − ε) w[y] (−log p[y]) + ε/V Σ_v w[v] (−log p[v]) + z Σ_k π_k L_k²),

    with ε = `label_smoothing`, z = `z_loss` and L_k = log Σ_v exp l[k, v].

    Args:
        latent: (N, K, D), one vector per expert.
        prior_logits: (N, K); π = softmax over K.
        weight: (V, D), the output embedding.
        target: (N,) int64 classes in [0, V), or `ignore_index`; (N, M) with `target_prob`.
        bias: (V,) or None.
        ignore_index: a target of this value has loss 0, gradient 0, and is not counted by the mean.
        reduction: "mean" over the counted targets (NaN if there are none, as in F.cross_entropy), "sum" or "none".
            With weights the mean divides by Σ u w[y] over the counted targets.
        grad_filter_eps: in the backward pass, drop the (token, expert) pairs whose responsibility
            r = p(expert | target) is below this value: a token loses at most K·eps of its unit of gradient
            weight. 0 drops only what is exactly 0. The gradient of `prior_logits` stays exact, the
            loss always is. `reference` ignores it, and so does a loss with any of the weights and terms below.
        softcap: see the module.
        class_weight: (V,), as `weight` of F.cross_entropy. No gradient.
        token_weight: (N,), of any sign. No gradient.
        label_smoothing: in [0, 1], as in F.cross_entropy.
        z_loss: ≥ 0, the coefficient of the experts' squared log-normalisers, weighted by the prior.
        target_prob: (N, M), q: soft targets, by the classes `target` (N, M), with −Σ_m q_m log p[target_m] in the place
            of (1 − ε) w[y] (−log p[y]). Of an entry that is `ignore_index` nothing counts. No gradient.
        extra_log_prob: (N, K′), log-probabilities that K′ components from elsewhere (a cache, a pointer, an n-gram
            model) give the targets; −inf is allowed. `prior_logits` is then (N, K + K′), one softmax over all of them.
            Differentiable.
        return_lse: return L, too.

    Returns:
        () for "mean" and "sum", (N,) for "none", in nats. With `return_lse` (loss, lse): lse is (N, K), differentiable.

    Cost: a mean or a sum takes 3 products with its gradients, whatever the weights and the z-loss; where few rows or
    little memory make it dearer, in an exported program or a sharded vocabulary, and with the reduction "none",
    `extra_log_prob` or `target_prob`, it is 4. A gradient
    through lse, beside that of a mean, takes 3 more: of what `z_loss` does not do, `mos_expert_log_prob` makes it 4 in
    all. Label smoothing of K > 1 experts, or with a soft cap, takes 5 products; that of a single softmax none beside
    the 3.

    Raises:
        TypeError, ValueError, IndexError: bad input (see the module's docstring).
        RuntimeError: `backend` is not available, or double backward.
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
        softcap=softcap,
        class_weight=class_weight,
        token_weight=token_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        target_prob=target_prob,
        extra_log_prob=extra_log_prob,
        return_lse=return_lse,
    )
    return result.loss if result.lse is None else (result.loss, result.lse)


def mos_expert_log_prob(
    latent: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    backend: str = "auto",
) -> ExpertLogProb:
    """What any loss of a mixture can be made of in plain torch: each expert's log-likelihood of the target, l[y] − L,
    0 where the target is ignored, and its log-normaliser L, (N, K) each. Both are differentiable, in one backward
    pass: 4 products in all.

    Args and errors as in `mos_nll_loss`.
    """
    return LOCAL.mos_expert_log_prob(
        latent, weight, target, bias, ignore_index=ignore_index, softcap=softcap, backend=backend
    )


def mos_log_prob_at(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    mixture_temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities of given classes, differentiable: for distillation, candidates, or a policy's own tokens.

    Args:
        index: (N,) or (N, M) int64 classes, in any order and repeated at will, or `ignore_index`, whose result is 0.
        temperature: divides each expert's logits, after the soft cap, and leaves the prior as it is.
        mixture_temperature: divides the mixture's log-probabilities, which are normalised again: log p / T −
            log Σ_v exp(log p_v / T), as Hugging Face and TRL do. For K = 1 it is the same as `temperature`, for a
            mixture it is not.

    The other arguments, and errors, are those of `mos_nll_loss`.

    Returns:
        The shape of `index`, in nats. No (N, V) and no (N, M, D) tensor is made.

    Cost: 4 products with the gradients, and M·D operations for each token and expert; with a mixture temperature 5
    more.
    """
    return LOCAL.mos_log_prob_at(
        latent,
        prior_logits,
        weight,
        index,
        bias,
        ignore_index=ignore_index,
        temperature=temperature,
        mixture_temperature=mixture_temperature,
        softcap=softcap,
        backend=backend,
    )


def mos_score(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    backend: str = "auto",
) -> Score:
    """What reinforcement learning and evaluation ask of a head about its targets.

    Args and errors as in `mos_nll_loss`.

    Returns:
        log_prob (N,), log p[y] in nats; entropy (N,), −Σ_v p_v log p_v in nats; is_top1 (N,) bool, whether no class is
        more probable than y: of classes that tie but for rounding, of which `mos_predict` returns one, each is. 0, 0
        and False where the target is ignored. The first two are differentiable.

    Cost: 2 products, of a single softmax 1, and 3 for the gradients of both. No (N, V) tensor is made.
    """
    return LOCAL.mos_score(
        latent, prior_logits, weight, target, bias, ignore_index=ignore_index, softcap=softcap, backend=backend
    )


def mos_log_prob(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probabilities of all classes under the mixture, (N, V), differentiable.

    Args and errors as in `mos_nll_loss`. Only the result has V columns per token: the K distributions behind it
    are summed tile by tile, in 2 products; on a CPU in 1, where its workspace holds a few tokens' exponentials.
    """
    return LOCAL.mos_log_prob(latent, prior_logits, weight, bias, softcap=softcap, backend=backend)


def mos_logsumexp(
    latent: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None, backend: str = "auto"
) -> Tensor:
    """Each expert's log-normaliser log Σ_v exp(latent · weightᵀ + bias), (N, K), differentiable: 4 products.

    Args and errors as in `mos_nll_loss`.
    """
    with prepared(latent, None, weight, bias, backend, softcap) as operands:
        if operands.backend == "reference":
            return reference.logsumexp(operands.latent, operands.weight, operands.bias, Transform(operands.softcap))
        latent, _, weight, bias, backend, cap = operands.contiguous()
        return ops.logsumexp(latent, weight, bias, backend, cap)[0]


def mos_predict(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The most probable class of the mixture, (N,) int64; no (N, V) tensor is written. Products as in `mos_log_prob`.

    Args and errors as in `mos_nll_loss`.
    """
    return LOCAL.mos_predict(latent, prior_logits, weight, bias, softcap=softcap, backend=backend)


def mos_topk(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    softcap: float | None = None,
    backend: str = "auto",
) -> TopK:
    """The k most probable classes of the mixture and their log-probabilities, (N, k) each, the most probable first.

    They are selected from spans of the vocabulary, so no (N, V) tensor is written; among equal ones the order
    is that of torch.topk, which promises none. Args and errors as in `mos_nll_loss`; 1 ≤ k ≤ V. Products as in
    `mos_log_prob`.
    """
    return LOCAL.mos_topk(latent, prior_logits, weight, bias, k=k, softcap=softcap, backend=backend)


def mos_sample(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mixture_temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    softcap: float | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draws one class per token from Σ_k π_k softmax(l_k / temperature), (N,) int64.

    The expert is drawn from the prior, then the class from that expert alone, so a sample costs one softmax
    instead of K. The temperature (> 0) divides each expert's logits, after the soft cap, and leaves the prior as it is:
    towards 0 it draws the best class of a random expert, not that of the mixture, which is `mos_predict`'s.

    What follows is of the mixture itself, so any of it makes a sample cost 2 products of all K experts. In this order,
    each renormalising:
        mixture_temperature: divides log p, as Hugging Face's temperature does; towards 0 it draws the best class.
        top_k: the k most probable classes, of 1 ≤ k ≤ V.
        top_p: of these the fewest that together have this probability, in (0, 1], the most probable first.

    `generator` lives on the inputs' device; each backend turns its state into other samples.

    Args and errors as in `mos_nll_loss`. A token without a class to draw, since its prior or all of its logits are −inf
    or NaN, is a ValueError where values are checked, elsewhere its class is −1.
    """
    return LOCAL.mos_sample(
        latent,
        prior_logits,
        weight,
        bias,
        temperature=temperature,
        mixture_temperature=mixture_temperature,
        top_k=top_k,
        top_p=top_p,
        softcap=softcap,
        generator=generator,
        backend=backend,
    )
