"""Times a training step stage by stage."""

import statistics
import time
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..lm import AWDLSTM


class StepProfile:
    """Times the stages of `steps` training steps.

    Each `mark` names the stage that ends with it. Hooks mark the model's layers and its head, forward and backward. On
    a GPU the marks are CUDA events, so the host does not wait until `report` is called.
    """

    WARM_UP = 3
    """First steps that are not counted: they allocate memory and select algorithms."""

    def __init__(self, model: AWDLSTM, steps: int):
        self.device = model.encoder.weight.device
        self.steps = steps
        self._marks: list[list[tuple[str, Any]]] = []
        self._words: list[int] = []
        self._handles: list[RemovableHandle] = []
        for i, rnn in enumerate(model.rnns, start=1):
            self._attach(rnn, f"LSTM {i}", "embedding" if i == 1 else "dropout")
        self._attach(model.head, "head", "dropout")

    @property
    def done(self) -> bool:
        return len(self._words) == self.steps + self.WARM_UP

    def start(self) -> None:
        self._marks.append([("", self._now())])

    def mark(self, stage: str) -> None:
        self._marks[-1].append((stage, self._now()))

    def stop(self, words: int) -> None:
        """Ends a step of `words` words."""
        self._words.append(words)
        if self.done:
            for handle in self._handles:
                handle.remove()

    def report(self) -> dict[str, Any]:
        """Returns the milliseconds per step and the share of each stage, as medians over the steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        steps = [self._stages(marks) for marks in self._marks[self.WARM_UP :]]
        totals = [sum(stages.values()) for stages in steps]
        names = list(dict.fromkeys(name for stages in steps for name in stages))
        words = self._words[self.WARM_UP :]
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "steps": len(steps),
            "words_per_step": statistics.mean(words),
            "words_per_second": sum(words) / sum(totals) * 1e3,
            "step_ms": {"min": min(totals), "median": statistics.median(totals), "max": max(totals)},
            "stages": {
                name: {
                    "ms": statistics.median(stages.get(name, 0.0) for stages in steps),
                    "share": statistics.median(stages.get(name, 0.0) / total for stages, total in zip(steps, totals)),
                }
                for name in names
            },
        }

    def _attach(self, module: torch.nn.Module, name: str, before: str) -> None:
        self._handles += [
            module.register_forward_pre_hook(lambda *_: self.mark(f"{before}, forward")),
            module.register_forward_hook(lambda *_: self.mark(f"{name}, forward")),
            module.register_full_backward_pre_hook(
                lambda *_: self.mark("regularisers" if name == "head" else "dropout, backward")
            ),
            module.register_full_backward_hook(lambda *_: self.mark(f"{name}, backward")),
        ]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _stages(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        stages: dict[str, float] = {}
        for (_, start), (name, end) in zip(marks, marks[1:]):
            elapsed = start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
            stages[name] = stages.get(name, 0.0) + elapsed
        return stages


def as_table(report: dict[str, Any]) -> str:
    step = report["step_ms"]
    lines = [
        f"profile of {report['steps']} steps on {report['device']}: {step['median']:.2f} ms per step "
        f"({step['min']:.2f}–{step['max']:.2f}), "
        f"{report['words_per_step']:.0f} words, {report['words_per_second']:,.0f} words/s"
    ]
    lines += [f"  {name:<24}{stage['ms']:>10.2f} ms{stage['share']:>8.1%}" for name, stage in report["stages"].items()]
    return "\n".join(lines)
