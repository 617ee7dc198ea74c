"""Runs of small models at equal steps and at equal time, each in a file of its own: `experiments.adam` and
`experiments.transformer`."""

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import interleaved
from fused_mos.data import Corpus
from fused_mos.runtime import files

from .small_lm import LanguageModel, Shape, make_optimizer, perplexity, step_of, train

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SETTINGS = "settings.json"


@dataclasses.dataclass
class Store:
    """The finished runs of an experiment, a JSON file each. Processes may share it, one a seed."""

    folder: Path
    settings: dict[str, Any]
    """What all runs of the folder have in common."""

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS
        if not path.is_file():
            files.write_json(path, self.settings)
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            if self.settings[name] != value:
                raise SystemExit(
                    f"error: {self.folder} has runs with {name} {value}, got {self.settings[name]}; name another --runs"
                )

    def row(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run's result, from its file if it is there."""
        path = self.folder / f"{key.replace(', ', '_').replace(' ', '-')}.json"
        if not path.is_file():
            files.write_json(path, {"key": key, **compute()})
        row = json.loads(path.read_text(encoding="utf-8"))
        print(f"{key}: {', '.join(f'{name} {value}' for name, value in row.items() if name != 'key')}", flush=True)
        return row

    def rows(self) -> dict[str, dict[str, Any]]:
        paths = [path for path in sorted(self.folder.glob("*.json")) if path.name != SETTINGS]
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return {row.pop("key"): row for row in found}


@dataclasses.dataclass
class Budget:
    """What a run may take: `steps` steps of MoS, or as long as they do on the machine where `seconds` were measured."""

    corpus: Corpus
    store: Store
    steps: int

    def counts(self) -> Tensor:
        return torch.bincount(self.corpus.train, minlength=len(self.corpus.vocabulary))

    def seconds_per_step(self, group: str, shapes: dict[str, Shape]) -> dict[str, float]:
        """Medians of steps in turns. Have the machine idle; load on it later changes no result."""

        def measure() -> dict[str, Any]:
            calls = {name: step_of(LanguageModel(shape), self.corpus.train) for name, shape in shapes.items()}
            times = interleaved(calls, rounds=15)
            return {name: round(statistics.median(t), 5) for name, t in times.items()} | {
                "threads": torch.get_num_threads()
            }

        return self.store.row(f"{group}, seconds per step", measure)

    def run(self, shape: Shape, with_counts: bool, steps: int, learning_rate: float, seed: int, split: str) -> dict:
        """Train a model and evaluate it on a split."""
        torch.manual_seed(seed)
        model = LanguageModel(shape)
        if with_counts:
            model.head.init_bias(self.counts())
        optimizer = make_optimizer(list(model.parameters()), learning_rate)
        places = torch.Generator().manual_seed(seed)
        train(model, optimizer, self.corpus.train, steps, learning_rate, places, f"{shape.body} {shape.head}")
        return self.result(model, steps, split)

    def result(self, model: LanguageModel, steps: int, split: str) -> dict[str, Any]:
        return {
            "steps": steps,
            "parameters": sum(p.numel() for p in model.parameters()),
            f"{split} perplexity": round(perplexity(model, getattr(self.corpus, split)), 2),
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
