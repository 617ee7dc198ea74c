"""The continuous cache (Grave, Joulin & Usunier, "Improving Neural Language Models with a Continuous Cache", ICLR 2017,
section 3): words of the recent text are likelier to come again, the more so the likelier they were in such a place.

A model that reads x₁, x₂, … leaves pairs (hᵢ, xᵢ₊₁): its hidden vector after a word, and the word that came next. The
cache holds the last W of them, of which hₜ makes a distribution over their words; it is mixed with the model's own:

    (1)  p_cache(w) ∝ Σ_{i = t−W … t−1} 1[w = xᵢ₊₁] exp(θ hₜ·hᵢ)
    (2)  p(w) = (1 − λ) p_model(w) + λ p_cache(w)                   ("linear interpolation")

θ = 0 makes (1) the relative frequencies in the window, a large θ the word of the most similar place alone. A perplexity
needs the probability of the next word y = xₜ₊₁ alone, so nothing here has the size of the vocabulary:

    (3)  log p_cache(y) = logsumexp_{i: xᵢ₊₁ = y} θ hₜ·hᵢ − logsumexp_i θ hₜ·hᵢ

Before the second word the cache is empty; then p = p_model. (AWD-LSTM's pointer.py has p = p_model until the window is
full, and at the first word of each of its segments.)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128
"""Words whose scores are one product: on (BLOCK, window + BLOCK) numbers at a time."""


class ContinuousCache:
    """The last `window` pairs (hᵢ, xᵢ₊₁) of a text, which is given piece by piece.

    All of it is in float64: an error of a score θ h·h is one of a logarithm, whatever the scores' size, and a text
    comes out the same however it is cut.

    Args:
        window: W, of (1).
        width: D, of the hidden vectors.
        block: words at a time; it changes speed and memory alone.
    """

    def __init__(self, window: int, width: int, device: torch.device | None = None, block: int = BLOCK):
        if window < 1:
            raise ValueError(f"window must be positive, got {window}")
        self.window, self.block = window, block
        self.keys = torch.empty(0, width, dtype=torch.float64, device=device)  # (≤ window, D), hᵢ
        self.words = torch.empty(0, dtype=torch.int64, device=device)  # (≤ window,), xᵢ₊₁

    def log_likelihood(
        self,
        hidden: Tensor,  # (N, D), hₜ of the next N words read
        target: Tensor,  # (N,), xₜ₊₁
        thetas: Sequence[float],  # (θ,), each ≥ 0
    ) -> Tensor:  # (θ, N) float64
        """log p_cache of each target, (3), for each of the thetas, and takes the pairs in, each after its own
        prediction. −∞ where the target is not in the window; NaN, 0/0, where the cache is empty."""
        pieces = zip(hidden.double().split(self.block), target.split(self.block))
        return torch.cat([self._block(h, y, thetas) for h, y in pieces], dim=1)

    def _block(self, hidden: Tensor, target: Tensor, thetas: Sequence[float]) -> Tensor:
        n_before = len(self.words)
        keys = torch.cat([self.keys, hidden])  # (n_before + B, D)
        words = torch.cat([self.words, target])  # (n_before + B,)
        scores = hidden @ keys.T  # (B, n_before + B)
        # row r stands at n_before + r and sees the window before that
        outside = (
            torch.ones_like(scores, dtype=torch.bool).tril(n_before - 1).triu(n_before - self.window).logical_not()
        )
        elsewhere = outside | (words != target[:, None])
        log_likelihoods = []
        for theta in thetas:
            logits = (theta * scores).masked_fill_(outside, -math.inf)
            normalizer = logits.logsumexp(1)
            log_likelihoods.append(logits.masked_fill_(elsewhere, -math.inf).logsumexp(1) - normalizer)
        self.keys, self.words = keys[-self.window :], words[-self.window :]
        return torch.stack(log_likelihoods)


def interpolated(
    model: Tensor,  # (N,) float64, log p_model of each word
    cache: Tensor,  # (N,) float64, log p_cache of each, as `ContinuousCache` gives it
    lambdasm: float,  # λ, in [0, 1)
) -> Tensor:  # (N,)
    """log p of (2), and log p_model where the cache is empty."""
    mixed = torch.logaddexp(math.log1p(-lambdasm) + model, cache.new_tensor(lambdasm).log() + cache)
    return torch.where(cache.isnan(), model, mixed)
