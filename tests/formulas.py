"""The functions of a head as plain formulas over all logits, to test the reference."""

import torch
from torch import Tensor


def logits(latent, weight, bias=None, softcap=None, temperature=1.0) -> Tensor:  # (N, K, V)
    result = torch.einsum("nkd,vd->nkv", latent, weight)
    if bias is not None:
        result = result + bias
    return (result if softcap is None else softcap * torch.tanh(result / softcap)) / temperature


def log_prob(latent, prior_logits, weight, bias=None, softcap=None, temperature=1.0, mixture_temperature=1.0) -> Tensor:
    log_softmax = logits(latent, weight, bias, softcap, temperature).log_softmax(-1)
    mixture = torch.logsumexp(prior_logits.log_softmax(-1)[..., None] + log_softmax, 1)
    return (mixture / mixture_temperature).log_softmax(-1)


def loss(
    latent,
    prior_logits,
    weight,
    target,
    bias=None,
    *,
    ignore_index=-100,
    reduction="mean",
    softcap=None,
    class_weight=None,
    token_weight=None,
    label_smoothing=0.0,
    z_loss=0.0,
    target_prob=None,
    extra_log_prob=None,
) -> Tensor:
    n_experts, n_classes = latent.shape[1], weight.shape[0]
    w = torch.ones(n_classes, dtype=latent.dtype) if class_weight is None else class_weight
    u = torch.ones(latent.shape[0], dtype=latent.dtype) if token_weight is None else token_weight
    of_experts = logits(latent, weight, bias, softcap)
    log_prior = prior_logits.log_softmax(-1)
    z = (log_prior[:, :n_experts].exp() * torch.logsumexp(of_experts, -1) ** 2).sum(1)
    joint = log_prior[:, :n_experts, None] + of_experts.log_softmax(-1)
    counts = target != ignore_index
    of_classes = torch.where(counts, target, 0)
    if extra_log_prob is not None:
        own = joint.gather(2, of_classes[:, None, None].expand(-1, n_experts, 1))[..., 0]
        nll = -torch.logsumexp(torch.cat([own, log_prior[:, n_experts:] + extra_log_prob], 1), 1)
        per_token, divisor = nll * w[of_classes], u * w[of_classes]
    elif target_prob is not None:
        log_p = torch.logsumexp(joint, 1)
        per_token = -(target_prob * counts * log_p.gather(1, of_classes)).sum(1)
        counts = counts.any(1)
        divisor = u
    else:
        log_p = torch.logsumexp(joint, 1)
        per_token = -(1 - label_smoothing) * w[of_classes] * log_p.gather(1, of_classes[:, None])[:, 0]
        per_token = per_token - label_smoothing / n_classes * (w * log_p).sum(1)
        divisor = u * w[of_classes]
    per_token = torch.where(counts, u * (per_token + z_loss * z), 0)
    if reduction == "none":
        return per_token
    return per_token.sum() / (torch.where(counts, divisor, 0).sum() if reduction == "mean" else 1)
