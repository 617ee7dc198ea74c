"""Runs of small models at equal steps and at equal time, for `experiments.adam` and `experiments.transformer`. Each run
has its own result file."""

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
    """The finished runs of an experiment, one JSON file each. Several processes may share it."""

    folder: Path
    settings: dict[str, Any]
    """Settings that all runs in the folder share."""

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
        """Locks a file of the folder for writing; waits while another process has the lock."""
        return files.FolderLock(self.folder / "locks" / name, wait=True)

    def row(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the run's result from its file, or computes it while other processes that need it wait."""
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
        """Writes the settings and all finished rows to `out`, and calls `then` with them."""
        about = self.settings | {"torch": torch.__version__, "python": platform.python_version()}
        with self.lock("out"):
            result = about | {"date": date.today().isoformat(), "rows": self.rows()}
            files.write_json(out, result)
            then(result)


@dataclasses.dataclass
class Budget:
    """Trains models for `steps` steps, or for as long as MoS takes for them at the speeds of `seconds_per_step`. On a
    GPU, matrix products use TF32."""

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
        """Returns the median seconds per step of each shape, measured in turns. Keep the machine idle meanwhile."""
        on_gpu = self.device.type == "cuda"
        rounds, count = 15, 10 if on_gpu else 1  # several steps keep a GPU's queue from running empty

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
        """Returns the steps of a training with a new model; `with_counts` initialises its bias to word frequencies."""
        torch.manual_seed(seed)
        model = LanguageModel(shape)
        if with_counts:
            model.head.init_bias(self.counts())
        model.to(self.device)
        optimizer = make_optimizer(list(model.parameters()), learning_rate, replayed=self.device.type == "cuda")
        places = places_of(self.corpus.train, steps, torch.Generator().manual_seed(seed))
        return self.continued(model, optimizer, places, learning_rates(learning_rate, steps))

    def continued(self, model: LanguageModel, optimizer: torch.optim.Optimizer, places: Tensor, rates: list[float]):
        """Returns the steps of a training of this model; on a GPU they are replayed as CUDA graphs."""
        arguments = model, optimizer, self.train_text, places, rates
        return ReplayedSteps(*arguments, CudaRecorder(self.device)) if self.device.type == "cuda" else Steps(*arguments)

    def run(self, shape: Shape, with_counts: bool, steps: int, learning_rate: float, seed: int, split: str) -> dict:
        """Trains a model, evaluates it on a split, and returns its row of results."""
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
        """Returns the learning rate for all models: the best one on the validation text for a softmax whose bias is
        initialised to the word frequencies, with seed 0."""
        tried = {
            rate: self.store.row(
                f"{group}, learning rate {rate:g}",
                lambda rate=rate: self.run(shape, True, self.steps, rate, 0, "valid"),
            )["valid perplexity"]
            for rate in LEARNING_RATES
        }
        return min(tried, key=tried.__getitem__)


def with_one_size(shapes: dict[str, Shape]) -> dict[str, Shape]:
    """Adjusts the shapes' widths so that all have as many parameters as the largest."""
    most = max(shape.parameters() for shape in shapes.values())
    return {name: shape.with_parameters(most) for name, shape in shapes.items()}


def values_of(rows: dict[str, dict[str, Any]], run: str, column: str) -> list[Any]:
    """Returns a column of the run called `run`, such as "lstm, MoS", for all seeds."""
    return [row[column] for key, row in rows.items() if key.rpartition(", seed ")[0] == run]
