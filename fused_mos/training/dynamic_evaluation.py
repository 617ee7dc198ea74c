"""Dynamic evaluation of a run, with progress bars and checkpoints, and the search for its hyperparameters."""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import batchify, digest
from ..lm.awd_lstm import Hidden
from ..lm.dynamic_evaluation import DynamicEvaluation, DynamicRule, GradientStatistics
from ..runtime import files, signals
from ..runtime.progress import bar, say
from .checkpoint import digest as checkpoint_digest
from .checkpoint import fitting, load_checkpoint, remove_checkpoint, save_checkpoint
from .errors import CheckpointError, ConfigError
from .finite import explained, first_not_finite
from .metrics import perplexity
from .run import Run
from .settings import COUNT, read_record, setting

STATISTICS_BATCH_SIZE = 100
STATISTICS_BPTT = 5
"""Batch size and segment length for the training set's gradient statistics, as in the published runs. They do not
depend on a rule's bptt."""

SCREENING_SHARE = 0.1
"""Share of the validation text that the search reads first."""

POSTFIX_INTERVAL = 100
"""Segments between updates of the perplexity in the progress bar: each makes the host wait for the device."""

LEAST_GAIN = 1e-3
"""Improvement in nats that lets the search continue, so that it does not halve a field forever that has no effect."""

FINALISTS = 3
"""Number of best rules to try on the whole validation text in the end."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """A rule that the search has tried, as stored in tuning.json."""

    rule: DynamicRule
    text: str  # name of the text
    loss: float


@dataclasses.dataclass
class TuningRecord:
    """Content of tuning.json beside its key."""

    tried: tuple[Tried, ...]


@dataclasses.dataclass
class RowRecord:
    """Progress in a checkpoint."""

    row: int = setting(0, COUNT)


class DynamicRun:
    """Dynamic evaluation of the best model of a run. It keeps checkpoints of this model in RUN/dynamic, which it locks.

    Raises FolderInUse if another process has the lock, CheckpointError or FileError for damaged files.
    """

    def __init__(self, run: Run, clock: signals.CheckpointClock):
        self.run, self.clock = run, clock
        self.folder = run.folder / "dynamic"
        self._lock = files.FolderLock(self.folder)
        self.trained = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        self.model_digest = checkpoint_digest(run.folder / "best.safetensors")
        self.train_digest, self.valid_digest = digest(run.text("train")), digest(run.text("valid"))

    def statistics(self) -> list[Tensor]:
        """Returns the root mean squares of the training set's gradients, and saves them for later evaluations."""
        path = self.folder / "gradient-statistics.safetensors"
        source = batchify(self.run.text("train"), STATISTICS_BATCH_SIZE).to(self.run.device)
        self._reset()
        statistics = GradientStatistics(self.run.model, source, STATISTICS_BPTT)
        text = {"text": self.train_digest}

        def tensors() -> dict[str, Tensor]:
            return {f"sum.{i}": total for i, total in enumerate(statistics.sums)} | _named(statistics.hidden)

        def save() -> None:
            self._save(path, tensors(), text | {"row": statistics.row})

        self._resume(statistics, path, text, tensors())
        self._work(statistics, source, "gradient statistics", save)
        return statistics.root_mean_squares()

    def evaluate(self, tokens: Tensor, rule: DynamicRule, name: str) -> float:
        """Returns the mean NLL in nats of the text `tokens` (n,) under a model that learns from it as it reads.

        Args:
            name: name of the text, for file names and the progress bar.

        Raises ConfigError if the model diverges under this rule.
        """
        key = hashlib.sha256(
            json.dumps([digest(tokens), self.train_digest, dataclasses.astuple(rule)]).encode()
        ).hexdigest()[:12]
        path = self.folder / f"{name}-{key}.safetensors"
        root_mean_squares = self.statistics()
        self._reset()
        source = batchify(tokens, 1).to(self.run.device)
        evaluation = DynamicEvaluation(self.run.model, source, root_mean_squares, rule)

        def tensors() -> dict[str, Tensor]:
            parameters: dict[str, Tensor] = {f"model.{n}": p for n, p in self.run.model.named_parameters()}
            return parameters | _named(evaluation.hidden) | {"total": evaluation.total}

        def save() -> None:
            if first_not_finite(tensors()):
                raise self._diverged(rule)
            self._save(path, tensors(), {"row": evaluation.row, "rule": dataclasses.asdict(rule)})

        self._resume(evaluation, path, {"rule": dataclasses.asdict(rule)}, tensors())
        try:
            with explained(lambda: dict(self.run.model.named_parameters()), lambda _: self._diverged(rule)):
                self._work(
                    evaluation, source, f"dynamic, {name}", save, lambda: f"ppl {perplexity(evaluation.loss):.2f}"
                )
        finally:
            self._reset()
        remove_checkpoint(path)
        if not math.isfinite(evaluation.loss):
            raise self._diverged(rule)
        return evaluation.loss

    def _diverged(self, rule: DynamicRule) -> ConfigError:
        return ConfigError(f"dynamic evaluation diverges with {rule}; try a lower --lr or a higher --epsilon")

    def tune(self, start: DynamicRule) -> DynamicRule:
        """Searches the rule with the lowest loss on the validation text.

        Starting from `start`, it halves or doubles one field at a time while the loss on the first part of the text
        falls, then compares the best few rules on the whole text. Losses are kept in dynamic/tuning.json.
        """
        valid = self.run.text("valid")
        first = valid[: max(int(valid.numel() * SCREENING_SHARE), 2)]
        path = self.folder / "tuning.json"
        tried = self._tried(path)

        def loss(rule: DynamicRule, tokens: Tensor, name: str) -> float:
            known = next((one.loss for one in tried if (one.rule, one.text) == (rule, name)), None)
            if known is None:
                try:
                    known = self.evaluate(tokens, rule, name)
                except ConfigError:
                    if not tried:  # it is the user's rule that diverges
                        raise
                    known = sys.float_info.max  # JSON has no infinity
                tried.append(Tried(rule, name, known))
                files.write_sealed(path, self._key | {"tried": [dataclasses.asdict(one) for one in tried]})
                say(f"{name}: ppl {perplexity(known):.2f} with {rule}")
            return known

        screened = {start: loss(start, first, "valid, first part")}
        while True:
            best = min(screened, key=screened.__getitem__)
            for rule in _neighbours(best):
                if rule not in screened:
                    screened[rule] = loss(rule, first, "valid, first part")
            if min(screened.values()) >= screened[best] - LEAST_GAIN:
                break
        finalists = sorted(screened, key=screened.__getitem__)[:FINALISTS]
        return min(finalists, key=lambda rule: loss(rule, valid, "valid"))

    def _tried(self, path: Path) -> list[Tried]:
        if not path.is_file():
            return []
        content = files.read_sealed(path)
        if not content.items() >= self._key.items():
            return []
        try:
            return list(read_record(TuningRecord, {"tried": content.get("tried")}).tried)
        except ValueError as error:
            raise CheckpointError(f"{path} is of another version: {error}; delete it to search again") from None

    @property
    def _key(self) -> dict[str, str]:
        """Identifies the model and texts of a search: the losses of others do not count."""
        return {"model": self.model_digest, "train": self.train_digest, "valid": self.valid_digest}

    def _work(
        self,
        work: GradientStatistics | DynamicEvaluation,
        source: Tensor,  # (T, B)
        description: str,
        save: Callable[[], None],
        postfix: Callable[[], str] | None = None,
    ) -> None:
        """Runs `work` to the end, with a checkpoint at intervals and at the end."""
        rows = source.shape[0] - 1
        if work.row == rows:
            return
        columns = source.shape[1]
        with (
            signals.noting(),
            bar(desc=description, unit="words", total=rows * columns, initial=work.row * columns, leave=False) as shown,
        ):
            for i, n in enumerate(work):
                shown.update(n * columns)
                if postfix and i % POSTFIX_INTERVAL == 0:
                    shown.set_postfix_str(postfix(), refresh=False)
                self.clock.tick(save)
            save()  # within the block, so that a signal after the last tick finds everything saved

    def _reset(self) -> None:
        with torch.no_grad():
            for name, p in self.run.model.named_parameters():
                p.copy_(self.trained[name])

    def _save(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        save_checkpoint(path, tensors, meta | {"model": self.model_digest}, self.run.config.checkpoint_max_mib)

    @torch.no_grad()
    def _resume(
        self,
        work: GradientStatistics | DynamicEvaluation,
        path: Path,
        expected: dict[str, Any],
        state: dict[str, Tensor],
    ) -> None:
        """Lets `work` continue from the checkpoint, if there is one of this model with the `expected` values in its
        JSON. Copies its tensors into those of `state`."""
        if not path.is_file():
            return
        try:
            tensors, meta = load_checkpoint(path)
            if any(meta.get(key) != value for key, value in (expected | {"model": self.model_digest}).items()):
                return
            row, rows = read_record(RowRecord, {"row": meta.get("row")}).row, work.source.shape[0]
            if row >= rows:
                raise ValueError(f"row must be less than {rows}, the rows of the text, got {row}")
            if missing := state.keys() - tensors.keys():
                raise ValueError(f"it lacks {min(missing)}")
            saved = {name: fitting(tensors, name, like) for name, like in state.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{error}; delete it to recompute it") from None
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {path} is of another version: {error}; delete it to recompute it"
            ) from None
        work.row = row
        for name, tensor in saved.items():
            state[name].copy_(tensor)


def _neighbours(rule: DynamicRule) -> Iterator[DynamicRule]:
    for name in ("lr", "lamb", "epsilon", "bptt"):
        for factor in (2.0, 0.5):
            value = getattr(rule, name) * factor
            value = max(round(value), 2) if name == "bptt" else value
            if value != getattr(rule, name):
                yield dataclasses.replace(rule, **{name: value})


def _named(hidden: Hidden) -> dict[str, Tensor]:
    return {f"hidden.{i}.{name}": tensor for i, layer in enumerate(hidden) for name, tensor in zip("hc", layer)}
