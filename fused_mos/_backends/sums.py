"""Sums over the mixture's classes that need every log-probability once, and their derivatives."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sum(NamedTuple):
    """A function of a token's log-probabilities.

        "classes"   Σ_v w_v log p_v, with w = 1 without class weights
        "entropy"   −Σ_v p_v log p_v
        "tempered"  log Σ_v exp(log p_v / temperature)

    Its backward pass needs s[n,k] = Σ_v q ∂sum/∂log p_v. For the entropy this is −Σ_v q p (log p + 1). Spans of the
    vocabulary sum only −Σ_v q p log p; the rest is −π over all classes, which `completed` adds.
    """

    kind: str
    class_weight: Tensor | None = None  # (V,)
    temperature: float = 1.0
    value: Tensor | None = None  # (N,): the value of the sum, for the derivative of "tempered"

    def terms(self, log_p: Tensor, columns: slice) -> tuple[Tensor, Tensor]:  # (n, columns) each
        """The terms of the sum and the factors of q in s, for a span of classes. Not for "tempered"."""
        if self.kind == "entropy":
            finite = torch.where(log_p > -torch.inf, log_p, 0)  # 0·log 0 is 0, and so is its gradient
            terms = torch.where(log_p > -torch.inf, -finite.exp() * finite, 0)
            return terms, terms
        if self.class_weight is None:
            return log_p, torch.ones_like(log_p)
        weight = self.class_weight[columns].expand_as(log_p)
        return torch.where(weight != 0, weight, 0) * torch.where(weight != 0, log_p, 0), weight

    def completed(self, s: Tensor, log_prior: Tensor) -> Tensor:  # (N, K), (N, K)
        """s over all classes, from what their spans have summed."""
        return s - log_prior.exp() if self.kind == "entropy" else s

    def derivative(self, log_p: Tensor, columns: slice, tokens: slice) -> Tensor:  # (n, columns)
        """∂sum/∂log p for a span of classes and tokens, as a new tensor."""
        if self.kind == "entropy":
            p = log_p.exp()
            return torch.where(p > 0, -p * (log_p + 1), 0)
        if self.kind == "classes":
            return torch.zeros_like(log_p) + (1 if self.class_weight is None else self.class_weight[columns])
        assert self.value is not None
        return torch.exp(log_p / self.temperature - self.value[tokens, None]) / self.temperature
