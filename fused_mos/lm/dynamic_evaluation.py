"""Dynamic evaluation (Krause et al. 2018): a model that keeps learning from the text it predicts.

Gradient statistics of the training set determine how far each weight may move. With g the gradient of a segment's mean
loss, the update after each segment of the text is

    MS = √Σ g²    rate = min(MS / Σ_parameters mean(MS), 1/λ)    θ += λ·rate·(θ₀ − θ) − η·g/(MS + ε)

The words of a segment are predicted before they are learned. All dropout is off. (The published code leaves recurrent
dropout on in its port to PyTorch 0.4.)
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
    """Hyperparameters of the update. The defaults are the paper's for Penn Treebank."""

    lr: float = 0.002
    """Learning rate of the scaled gradients (η)."""
    lamb: float = 0.075
    """Decay of the weights towards the trained ones (λ)."""
    epsilon: float = 0.001
    """Added to the gradients' root mean square (ε)."""
    bptt: int = 5
    """Words between updates."""

    def check(self) -> None:
        """Raise ValueError, with the field and its value, if a field is out of range."""
        for name in ("lr", "lamb", "epsilon", "bptt"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")


class GradientStatistics:
    """Σ g² over segments of the training set. Its whole state is `sums`, `hidden` and `row`, so it can be resumed."""

    def __init__(self, model: AWDLSTM, source: Tensor, bptt: int = 5):
        """`source` is (T, B), from `batchify`. The paper uses B = 100."""
        self.model, self.source, self.bptt = model.eval(), source, bptt
        self.sums = [torch.zeros_like(p) for p in model.parameters()]
        self.hidden: Hidden = model.initial_hidden(source.shape[1])
        self.row = 0

    def __iter__(self) -> Iterator[int]:
        """Yield the number of rows of each segment after adding it to the sums."""
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
        """MS of each parameter. (As in the published code, it is a sum over segments, not a mean.)"""
        return [total.sqrt() for total in self.sums]


class DynamicEvaluation:
    """Predicts a text word by word and learns from it. Its whole state is the model's parameters, `hidden`, `row` and
    `total`, so it can be resumed."""

    def __init__(self, model: AWDLSTM, source: Tensor, root_mean_squares: list[Tensor], rule: DynamicRule):
        """`source` is (T, B); the paper uses B = 1. The model's current parameters become θ₀."""
        rule.check()
        self.model, self.source, self.rule = model.eval(), source, rule
        self.parameters: list[Tensor] = list(model.parameters())
        self.trained = [p.detach().clone() for p in self.parameters]
        scale = sum(ms.mean() for ms in root_mean_squares)
        # λ·min(MS/Σ, 1/λ), the fraction of the way back to θ₀ in each step
        self.decay = [(ms * (rule.lamb / scale)).clamp_(max=1.0) for ms in root_mean_squares]
        self.step_sizes = [rule.lr / (ms + rule.epsilon) for ms in root_mean_squares]
        self.hidden: Hidden = model.initial_hidden(source.shape[1])
        self.row = 0
        self.total = torch.zeros((), dtype=torch.float64, device=source.device)  # in nats, over all words predicted

    def __iter__(self) -> Iterator[int]:
        """Yield the number of rows of each segment after predicting and learning it."""
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
