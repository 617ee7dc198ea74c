"""Sums over the mixture's classes that need every log-probability once: what they are, and their derivatives."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sum(NamedTuple):
    """A function of a token's log-probabilities.

    "classes"   Σ_v w_v log p_v, with w = 1 where there are no class weights
    "entropy"   −Σ_v p_v log p_v
    "tempered"  log Σ_v exp(log p_v / temperature)
    """

    kind: str
    class_weight: Tensor | None = None  # (V,)
    temperature: float = 1.0
    value: Tensor | None = None  # (N,): what it is, for the derivative of "tempered"

    def terms(self, log_p: Tensor, columns: slice) -> tuple[Tensor, Tensor]:  # (n, columns) each
        """The terms of a sum and their derivatives by log p, for some of the classes; not of "tempered"."""
        if self.kind == "entropy":
            p = log_p.exp()
            return torch.where(p > 0, -p * log_p, 0), self._entropy_derivative(p, log_p)
        if self.class_weight is None:
            return log_p, torch.ones_like(log_p)
        weight = self.class_weight[columns].expand_as(log_p)
        return torch.where(weight != 0, weight * log_p, 0), weight

    def derivative(self, log_p: Tensor, columns: slice, tokens: slice) -> Tensor:  # (n, columns)
        """A fresh tensor."""
        if self.kind == "entropy":
            return self._entropy_derivative(log_p.exp(), log_p)
        if self.kind == "classes":
            return torch.zeros_like(log_p) + (1 if self.class_weight is None else self.class_weight[columns])
        assert self.value is not None
        return torch.exp(log_p / self.temperature - self.value[tokens, None]) / self.temperature

    @staticmethod
    def _entropy_derivative(p: Tensor, log_p: Tensor) -> Tensor:
        return torch.where(p > 0, -p * (log_p + 1), 0)
