"""Runs of small models at equal steps and at equal time, each in a file of its own: `experiments.adam` and
`experiments.transformer`."""

import dataclasses
import json
import platform
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleaved
from fused_mos.data import Corpus
from fused_mos.runtime import files
from fused_mos.training.device import allow_tf32
from fused_mos.training.graphs import CudaRecorder

from .small_lm import LanguageModel, ReplayedSteps, Shape, Steps, learning_rates, make_optimizer, perplexity, places_of

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SETTINGS = "settings.json"


@dataclasses.dataclass
class Store:
    """The finished runs of an experiment, a JSON file each. Processes may share it, one a seed."""

    folder: Path
    settings: dict[str, Any]
    """What all runs of the folder have in common."""

    def __post_init__(self):
        path = self.folder / SETTINGS
        with self.lock():
            if not path.is_file():
                files.write_json(path, self.settings)
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, value in self.settings.items():
            if found.get(name) != value:
                raise SystemExit(
                    f"error: {self.folder} has runs with {name} {found.get(name)}, got {value}; name another --runs"
                )

    def lock(self, name: str = "") -> files.FolderLock:
        """The right to write this file of the folder; waits for another process that has it."""
        return files.FolderLock(self.folder / "locks" / name, wait=True)

    def row(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run's result, from its file if it is there. A process that computes it has others wait."""
        path = self.path(key)
        with self.lock(path.stem):
            if not path.is_file():
                files.write_json(path, {"key": key, **compute()})
        row = json.loads(path.read_text(encoding="utf-8"))
        print(f"{key}: {', '.join(f'{name} {value}' for name, value in row.items() if name != 'key')}", flush=True)
        return row

    def path(self, key: str, suffix: str = ".json") -> Path:
        return self.folder / f"{key.replace(', ', '_').replace(' ', '-')}{suffix}"

    def rows(self) -> dict[str, dict[str, Any]]:
        paths = [path for path in sorted(self.folder.glob("*.json")) if path.name != SETTINGS]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return {row.pop("key"): row for row in found}

    def write(self, out: Path, then: Callable[[dict[str, Any]], None] = lambda result: None):
        """Writes all rows that are there, with the settings, and calls `then` with what it wrote."""
        about = self.settings | {"torch": torch.__version__, "python": platform.python_version()}
        with self.lock("out"):
            result = about | {"date": date.today().isoformat(), "rows": self.rows()}
            files.write_json(out, result)
            then(result)


@dataclasses.dataclass
class Budget:
    """What a run may take: `steps` steps of MoS, or as long as they do on the machine where `seconds_per_step` measured
    them. A GPU's products are rounded to TF32."""

    corpus: Corpus
    store: Store
    steps: int
    device: torch.device

    def __post_init__(self):
        allow_tf32(self.device, True)
        self.train_text = self.corpus.train.to(self.device)

    def counts(self) -> Tensor:
        return torch.bincount(self.corpus.train, minlength=len(self.corpus.vocabulary))

    def seconds_per_step(self, group: str, shapes: dict[str, Shape]) -> dict[str, float]:
        """Medians of steps in turns. Have the machine idle; load on it later changes no result."""
        on_gpu = self.device.type == "cuda"
        rounds, count = 15, 10 if on_gpu else 1  # a GPU's queue must not run empty

        def measure() -> dict[str, Any]:
            calls = {}
            for name, shape in shapes.items():
                steps = self.begin(shape, False, (1 + rounds) * count, 1e-4, seed=0)
                calls[name] = lambda steps=steps: steps.run(count, "")
            times = interleaved(calls, rounds, on_gpu)
            found = {name: round(statistics.median(t) / count, 7 if on_gpu else 5) for name, t in times.items()}
            gpu = {"device": torch.cuda.get_device_name(self.device)} if on_gpu else {}
            return found | gpu | {"threads": torch.get_num_threads()}

        return self.store.row(f"{group}, seconds per step", measure)

    def begin(self, shape: Shape, with_counts: bool, steps: int, learning_rate: float, seed: int) -> Steps:
        """A training of `steps` steps with a new model."""
        torch.manual_seed(seed)
        model = LanguageModel(shape)
        if with_counts:
            model.head.init_bias(self.counts())
        model.to(self.device)
        optimizer = make_optimizer(list(model.parameters()), learning_rate, replayed=self.device.type == "cuda")
        places = places_of(self.corpus.train, steps, torch.Generator().manual_seed(seed))
        return self.continued(model, optimizer, places, learning_rates(learning_rate, steps))

    def continued(self, model: LanguageModel, optimizer: torch.optim.Optimizer, places: Tensor, rates: list[float]):
        """The steps of a training of this model; on a GPU they are replayed."""
        arguments = model, optimizer, self.train_text, places, rates
        return ReplayedSteps(*arguments, CudaRecorder(self.device)) if self.device.type == "cuda" else Steps(*arguments)

    def run(self, shape: Shape, with_counts: bool, steps: int, learning_rate: float, seed: int, split: str) -> dict:
        """Trains a model and evaluates it on a split."""
        training = self.begin(shape, with_counts, steps, learning_rate, seed)
        training.run(steps, name := f"{shape.body} {shape.head}")
        return self.result(training, name, steps, split)

    def result(self, training: Steps, name: str, steps: int, split: str) -> dict[str, Any]:
        training.check(name)
        text = getattr(self.corpus, split).to(self.device)
        return {
            "steps": steps,
            "parameters": sum(p.numel() for p in training.model.parameters()),
            f"{split} perplexity": round(perplexity(training.model, text), 2),
        }

    def learning_rate(self, group: str, shape: Shape) -> float:
        """The best for softmax with the bias of the word counts, on the validation text with seed 0, taken by all."""
        tried = {
            rate: self.store.row(
                f"{group}, learning rate {rate:g}",
                lambda rate=rate: self.run(shape, True, self.steps, rate, 0, "valid"),
            )["valid perplexity"]
            for rate in LEARNING_RATES
        }
        return min(tried, key=tried.__getitem__)


def with_one_size(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """The shapes with as many parameters as the largest, by their widths."""
    most = max(shape.parameters() for shape in shapes.values())
    return {name: shape.with_parameters(most) for name, shape in shapes.items()}


def values_of(rows: dict[str, dict[str, Any]], run: str, column: str) -> list[Any]:
    """A column of a run, such as "lstm, MoS", with all seeds."""
    return [row[column] for key, row in rows.items() if key.rpartition(", seed ")[0] == run]
