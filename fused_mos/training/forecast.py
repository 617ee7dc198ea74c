"""How long the stages of a reproduction will take on this machine, from a few timed steps of each kind of work."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..data import batchify, segment
from ..lm import AWDLSTM
from ..lm.awd_lstm import carry_on
from ..lm.dynamic_evaluation import DynamicEvaluation, DynamicRule, GradientStatistics
from .config import TrainConfig
from .dynamic_evaluation import STATISTICS_BATCH_SIZE, STATISTICS_BPTT
from .trainer import Trainer

SAMPLE_SECONDS = 1.5
"""Time for which steps of one kind are repeated."""

LEAST_STEPS = 3
"""Steps of one kind that are timed, however long they take."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A duration in seconds, and the range in which it may lie."""

    usual: float
    low: float
    high: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.usual + other.usual, self.low + other.low, self.high + other.high)

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(self.usual * times, self.low * times, self.high * times)

    def __str__(self) -> str:
        usual, low, high = (in_words(seconds) for seconds in (self.usual, self.low, self.high))
        return usual if low == high else f"{usual} ({low} to {high})"


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Durations of the stages, before they begin."""

    epochs: int
    """Of training; fine-tuning has as many at most."""
    least_finetuning: int
    """Epochs after which fine-tuning can end at the earliest."""
    training_epoch: Seconds
    """One epoch of training with its validation."""
    finetuning_epoch: Seconds
    evaluation: Seconds
    """The validation and test texts, read once each by the trained and by the fine-tuned model."""
    dynamic: Seconds
    """The gradient statistics, and dynamic evaluation of both texts."""

    @property
    def total(self) -> Seconds:
        """All stages; `usual` has the fewest epochs of fine-tuning, since nobody knows when it will end."""
        fixed = self.training_epoch * self.epochs + self.evaluation + self.dynamic
        least, most = self.finetuning_epoch * self.least_finetuning, self.finetuning_epoch * self.epochs
        return Seconds((fixed + least).usual, (fixed + least).low, (fixed + most).high)

    def report(self) -> str:
        """Lines for the user: each stage, then all of them."""
        total = self.total
        return "\n".join(
            [
                "expected time here, from a few timed steps of each kind:",
                f"  training             {self.epochs:,} epochs of {self.training_epoch}: "
                f"{self.training_epoch * self.epochs}",
                f"  fine-tuning          {self.least_finetuning:,} to {self.epochs:,} epochs of "
                f"{self.finetuning_epoch}, until it no longer helps: "
                f"{in_words((self.finetuning_epoch * self.least_finetuning).usual)} to "
                f"{in_words((self.finetuning_epoch * self.epochs).usual)}",
                f"  evaluation           {self.evaluation}",
                f"  dynamic evaluation   {self.dynamic}",
                f"  in all               {in_words(total.low)} to {in_words(total.high)}; "
                f"{in_words(total.usual)} if fine-tuning ends as early as it can",
                "The ranges are those of the timed steps. Other load and a processor that grows hot are not in them.",
            ]
        )


def in_words(seconds: float) -> str:
    """Return a duration in the largest unit of which there are two or more, with two digits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds)} s"


def _two_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def forecast(config: TrainConfig, rule: DynamicRule) -> Forecast:
    """Time a few steps of each kind of work, with a model that is thrown away afterwards.

    Takes some seconds for each of the six kinds. Draws from torch's global generator, which a run seeds anew.

    Args:
        config: of the training; `out` is not touched.
        rule: of the dynamic evaluation.

    Raises what Trainer raises.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(dataclasses.replace(config, out=Path(folder) / "run"))
        try:
            return _measured(trainer, rule)
        finally:
            trainer.close()
            if trainer.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(trainer.device)


def _measured(trainer: Trainer, rule: DynamicRule) -> Forecast:
    corpus, model, optim, device = trainer.corpus, trainer.model, trainer.config.optim, trainer.device
    n_train, n_valid, n_test = (
        tokens.numel() - columns
        for tokens, columns in (
            (corpus.train, optim.batch_size),
            (corpus.valid, trainer.config.valid_batch_size),
            (corpus.test, trainer.config.test_batch_size),
        )
    )
    model.train()
    training = _seconds_per_word(_training_steps(trainer), device)
    trainer.optimizer.start_averaging()
    averaging = _seconds_per_word(_training_steps(trainer), device)

    model.eval()
    read = [
        _seconds_per_word(_reading_steps(model, batchify(tokens, columns).to(device), optim.bptt), device)
        for tokens, columns in (
            (corpus.valid, trainer.config.valid_batch_size),
            (corpus.test, trainer.config.test_batch_size),
        )
    ]
    validation, test = read[0] * n_valid, read[1] * n_test

    source = batchify(corpus.train, STATISTICS_BATCH_SIZE).to(device)
    statistics = GradientStatistics(model, source, STATISTICS_BPTT)
    gradients = _seconds_per_word(_again(statistics), device)
    source = batchify(corpus.test, 1).to(device)
    evaluation = DynamicEvaluation(model, source, statistics.root_mean_squares(), rule)
    dynamic = _seconds_per_word(_again(evaluation), device)
    return Forecast(
        epochs=optim.epochs,
        least_finetuning=min(optim.nonmono + 2, optim.epochs),
        training_epoch=training * n_train + validation,
        finetuning_epoch=averaging * n_train + validation,
        evaluation=(validation + test) * 2,
        dynamic=gradients * n_train + dynamic * (n_valid + n_test),
    )


def _seconds_per_word(steps: Iterator[int], device: torch.device) -> Seconds:
    """Time steps that yield their words, after one that does not count; the range leaves out a tenth at each end."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    next(steps)
    wait()
    found: list[float] = []
    start = time.perf_counter()
    while len(found) < LEAST_STEPS or time.perf_counter() - start < SAMPLE_SECONDS:
        began = time.perf_counter()
        words = next(steps)
        wait()
        found.append((time.perf_counter() - began) / words)
    found.sort()
    last = len(found) - 1
    return Seconds(found[round(last / 2)], found[math.floor(last / 10)], found[math.ceil(last * 9 / 10)])


def _training_steps(trainer: Trainer) -> Iterator[int]:
    while True:
        if trainer.progress.row >= trainer.source.shape[0] - 2:
            trainer.progress.row = 0
        yield trainer.train_step() * trainer.source.shape[1]


def _reading_steps(model: AWDLSTM, source: Tensor, bptt: int) -> Iterator[int]:
    """Predict source (T, B) as `evaluate` does, again and again."""
    hidden = model.initial_hidden(source.shape[1])
    while True:
        for start in range(0, source.shape[0] - 1, bptt):
            inputs, targets = segment(source, start, bptt)
            with torch.no_grad():
                carry_on(hidden, model(inputs, targets, hidden).hidden)
            yield inputs.numel()


def _again(work: GradientStatistics | DynamicEvaluation) -> Iterator[int]:
    """Words of each step of `work`, begun again at its end."""
    while True:
        for rows in work:
            yield rows * work.source.shape[1]
        work.row = 0
