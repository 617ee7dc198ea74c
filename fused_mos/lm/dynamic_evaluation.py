"""Dynamic evaluation (Krause et al. 2018): a model that goes on learning from the text that it predicts.

Gradient statistics of the training set say how far each weight may move: with g the gradient of a segment's mean loss,

    MS = √Σ g²    rate = min(MS / Σ_parameters mean(MS), 1/λ)    θ += λ·rate·(θ₀ − θ) − η·g/(MS + ε)

after each segment of the text, whose words are predicted before they are learnt. No dropout is on: the published code
leaves the recurrent one on in its port to PyTorch 0.4.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import segment
from .awd_lstm import AWDLSTM, Hidden, detach, gradients


@dataclass(frozen=True)
class DynamicRule:
    """How a model is updated; the defaults are the paper's on Penn Treebank."""

    lr: float = 0.002
    """Learning rate of the scaled gradients (η)."""
    lamb: float = 0.075
    """How strongly weights are drawn back to the trained ones (λ)."""
    epsilon: float = 0.001
    """Added to the gradients' root mean square (ε)."""
    bptt: int = 5
    """Words between updates."""

    def check(self) -> None:
        """Raises ValueError naming the field and its value."""
        for name in ("lr", "lamb", "epsilon", "bptt"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")


class GradientStatistics:
    """Σ g² over segments of the training set; resumable, since all of its state is `sums`, `hidden` and `row`."""

    def __init__(self, model: AWDLSTM, source: Tensor, bptt: int = 5):
        """source: (T, B), as `batchify` makes it; the paper's B is 100."""
        self.model, self.source, self.bptt = model.eval(), source, bptt
        self.sums = [torch.zeros_like(p) for p in model.parameters()]
        self.hidden: Hidden = model.initial_hidden(source.shape[1])
        self.row = 0

    def __iter__(self) -> Iterator[int]:
        """Yields the rows of each segment, once it is in the sums."""
        while self.row < self.source.shape[0] - 1:
            inputs, targets = segment(self.source, self.row, self.bptt)
            self.model.zero_grad(set_to_none=True)
            output = self.model(inputs, targets, self.hidden)
            output.loss.backward()
            g = gradients(self.model.parameters())
            torch._foreach_addcmul_(self.sums, g, g)
            self.hidden = detach(output.hidden)
            self.row += inputs.shape[0]
            yield inputs.shape[0]

    def root_mean_squares(self) -> list[Tensor]:
        """MS of each parameter. (As in the published code a sum, not a mean, over segments.)"""
        return [total.sqrt() for total in self.sums]


class DynamicEvaluation:
    """Predicts a text word by word and learns it; resumable, since all of its state is the model's parameters,
    `hidden`, `row` and `total`."""

    def __init__(self, model: AWDLSTM, source: Tensor, root_mean_squares: list[Tensor], rule: DynamicRule):
        """source: (T, B); the paper's B is 1. The model's present parameters are the trained ones, θ₀."""
        rule.check()
        self.model, self.source, self.rule = model.eval(), source, rule
        self.parameters: list[Tensor] = list(model.parameters())
        self.trained = [p.detach().clone() for p in self.parameters]
        scale = sum(ms.mean() for ms in root_mean_squares)
        # λ·min(MS/Σ, 1/λ): the share of the way back to θ₀ that each step takes
        self.decay = [(ms * (rule.lamb / scale)).clamp_(max=1.0) for ms in root_mean_squares]
        self.step_sizes = [rule.lr / (ms + rule.epsilon) for ms in root_mean_squares]
        self.hidden: Hidden = model.initial_hidden(source.shape[1])
        self.row = 0
        self.total = torch.zeros((), dtype=torch.float64, device=source.device)  # nats of all words predicted

    def __iter__(self) -> Iterator[int]:
        """Yields the rows of each segment, once it is predicted and learnt."""
        while self.row < self.source.shape[0] - 1:
            inputs, targets = segment(self.source, self.row, self.rule.bptt)
            self.model.zero_grad(set_to_none=True)
            output = self.model(inputs, targets, self.hidden)
            self.total -= output.log_likelihood.detach().sum(dtype=torch.float64)
            output.loss.backward()
            self._update()
            self.hidden = detach(output.hidden)
            self.row += inputs.shape[0]
            yield inputs.shape[0]

    @torch.no_grad()
    def _update(self) -> None:
        back = torch._foreach_sub(self.trained, self.parameters)
        torch._foreach_mul_(back, self.decay)
        torch._foreach_addcmul_(back, gradients(self.parameters), self.step_sizes, value=-1.0)
        torch._foreach_add_(self.parameters, back)

    @property
    def loss(self) -> float:
        """Mean NLL in nats of the words predicted so far, read from the device."""
        return self.total.item() / max(self.row * self.source.shape[1], 1)
