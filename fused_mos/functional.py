"""The Mixture of Softmaxes as functions of tensors (Yang et al., "Breaking the Softmax Bottleneck: A High-Rank RNN
Language Model", ICLR 2018, section 2.3).

Shapes: N tokens, K experts, D latent features, V classes.

Dtypes: `latent`, `weight` and `bias` share one floating dtype; `prior_logits` has it too, or is float32. Results have
the same dtype, but are float32 for 16-bit inputs: bfloat16 is too coarse for a log-likelihood. Under torch.autocast the
products run in the autocast dtype and the prior stays in float32.

Errors: shapes, dtypes and devices are always checked. Values are checked on CPU tensors outside torch.compile: NaN
raises ValueError, and a target that is no class raises IndexError. Elsewhere the check would stall the device, and the
loss of such a token is NaN.

`softcap` c replaces each expert's logits l, bias included, by c·tanh(l/c) before anything else happens to them (Gemma
Team, "Gemma 2", 2024, section 2). It does not change the number of products.

Costs are given in products. One product is the 2·N·K·D·V floating point operations that compute all logits.

`backend` is one of `fused_mos.backends()` or "auto". Only "reference" supports double backward, forward-mode
differentiation and the transforms of torch.func.
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

    With all options, the loss of a token with target y is

        u ((1 − ε) w[y] (−log p[y]) + ε/V Σ_v w[v] (−log p[v]) + z Σ_k π_k L_k²),

    where u is its `token_weight`, w = `class_weight`, ε = `label_smoothing`, z = `z_loss` and
    L_k = log Σ_v exp l[k, v].

    Args:
        latent: (N, K, D), one vector per expert.
        prior_logits: (N, K); π is their softmax over K.
        weight: (V, D), the output embedding.
        target: (N,) int64 classes in [0, V), or `ignore_index`; (N, M) with `target_prob`.
        bias: (V,) or None.
        ignore_index: targets with this value have loss 0 and gradient 0, and the mean does not count them.
        reduction: "mean" over the counted targets (NaN if there are none, as in F.cross_entropy), "sum" or "none".
            With weights the mean divides by Σ u w[y] over the counted targets.
        grad_filter_eps: drop the (token, expert) pairs whose responsibility r = p(expert | target) is below this value
            from the backward pass. A token loses at most K·eps of its gradient weight of 1. The default of 0 drops only
            pairs with r = 0. The loss and the gradient of `prior_logits` stay exact. Ignored by "reference" and by
            losses with any of the weights and terms below.
        softcap: c > 0, or None for no soft cap (see the module's docstring).
        class_weight: (V,), like `weight` of F.cross_entropy. Not differentiable.
        token_weight: (N,), of any sign. Not differentiable.
        label_smoothing: ε in [0, 1], as in F.cross_entropy.
        z_loss: z ≥ 0, the coefficient of the experts' squared log-normalisers, weighted by the prior.
        target_prob: (N, M) probabilities q of the classes `target` (N, M), for soft targets:
            −Σ_m q_m log p[target_m] replaces (1 − ε) w[y] (−log p[y]). Entries whose class is `ignore_index` do not
            count. Not differentiable.
        extra_log_prob: (N, K′) log-probabilities of the targets under K′ components from elsewhere (a cache, a pointer
            network, an n-gram model); −inf is allowed. `prior_logits` is then (N, K + K′), with one softmax over all
            components. Differentiable.
        return_lse: also return the log-normalisers L.

    Returns:
        The loss in nats: () for "mean" and "sum", (N,) for "none". With `return_lse`, (loss, lse) with lse (N, K);
        both are differentiable.

    Cost, with gradients:
        A mean or sum takes 3 products, whatever the weights and the z-loss. It takes 4 with few rows or little memory,
        in an exported program, or with a sharded vocabulary.
        Reduction "none", `extra_log_prob` and `target_prob` take 4.
        Label smoothing takes 5 for K > 1 experts or with a soft cap, and nothing extra for a single softmax.
        A gradient through both a mean and its lse takes 6. `z_loss` costs nothing extra, and a loss of your own over
        `mos_expert_log_prob` takes 4.

    Raises:
        TypeError, ValueError, IndexError: bad input (see the module's docstring).
        RuntimeError: `backend` is not available, or on double backward.
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
    """Each expert's log-likelihood of the target and log-normaliser: build any loss of a mixture from them in plain
    torch.

    Returns:
        log_prob (N, K), l[y] − L, 0 where the target is ignored; lse (N, K), L. Both are differentiable.

    Cost: 4 products with gradients. Args and errors as in `mos_nll_loss`.
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
    """Log-probabilities of given classes, differentiable: for distillation, candidates, or the tokens of a policy.

    Args:
        index: (N,) or (N, M) int64 classes, in any order and with repetitions, or `ignore_index`, which gives 0.
        temperature: divides each expert's logits, after the soft cap. The prior is unchanged.
        mixture_temperature: T, divides the mixture's log-probabilities and normalises them again, log p / T −
            log Σ_v exp(log p_v / T), as Hugging Face and TRL do. It equals `temperature` only for K = 1.

    Other arguments and errors are those of `mos_nll_loss`.

    Returns:
        Log-probabilities in nats, shaped like `index`. No (N, V) or (N, M, D) tensor is formed.

    Cost: 4 products with gradients, and M·D operations per token and expert. A mixture temperature takes 5 products
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
    """Log-probability of the target, entropy of the distribution, and top-1 accuracy, for reinforcement learning and
    evaluation.

    Returns:
        log_prob (N,), log p[y] in nats, differentiable.
        entropy (N,), −Σ_v p_v log p_v in nats, differentiable.
        is_top1 (N,) bool, True if no class is more probable than y. Classes that tie up to rounding are all top-1;
        `mos_predict` returns one of them.
        Where the target is ignored they are 0, 0 and False.

    Cost: 2 products (1 for a single softmax), and 3 more for the gradients. No (N, V) tensor is formed.

    Args and errors as in `mos_nll_loss`.
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

    Cost: 2 products. The K distributions are summed tile by tile, so only the result has V columns. On a CPU a few
    tokens take 1 product, if their exponentials fit the workspace.

    Args and errors as in `mos_nll_loss`.
    """
    return LOCAL.mos_log_prob(latent, prior_logits, weight, bias, softcap=softcap, backend=backend)


def mos_logsumexp(
    latent: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None, backend: str = "auto"
) -> Tensor:
    """Each expert's log-normaliser log Σ_v exp(latent · weightᵀ + bias), (N, K), differentiable.

    Cost: 4 products with gradients. Args and errors as in `mos_nll_loss`.
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
    """The most probable class of the mixture, (N,) int64.

    No (N, V) tensor is formed. Cost as in `mos_log_prob`, args and errors as in `mos_nll_loss`.
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

    They are selected span by span of the vocabulary, so no (N, V) tensor is formed. As in torch.topk, the order of
    equal values is not defined.

    Args:
        k: 1 ≤ k ≤ V.

    Other arguments and errors are those of `mos_nll_loss`.

    Cost as in `mos_log_prob`.
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
    """Draw one class per token from Σ_k π_k softmax(l_k / temperature), (N,) int64.

    An expert is drawn from the prior, then a class from that expert alone, so a sample costs one softmax instead of K.

    Args:
        temperature: > 0, divides each expert's logits, after the soft cap. The prior is unchanged, so towards 0 this
            draws the best class of a random expert. For the best class of the mixture use `mos_predict`.
        mixture_temperature: > 0, divides log p, as Hugging Face's temperature does. Towards 0 it draws the mixture's
            best class.
        top_k: keep only the k most probable classes, 1 ≤ k ≤ V.
        top_p: of these, keep the fewest most probable classes whose probabilities sum to top_p, in (0, 1].
        generator: on the inputs' device. Backends draw different samples from the same state.

    Other arguments and errors are those of `mos_nll_loss`.

    mixture_temperature, top_k and top_p apply in this order, each followed by renormalisation. Any of them needs the
    whole mixture, so a sample then costs 2 products over all K experts.

    Raises ValueError for a token without a class to draw (its prior or all its logits are −inf or NaN) where values are
    checked. Elsewhere its class is −1.
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
