"""The definition: Mixture of Softmaxes in plain, differentiable torch that materialises everything.

Any floating dtype; in float64 it is the oracle of the tests. Time and memory are those of the
unfused head: K distributions of V words for every token.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the vocabulary and log-probabilities are float32 for 16-bit inputs, else the input's dtype."""
    return torch.promote_types(dtype, torch.float32)


def logits(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
) -> Tensor:  # (N, K, V)
    return torch.nn.functional.linear(latent, weight, bias).to(accumulation_dtype(latent.dtype))


def logsumexp(latent: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """L[n,k] = log Σ_v exp l[n,k,v], (N, K)."""
    return torch.logsumexp(logits(latent, weight, bias), dim=-1)


def log_prob(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    eps: float = 0.0,
) -> Tensor:  # (N, V)
    """log Σ_k π_k softmax_v(l_k), paper eq. of section 2.3.

    `eps` is for parity with the paper's published code, which takes log(p + 1e-8) and so adds
    V·1e-8 of probability; 0 is exact.
    """
    log_softmax = torch.log_softmax(logits(latent, weight, bias), dim=-1)
    log_prior = log_softmax_prior(prior_logits).to(log_softmax.dtype)
    result = torch.logsumexp(log_prior[..., None] + log_softmax, dim=1)
    return torch.log(result.exp() + eps) if eps else result


def nll(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,) int64
    ignore_index: int = -100,
    eps: float = 0.0,
) -> Tensor:  # (N,)
    """−log p(target), 0 where the target is `ignore_index`."""
    log_p = log_prob(latent, prior_logits, weight, bias, eps)
    return torch.nn.functional.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none")


def sample(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # (N,) int64
    """One class per token from Σ_k π_k softmax(l_k / temperature); −1 where no class can be drawn."""
    softmax = torch.softmax(logits(latent, weight, bias) / temperature, dim=-1)
    prior = log_softmax_prior(prior_logits).exp().to(softmax.dtype)
    mixture = (prior[..., None] * softmax).sum(dim=1)
    if mixture.shape[0] == 0:  # torch.multinomial refuses an empty batch
        return torch.empty(0, dtype=torch.int64, device=latent.device)
    drawable = mixture.sum(1, keepdim=True) > 0
    drawn = torch.multinomial(torch.where(drawable, mixture, 1), 1, generator=generator)
    return torch.where(drawable, drawn, -1).squeeze(1)


def log_softmax_prior(prior_logits: Tensor) -> Tensor:  # (N, K) -> (N, K)
    """log π = log_softmax_k a, never below float32."""
    return torch.log_softmax(prior_logits, dim=-1, dtype=accumulation_dtype(prior_logits.dtype))


def mix_target(
    log_prior: Tensor,  # (N, K)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    target_logit: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor]:  # (N,), (N, K)
    """From the saved statistics to the mixture: nll = −LSE_k j and responsibilities r = softmax_k j,
    with j = log π + t − L, L = maximum + log_total."""
    joint = log_prior + ((target_logit - maximum) - log_total)
    log_likelihood = torch.logsumexp(joint, dim=-1)
    # where every expert gives probability zero (a masked class), nobody is responsible
    finite = log_likelihood.clamp_min(torch.finfo(joint.dtype).min)
    return -log_likelihood, torch.exp(joint - finite[..., None])
