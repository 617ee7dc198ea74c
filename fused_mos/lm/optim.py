"""NT-ASGD: SGD that starts to average when validation stops improving (Merity et al. 2017, section 3)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class NTASGD:
    """SGD until the non-monotone trigger, then ASGD (torch.optim, t0 = 0, lambd = 0) to the end.

    Call `record(valid_loss)` after each epoch: once more than `nonmono` values are recorded and the newest is
    worse than the best of all but the last `nonmono`, averaging starts. `averaged()` puts the averages in
    place for validation and checkpoints.

    torch.optim.ASGD takes each step with the learning rate that was set before the previous step. The rescaling
    by BPTT length is meant for its own segment, as under SGD, so `step` gives ASGD its rate without the lag.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, nonmono: int = 5):
        self.parameters = list(parameters)
        self.lr = lr
        self.weight_decay = weight_decay
        self.nonmono = nonmono
        self.history: list[float] = []
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters, lr=lr, weight_decay=weight_decay)

    @property
    def averaging(self) -> bool:
        return isinstance(self.optimizer, torch.optim.ASGD)

    def start_averaging(self) -> None:
        self.optimizer = torch.optim.ASGD(self.parameters, lr=self.lr, t0=0, lambd=0.0, weight_decay=self.weight_decay)

    def record(self, valid_loss: float) -> bool:
        """Returns whether the trigger fires, which also ends fine-tuning."""
        history = self.history
        fires = len(history) > self.nonmono and valid_loss > min(history[: -self.nonmono or None])
        if fires and not self.averaging:
            self.start_averaging()
        history.append(valid_loss)
        return fires

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, scale: float = 1.0) -> None:
        """One step at the learning rate lr·scale."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        if self.averaging:
            for state in self.optimizer.state.values():
                state["eta"].fill_(self.lr * scale)
        self.optimizer.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the parameters hold their averages, if averaging has begun."""
        states = [self.optimizer.state.get(p, {}) for p in self.parameters] if self.averaging else []
        swapped = [(p, state["ax"]) for p, state in zip(self.parameters, states) if "ax" in state]
        current = [p.detach().clone() for p, _ in swapped]
        with torch.no_grad():
            for p, average in swapped:
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), value in zip(swapped, current):
                    p.copy_(value)

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors, by name, and what JSON can hold: together they resume the optimizer exactly."""
        tensors = {}
        for index, parameter in enumerate(self.parameters):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{index}.{name}"] = value
        return tensors, {"averaging": self.averaging, "history": self.history}

    def load_state_dict(self, tensors: dict[str, Tensor], meta: dict) -> None:
        self.history = list(meta["history"])
        if meta["averaging"]:
            self.start_averaging()
        for key, value in tensors.items():
            index, name = key.split(".")
            self.optimizer.state[self.parameters[int(index)]][name] = value
