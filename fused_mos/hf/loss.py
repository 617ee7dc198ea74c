"""The loss that a forward pass asks the head for instead of logits."""

import dataclasses
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass
class LossRequest:
    """The loss of transformers' ForCausalLMLoss, with label smoothing."""

    labels: Tensor  # (B, T)
    shifted: bool
    n_items: Tensor | int | None
    """Divisor of the sum, the number of targets in all micro-batches; None for a mean."""
    ignore_index: int
    label_smoothing: float

    @classmethod
    def of(cls, arguments: dict[str, Any], label_smoothing: float) -> "LossRequest":
        """The request of a model's keyword arguments, which contain "labels"."""
        shifted = arguments.get("shift_labels")
        return cls(
            labels=arguments["labels"] if shifted is None else shifted,
            shifted=shifted is not None,
            n_items=arguments.get("num_items_in_batch"),
            ignore_index=arguments.get("ignore_index", -100),
            label_smoothing=label_smoothing,
        )

    @property
    def reduction(self) -> str:
        return "mean" if self.n_items is None else "sum"

    def target(self, hidden: Tensor) -> Tensor:
        """The next class at each position, (B, T)."""
        labels = self.labels.to(hidden.device)
        return labels if self.shifted else nn.functional.pad(labels, (0, 1), value=self.ignore_index)[..., 1:]

    def reduced(self, loss: Tensor) -> Tensor:
        if self.n_items is None:
            return loss
        return loss / (self.n_items.to(loss.device) if isinstance(self.n_items, Tensor) else self.n_items)
