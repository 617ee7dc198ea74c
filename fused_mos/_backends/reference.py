"""The definition of every result: the Mixture of Softmaxes in plain, differentiable torch.

It takes any floating dtype; in float64 it is the tests' oracle. Time and memory are those of an unfused head, which
forms K distributions over V classes for every token.
"""

import torch
from torch import Tensor

from .transform import IDENTITY, Transform


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over the vocabulary and of log-probabilities: float32 for 16-bit inputs, else the input's."""
    return torch.promote_types(dtype, torch.float32)


def logits(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform = IDENTITY,
) -> Tensor:  # (N, K, V)
    return transformed(torch.nn.functional.linear(latent, weight, bias).to(accumulation_dtype(latent.dtype)), transform)


def transformed(logits: Tensor, transform: Transform) -> Tensor:
    """c·tanh(l/c) / T."""
    softcap, temperature = transform
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if temperature == 1 else logits / temperature


def logsumexp(latent: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform = IDENTITY) -> Tensor:
    """L[n,k] = log Σ_v exp l[n,k,v], (N, K)."""
    return torch.logsumexp(logits(latent, weight, bias, transform), dim=-1)


def log_prob(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform = IDENTITY,
) -> Tensor:  # (N, V)
    """log Σ_k π_k softmax_v(l_k), the paper's section 2.3. (The published code adds 1e-8 to each probability.)"""
    log_softmax = torch.log_softmax(logits(latent, weight, bias, transform), dim=-1)
    log_prior = log_softmax_prior(prior_logits).to(log_softmax.dtype)
    return mixed(log_prior[..., None] + log_softmax)


def expert_log_prob(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (N, M) int64, classes
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor]:  # (N, K, M), (N, K)
    """Each expert's log-probabilities l − L of given classes, and its log-normaliser L."""
    all_logits = logits(latent, weight, bias, transform)
    lse = torch.logsumexp(all_logits, dim=-1)
    of_all_experts = index[:, None].expand(-1, latent.shape[1], -1)
    return torch.log_softmax(all_logits, dim=-1).gather(2, of_all_experts), lse


def nll(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    ignore_index: int = -100,
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor]:  # (N,), (N, K)
    """−log p(target), 0 where the target is `ignore_index`, and the log-normalisers L."""
    valid = target != ignore_index
    index = torch.where(valid, target, 0)[:, None]
    log_likelihood, lse = expert_log_prob(latent, weight, bias, index, transform)
    joint = log_softmax_prior(prior_logits).to(lse.dtype) + log_likelihood.squeeze(2)
    return torch.where(valid, -mixed(joint), 0), lse


def mixed(joint: Tensor) -> Tensor:  # (N, K, …) -> (N, …)
    """log Σ_k exp joint, with a gradient of 0 instead of NaN where every expert has probability 0."""
    impossible = (joint == -torch.inf).all(1)
    return torch.where(impossible, -torch.inf, torch.logsumexp(torch.where(impossible[:, None], 0, joint), dim=1))


def sample(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform = IDENTITY,
    generator: torch.Generator | None = None,
) -> Tensor:  # (N,) int64
    """Draw one class per token from Σ_k π_k softmax(l_k); −1 if no class can be drawn."""
    softmax = torch.softmax(logits(latent, weight, bias, transform), dim=-1)
    prior = log_softmax_prior(prior_logits).exp().to(softmax.dtype)
    mixture = (prior[..., None] * softmax).sum(dim=1)
    if mixture.shape[0] == 0:  # torch.multinomial refuses an empty batch
        return torch.empty(0, dtype=torch.int64, device=latent.device)
    drawable = mixture.sum(1, keepdim=True) > 0
    drawn = torch.multinomial(torch.where(drawable, mixture, 1), 1, generator=generator)
    return torch.where(drawable, drawn, -1).squeeze(1)


def log_softmax_prior(prior_logits: Tensor) -> Tensor:  # (N, K) -> (N, K)
    """log π = log_softmax_k a, in float32 or wider."""
    return torch.log_softmax(prior_logits, dim=-1, dtype=accumulation_dtype(prior_logits.dtype))


def mix_target(
    log_prior: Tensor,  # (N, K)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    target_logit: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor]:  # (N,), (N, K)
    """nll = −log Σ_k exp j and the responsibilities r = softmax_k j, from the saved statistics: j = log π + t − L with
    L = maximum + log_total and the target logit t."""
    joint = log_prior + ((target_logit - maximum) - log_total)
    log_likelihood = torch.logsumexp(joint, dim=-1)
    # if every expert gives the target probability 0 (a masked class), all responsibilities are 0
    finite = log_likelihood.clamp_min(torch.finfo(joint.dtype).min)
    return -log_likelihood, torch.exp(joint - finite[..., None])
