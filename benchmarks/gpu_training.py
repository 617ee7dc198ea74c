"""Times training steps on a GPU, as graphs and kernel by kernel: where their time goes, and how long the GPU idles.

The words are random: the time of a step does not depend on them.
"""

import contextlib
import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from fused_mos.data import lm1b
from fused_mos.training import RECIPES, Trainer
from fused_mos.training.device import allow_tf32
from fused_mos.training.lm1b.config import RECIPES as LM1B_RECIPES
from fused_mos.training.profiling import StepProfile

from . import gpu_timing as timing
from .gpu_device import DEVICE, DRY_RUN, synchronize
from .harness import spread
from .lm1b_corpus import Config as RandomCorpus
from .lm1b_corpus import generate, words

if TYPE_CHECKING:
    from fused_mos.training.lm1b import LM1BTrainer

STEPS = 2 if DRY_RUN else 40
"""Steps to time as graphs; as many are timed kernel by kernel, and as many again with their stages marked."""
PROFILED = 1 if DRY_RUN else 10
"""Steps under the profiler."""
N_WORDS = {"ptb": 10_000, "wikitext2": 33_278, "lm1b-full": 793_471, "demo": 500, "lm1b-tiny": 500}
"""Vocabulary sizes; other recipes have 100,000 words."""


class Training(NamedTuple):
    trainer: "Trainer | LM1BTrainer"
    step: Callable[[], int]  # one training step; returns its words


def measure(recipe: str, precision: str) -> dict:
    """The row of a recipe's training step: kernel by kernel, with the time of each stage, and as graphs."""
    make = _lm1b_trainer if recipe in LM1B_RECIPES else _trainer
    if not DRY_RUN:
        torch.cuda.empty_cache()  # do not count memory reserved by earlier rows
    with make(recipe, precision) as training:
        graphs = _graphs(training)
        training.trainer.graphs = None
        n_words, seconds = _times(training)
        row = timing.summary(timing.device_events(training.step, PROFILED), PROFILED)
        stages = _stages(training)
    step_ms = spread(1e3 * value for value in seconds)
    return (
        row
        | graphs
        | {
            "step ms": step_ms,
            "words/s": round(sum(n_words) / sum(seconds)),
            "idle share": round(max(1 - row["gpu ms"] / (1e3 * sum(seconds) / STEPS), 0.0), 3),
            "head share": _share(stages, "head"),
            "LSTM share": _share(stages, "LSTM"),
            "stages": stages,
            "peak MiB": None if DRY_RUN else torch.cuda.max_memory_allocated() >> 20,
        }
    )


def _graphs(training: Training) -> dict:
    """The figures of replayed steps, empty if there are no graphs."""
    if training.trainer.graphs is None:
        return {}
    _, seconds = _times(training)
    return {
        "graphs": training.trainer.graphs.n_graphs,
        "graphs step ms": spread(1e3 * value for value in seconds),
        "graphs reserved MiB": torch.cuda.max_memory_reserved() >> 20,  # replays allocate nothing to count
    }


def _times(training: Training) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Words and seconds of each step, after some warm-up steps: one runs, one is captured."""
    for _ in range(StepProfile.WARM_UP):
        training.step()
    if not DRY_RUN:
        torch.cuda.reset_peak_memory_stats()
    return tuple(zip(*(_timed(training.step) for _ in range(STEPS))))


def _timed(step: Callable[[], int]) -> tuple[int, float]:
    start = time.perf_counter()
    n_words = step()
    synchronize()
    return n_words, time.perf_counter() - start


def _stages(training: Training) -> dict[str, dict[str, float]]:
    """Milliseconds and share of each stage of a step on the GPU's stream, including waits for the host."""
    profile = StepProfile(training.trainer.model, STEPS)
    while not profile.done:
        profile.start()
        n_words = training.step()
        profile.mark("clipping, optimizer")
        profile.stop(n_words)
    stages = profile.report()["stages"]
    return {name: {key: round(value, 4) for key, value in stage.items()} for name, stage in stages.items()}


def _share(stages: dict[str, dict[str, float]], part: str) -> float:
    return round(sum(stage["share"] for name, stage in stages.items() if name.startswith(part)), 3)


@contextlib.contextmanager
def _trainer(recipe: str, precision: str) -> Iterator[Training]:
    """The trainer of Penn Treebank and WikiText-2, with segments of the recipe's length."""
    config = dataclasses.replace(RECIPES[recipe](), precision=precision, device=DEVICE)
    n_steps = 3 * (STEPS + StepProfile.WARM_UP) + PROFILED + 1
    n_tokens = n_steps * config.optim.bptt * config.optim.batch_size
    vocabulary = [f"w{i}" for i in range(N_WORDS[recipe])]
    text = [*vocabulary, *random.Random(0).choices(vocabulary, k=n_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "valid", "test"):
            Path(folder, f"{split}.txt").write_text(" ".join(text if split == "train" else text[:1000]))
        trainer = Trainer(dataclasses.replace(config, data=Path(folder), out=Path(folder, "run")))
        trainer.model.train()
        allow_tf32(trainer.device, precision != "float32")
        yield Training(trainer, lambda: trainer.train_step(config.optim.bptt) * config.optim.batch_size)


@contextlib.contextmanager
def _lm1b_trainer(recipe: str, precision: str) -> Iterator[Training]:
    """The One Billion Word trainer on a single rank, with a corpus that contains every word of the vocabulary."""
    from fused_mos.training.lm1b import LM1BTrainer
    from fused_mos.training.lm1b.ranks import Ranks

    n_words = N_WORDS.get(recipe, 100_000) - len(lm1b.MARKS)
    with tempfile.TemporaryDirectory() as name:
        source, prepared = Path(name, "source"), Path(name, "prepared")
        generate(RandomCorpus(source, max(3 * n_words, 300_000), 2_000, n_words, shards=1, heldout_shards=1))
        vocabulary = Path(name, "vocabulary.txt")
        vocabulary.write_bytes(b"\n".join([*(mark.encode() for mark in lm1b.MARKS), *words(n_words)]) + b"\n")
        lm1b.prepare(lm1b.Prepare(source, prepared, vocabulary=vocabulary, workers=1, allow_missing=True))
        config = dataclasses.replace(
            LM1B_RECIPES[recipe](), precision=precision, data=prepared, out=Path(name, "run"), epochs=1_000
        )
        ranks = Ranks(DEVICE, 1)
        try:
            trainer = LM1BTrainer(config, ranks)
            segments = _endless(trainer.stream.segments)

            def step() -> int:
                segment = next(segments)
                trainer.train_step(segment)
                return segment.inputs.numel()

            yield Training(trainer, step)
        finally:
            ranks.close()


def _endless(epoch: Callable[[], Iterator]) -> Iterator:
    while True:
        yield from epoch()
