"""The continuous cache (Grave, Joulin & Usunier, "Improving Neural Language Models with a Continuous Cache", ICLR 2017,
section 3): recent words are more likely to occur again, above all those that followed similar contexts.

A model that reads x₁, x₂, … produces pairs (hᵢ, xᵢ₊₁): its hidden vector after a word, and the next word. The cache
holds the last W pairs. hₜ defines a distribution over their words, which is mixed with the model's own:

    (1)  p_cache(w) ∝ Σ_{i = t−W … t−1} 1[w = xᵢ₊₁] exp(θ hₜ·hᵢ)
    (2)  p(w) = (1 − λ) p_model(w) + λ p_cache(w)                   ("linear interpolation")

With θ = 0, (1) is the relative frequency in the window; with a large θ, only the word of the most similar context
counts. A perplexity needs only the probability of the next word y = xₜ₊₁, so nothing here has the size of the
vocabulary:

    (3)  log p_cache(y) = logsumexp_{i: xᵢ₊₁ = y} θ hₜ·hᵢ − logsumexp_i θ hₜ·hᵢ

Before the second word the cache is empty and p = p_model. (In AWD-LSTM's pointer.py, p = p_model until the window is
full, and at the first word of each of its segments.)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 128
"""Words whose scores are computed in one product, (BLOCK, window + BLOCK) numbers."""


class ContinuousCache:
    """The last `window` pairs (hᵢ, xᵢ₊₁) of a text that arrives piece by piece.

    Everything is float64: the error of a score θ h·h is the absolute error of a logarithm, however large the score. The
    results do not depend on how the text is cut.

    Args:
        window: W in (1).
        width: D, the size of the hidden vectors.
        block: words per product; it affects only speed and memory.
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
        """log p_cache of each target by (3), for each theta. Each pair enters the cache after its own prediction.

        The result is −∞ where the target is not in the window, and NaN (0/0) where the cache is empty.
        """
        pieces = zip(hidden.double().split(self.block), target.split(self.block))
        return torch.cat([self._block(h, y, thetas) for h, y in pieces], dim=1)

    def _block(self, hidden: Tensor, target: Tensor, thetas: Sequence[float]) -> Tensor:
        n_before = len(self.words)
        keys = torch.cat([self.keys, hidden])  # (n_before + B, D)
        words = torch.cat([self.words, target])  # (n_before + B,)
        scores = hidden @ keys.T  # (B, n_before + B)
        # row r is at position n_before + r and sees the window before it
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
    cache: Tensor,  # (N,) float64, log p_cache of each, from `ContinuousCache`
    lambdasm: float,  # λ, in [0, 1)
) -> Tensor:  # (N,)
    """log p by (2), or log p_model where the cache is empty."""
    mixed = torch.logaddexp(math.log1p(-lambdasm) + model, cache.new_tensor(lambdasm).log() + cache)
    return torch.where(cache.isnan(), model, mixed)
