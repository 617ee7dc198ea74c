"""The options of the loss: class and token weights, label smoothing, a z-loss, external components and soft targets.

These are formulas over what a vocabulary computes. `functional.mos_nll_loss` documents them for users.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ._backends.from_rows import weighted
from ._backends.reference import accumulation_dtype, log_softmax_prior, mixed
from ._inputs import Operands, check_constant, check_number, check_numbers

if TYPE_CHECKING:
    from ._vocabulary import Vocabulary

NONE = -1
"""Stands for an ignored class; no class has this index."""


class NLL(NamedTuple):
    nll: Tensor  # (N,)
    loss: Tensor  # () or (N,)
    lse: Tensor | None = None  # (N, K), if requested


class Terms(NamedTuple):
    """The options of the loss. A token with target y contributes

        u ((1 − ε) w[y] nll + ε/V Σ_v w[v] (−log p_v) + z Σ_k π_k L_k²),

    where u is its weight, w are the class weights, ε the label smoothing and z the coefficient of the z-loss.
    """

    class_weight: Tensor | None = None  # (V,): w
    token_weight: Tensor | None = None  # (N,): u
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    extra_log_prob: Tensor | None = None  # (N, K′) of the targets

    @property
    def n_external(self) -> int:
        return 0 if self.extra_log_prob is None else self.extra_log_prob.shape[1]

    def are_plain(self) -> bool:
        tensors = self.class_weight, self.token_weight, self.extra_log_prob
        return all(tensor is None for tensor in tensors) and not (self.label_smoothing or self.z_loss)


def reduced(per_token: Tensor, divisor: Tensor, reduction: str) -> Tensor:
    """Reduce losses (N,), which are 0 for ignored tokens, to () or leave them (N,)."""
    if reduction == "none":
        return per_token
    return per_token.sum() if reduction == "sum" else per_token.sum() / divisor


def loss(
    vocabulary: "Vocabulary",
    operands: Operands,
    target: Tensor,  # (N,)
    ignore_index: int,
    reduction: str,
    filter_eps: float,
    terms: Terms,
    with_lse: bool,
) -> NLL:
    """The loss with all its options. A mean divides by Σ u w[y] over the counted targets, as in F.cross_entropy."""
    if terms.are_plain():
        return vocabulary.loss(operands, target, ignore_index, reduction, filter_eps, None, with_lse)
    valid = target != ignore_index
    if not with_lse:  # lse is returned for ignored tokens, too
        operands = operands.without_ignored(valid)
    weights, smoothed, divisor = _weights(terms, target, valid, vocabulary.count_classes(operands), operands.latent)
    if reduction != "mean":
        divisor = torch.ones_like(divisor)
    class_weight = None if terms.class_weight is None else terms.class_weight.to(weights.dtype)
    smoothing = None  # (N,), added to the weighted terms
    linear = vocabulary.sum_of_logits(operands, class_weight) if terms.label_smoothing else None
    if linear is not None:  # Σ w (L − l)
        weights[1] = smoothed * (vocabulary.count_classes(operands) if class_weight is None else class_weight.sum())
        smoothing = torch.where(smoothed != 0, -smoothed * linear, 0)
    if terms.label_smoothing and linear is None:
        found = vocabulary.with_sum(operands, torch.where(valid, target, NONE), "classes", class_weight)
        nll, lse = torch.where(valid, -found.log_likelihood, 0), found.lse
        smoothing = torch.where(smoothed != 0, -smoothed * found.sum, 0)
    elif terms.extra_log_prob is not None:
        nll, lse = _with_external(vocabulary, operands, target, ignore_index, terms.extra_log_prob)
    elif reduction == "none":
        each = vocabulary.loss(operands, target, ignore_index, "none", filter_eps, None, True)
        assert each.lse is not None
        nll, lse = each.nll, each.lse
    else:
        divided = torch.where(divisor != 0, divisor, 1)
        result = vocabulary.loss(operands, target, ignore_index, "sum", filter_eps, weights / divided, with_lse)
        total = result.loss if smoothing is None else result.loss + smoothing.sum() / divided
        # as in F.cross_entropy, a mean over nothing is NaN and its gradients are 0
        return result._replace(loss=torch.where(divisor != 0, total, torch.nan))
    losses = weighted(nll, lse, log_softmax_prior(operands.prior_logits)[:, : lse.shape[1]], weights)
    losses = losses if smoothing is None else losses + smoothing
    return NLL(nll, reduced(losses, divisor, reduction), lse if with_lse else None)


def _weights(
    terms: Terms,
    target: Tensor,  # (N,)
    valid: Tensor,  # (N,) bool
    n_classes: int,
    latent: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's weights for nll, L and L² (3, N), 0 if it is ignored; u ε/V (N,); and Σ u w[y], the divisor of a
    mean."""
    dtype = accumulation_dtype(latent.dtype)
    of_token = valid.to(dtype) if terms.token_weight is None else torch.where(valid, terms.token_weight.to(dtype), 0)
    of_target = of_token
    if terms.class_weight is not None:
        safe = torch.where(valid, target, 0).clamp(0, n_classes - 1)
        of_target = of_token * terms.class_weight.to(dtype)[safe]
    of_nll = (1 - terms.label_smoothing) * of_target
    weights = torch.stack([of_nll, torch.zeros_like(of_nll), of_token * terms.z_loss])
    return weights, of_token * (terms.label_smoothing / n_classes), of_target.sum()


def _with_external(
    vocabulary: "Vocabulary", operands: Operands, target: Tensor, ignore_index: int, extra_log_prob: Tensor
) -> tuple[Tensor, Tensor]:  # (N,), (N, K)
    """NLL and lse of a mixture with external components, which are mixed in after the ranks have summed theirs."""
    valid = target != ignore_index
    log_likelihood, lse = vocabulary.experts(operands, torch.where(valid, target, NONE)[:, None])
    components = torch.cat([log_likelihood.squeeze(2), extra_log_prob.to(lse.dtype)], 1)
    joint = log_softmax_prior(operands.prior_logits).to(lse.dtype) + torch.where(valid[:, None], components, 0)
    return torch.where(valid, -mixed(joint), 0), lse


def soft_loss(
    vocabulary: "Vocabulary",
    operands: Operands,
    index: Tensor,  # (N, M)
    target_prob: Tensor,  # (N, M)
    ignore_index: int,
    reduction: str,
    terms: Terms,
    with_lse: bool,
) -> NLL:
    """The loss with −Σ_m q_m log p(index_m) instead of the NLL. A mean divides by Σ u over tokens with a class."""
    if not with_lse:
        operands = operands.without_ignored((index != ignore_index).any(1))
    log_p, lse = at_classes(vocabulary, operands, index, ignore_index)
    probability = torch.where(index != ignore_index, target_prob.to(log_p.dtype), 0)
    nll = -torch.where(probability != 0, probability * log_p, 0).sum(1)
    of_token = (index != ignore_index).any(1).to(log_p.dtype)
    if terms.token_weight is not None:
        of_token = torch.where(of_token != 0, terms.token_weight.to(log_p.dtype), 0)
    weights = torch.stack([of_token, torch.zeros_like(of_token), of_token * terms.z_loss])
    losses = weighted(nll, lse, log_softmax_prior(operands.prior_logits), weights)
    return NLL(nll, reduced(losses, of_token.sum(), reduction), lse if with_lse else None)


def at_classes(
    vocabulary: "Vocabulary", operands: Operands, index: Tensor, ignore_index: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p of each token's classes, (N, M) and 0 where ignored, and the experts' log-normalisers, (N, K)."""
    counts = index != ignore_index
    log_likelihood, lse = vocabulary.experts(operands, torch.where(counts, index, NONE), temperature)
    log_prior = log_softmax_prior(operands.prior_logits).to(lse.dtype)
    joint = log_prior[..., None] + torch.where(counts[:, None], log_likelihood, 0)
    return torch.where(counts, mixed(joint), 0), lse


def check_external(extra_log_prob: Tensor | None, latent: Tensor) -> int:
    """Return K′, the number of external components. Raises TypeError or ValueError unless the tensor is (N, K′)."""
    if extra_log_prob is None:
        return 0
    if not isinstance(extra_log_prob, Tensor):
        raise TypeError(f"extra_log_prob must be a Tensor, got {type(extra_log_prob).__name__}")
    if extra_log_prob.dim() != 2 or extra_log_prob.shape[1] == 0:
        raise ValueError(f"extra_log_prob must be (N, K′) with K′ ≥ 1, got {tuple(extra_log_prob.shape)}")
    return extra_log_prob.shape[1]


def check_terms(terms: Terms, latent: Tensor, n_classes: int, soft: bool) -> None:
    n = latent.shape[0]
    check_terms_of_loss(terms.label_smoothing, terms.z_loss)
    if terms.class_weight is not None:
        check_numbers("class_weight", terms.class_weight, (n_classes,), "(V,)", latent)
        check_constant("class_weight", terms.class_weight)
    if terms.token_weight is not None:
        check_numbers("token_weight", terms.token_weight, (n,), "(N,)", latent)
        check_constant("token_weight", terms.token_weight)
    if terms.extra_log_prob is not None:
        check_numbers("extra_log_prob", terms.extra_log_prob, (n, terms.n_external), "(N, K′)", latent)
    clashes = {"class_weight": terms.class_weight is not None, "label_smoothing": terms.label_smoothing > 0}
    for name, given in clashes.items():
        if given and soft:
            raise ValueError(f"{name} is for targets that are classes; with target_prob, apply it to the probabilities")
    if terms.extra_log_prob is not None and (soft or terms.label_smoothing):
        other = "target_prob" if soft else "label_smoothing"
        raise ValueError(f"{other} needs more than the targets' probabilities, and extra_log_prob holds only those")


def check_terms_of_loss(label_smoothing: float, z_loss: float) -> None:
    check_number("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
