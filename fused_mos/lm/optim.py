"""NT-ASGD: SGD that starts averaging when the validation loss stops improving (Merity et al. 2017, section 3)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class NTASGD:
    """SGD until the non-monotone trigger, then SGD with an average of its iterates (ASGD with t0 = 0, lambd = 0).

    Call `record(valid_loss)` after each epoch. Averaging starts once more than `nonmono` losses are recorded and the
    newest is worse than the best of all but the last `nonmono`. Use `averaged()` for validation and checkpoints.

    The average is that of torch.optim.ASGD: over all iterates since averaging started, except the first. The steps
    differ: torch.optim.ASGD takes each step with the learning rate of the previous one, but the rescaling by BPTT
    length is meant for the current segment. It also reads the learning rate back from the device at every step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, nonmono: int = 5):
        self.parameters: list[Tensor] = list(parameters)
        self.lr = lr
        self.nonmono = nonmono
        self.history: list[float] = []
        self.averages: list[Tensor] | None = None
        self.averaged_steps = 0
        self.sgd = torch.optim.SGD(self.parameters, lr=lr, weight_decay=weight_decay, fused=True)

    @property
    def averaging(self) -> bool:
        return self.averages is not None

    def start_averaging(self) -> None:
        self.averages = [p.detach().clone() for p in self.parameters]
        self.averaged_steps = 0

    def record(self, valid_loss: float) -> bool:
        """Record a validation loss and return True if the trigger fires, which also ends fine-tuning."""
        history = self.history
        fires = len(history) > self.nonmono and valid_loss > min(history[: -self.nonmono or None])
        if fires and not self.averaging:
            self.start_averaging()
        history.append(valid_loss)
        return fires

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.sgd.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Take one step with the learning rate lr·scale."""
        for group in self.sgd.param_groups:
            group["lr"] = self.lr * scale
        self.sgd.step()
        if self.averages is not None:
            self.averaged_steps += 1
            torch._foreach_lerp_(self.averages, self.parameters, 1 / max(1, self.averaged_steps - 1))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the parameters by their averages inside the `with` block, if averaging has started."""
        if self.averages is None:
            yield
            return
        current = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, current)

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """The optimizer's tensors by name, and the rest of its state as JSON values."""
        tensors = {f"average.{i}": average for i, average in enumerate(self.averages or ())}
        return tensors, {"averaging": self.averaging, "averaged_steps": self.averaged_steps, "history": self.history}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Restore the optimizer from `state_dict`. Raises KeyError if an entry is missing, ValueError if a tensor has
        another shape."""
        self.history, self.averaged_steps = list(meta["history"]), meta["averaged_steps"]
        self.averages = None
        if meta["averaging"]:
            averages = [tensors[f"average.{i}"] for i in range(len(self.parameters))]
            for i, (average, p) in enumerate(zip(averages, self.parameters)):
                if average.shape != p.shape:
                    raise ValueError(f"average.{i} is {tuple(average.shape)} there and {tuple(p.shape)} here")
            self.averages = [average.to(p.device, p.dtype) for average, p in zip(averages, self.parameters)]
