"""The training loop of AWD-LSTM-MoS: SGD → NT-ASGD over randomised BPTT segments, resumable at any moment."""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import Corpus, batchify, digest, random_bptt_length, segment
from ..lm import AWDLSTM, NTASGD
from ..lm.awd_lstm import activation_regularization, detach, temporal_activation_regularization
from .checkpoint import CheckpointClock, CheckpointError, group, load_checkpoint, load_parameters, save_checkpoint
from .config import ConfigError, TrainConfig
from .device import allow_tf32, check_backend, device_named, peak_memory_mib, read_later
from .evaluation import evaluate
from .logging import MetricsLog, perplexity, plot_learning_curves
from .profile import StepProfile, as_table
from .run import check_vocabulary, write_json

RESUMABLE_FLAGS = (
    "epochs",
    "log_interval",
    "checkpoint_minutes",
    "checkpoint_max_mib",
    "time_limit",
    "profile",
    "data",
    "device",
    "backend",
)
"""What may be changed when a run is resumed; anything else would make it another run."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


@dataclasses.dataclass
class Progress:
    """Where a run stands; with the parameters, optimizer, hidden and random states this is all of its state."""

    epoch: int = 0  # epochs finished
    stopped: bool = False  # by the rule that ends fine-tuning
    row: int = 0  # rows of the training text done in the current epoch
    step: int = 0
    words: int = 0
    seconds: float = 0.0  # of training, without evaluation and checkpoints
    best: float | None = None  # lowest validation loss
    interval_words: int = 0  # since the last line of metrics.jsonl
    interval_seconds: float = 0.0
    metrics_bytes: int = 0
    peak_memory_mib: float = 0.0


class Trainer:
    """A run in its folder: config.json, vocabulary.txt, metrics.jsonl, tensorboard/, best.safetensors,
    last.safetensors, learning-curve.png and, at the end, result.json.

    Raises ConfigError, CorpusError or CheckpointError before anything in the folder is changed.
    """

    def __init__(self, config: TrainConfig):
        config.check()
        self.clock = CheckpointClock(config.checkpoint_minutes, config.time_limit)
        self.config = config
        self.folder = config.run_folder
        self.device = device_named(config.device)
        if config.precision == "tf32" and self.device.type != "cuda":
            raise ConfigError(f"precision tf32 is that of NVIDIA GPUs, got device {self.device}")
        check_backend(config.model.backend, self.device, config.precision == "bfloat16")
        saved = load_checkpoint(self.folder / "last.safetensors") if config.resume else None
        start = load_checkpoint(config.start / "best.safetensors")[0] if config.start and not saved else None
        if (
            not config.resume
            and self.folder.exists()
            and (not self.folder.is_dir() or any(not begun(path) for path in self.folder.iterdir()))
        ):
            resume = (
                f"continue that run with --resume {self.folder}, or "
                if (self.folder / "last.safetensors").is_file()
                else ""
            )
            raise ConfigError(f"out: {self.folder} is not empty; {resume}name another --out")

        self.corpus = Corpus(config.data, config.map_unknown)
        for split, batch_size in (("valid", config.valid_batch_size), ("test", config.test_batch_size)):
            batchify(
                getattr(self.corpus, split), batch_size
            )  # too short a text is better found now than after an epoch
        self.source = batchify(self.corpus.train, config.optim.batch_size).to(self.device)

        torch.manual_seed(config.seed)
        self.bptt_generator = torch.Generator().manual_seed(config.seed)
        self.model = AWDLSTM(len(self.corpus.vocabulary), **dataclasses.asdict(config.model)).to(self.device)
        optim = config.optim
        self.optimizer = NTASGD(self.model.parameters(), optim.lr, optim.weight_decay, optim.nonmono)
        self.progress = Progress()
        self.interval_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.noted: tuple | None = None  # numbers of an interval whose loss is on its way from the device
        self.status = ""
        self.hidden = self._initial_hidden()
        self.metrics: MetricsLog | None = None
        if saved:
            self._restore(*saved)
        else:
            if start is not None:
                check_vocabulary(self.corpus, config.start / "vocabulary.txt")
                load_parameters(self.model, start, config.start / "best.safetensors")
                self.optimizer.start_averaging()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save_last()  # before anything else, so that there is no moment from which a run cannot go on
        self.corpus.vocabulary.save(self.folder / "vocabulary.txt")
        write_json(self.folder / "config.json", dataclasses.replace(config, resume=None).to_json())
        self.metrics = MetricsLog(self.folder, self.progress.metrics_bytes, self.progress.step)
        self.profile = StepProfile(self.model, config.profile) if config.profile else None

    @property
    def _sub_batch(self) -> int:
        return self.config.optim.small_batch_size or self.config.optim.batch_size

    def _initial_hidden(self):
        """One hidden state per sub-batch: each is a slice of columns with a state of its own."""
        return [
            self.model.initial_hidden(self._sub_batch) for _ in range(0, self.config.optim.batch_size, self._sub_batch)
        ]

    def run(self) -> dict[str, Any]:
        """Trains to the last epoch, evaluates the best model, and returns what it writes to result.json.

        Raises TimeLimitReached, with everything saved, TrainingDiverged, or CheckpointError where the best model is
        gone.
        """
        try:
            if self.config.start and self.progress.best is None:
                self._keep_if_best(
                    self._validate(), epoch=0
                )  # the model that is fine-tuned is the best until another is better
                self._save_last()
            while self.progress.epoch < self.config.optim.epochs and not self.progress.stopped:
                self._train_epoch()
                self._finish_epoch()
            return self._finish()
        finally:
            self.metrics.close()

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        rows = self.source.shape[0]
        self.model.train()
        allow_tf32(self.device, config.precision != "float32")
        description = f"epoch {progress.epoch + 1}/{config.optim.epochs}"
        # where no person watches, a line every half minute is enough
        interval = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(
            total=rows - 1,
            initial=progress.row,
            desc=description,
            unit="rows",
            mininterval=interval,
            dynamic_ncols=True,
        ) as bar:
            self._since = time.monotonic()
            while progress.row < rows - 1:
                length = self.train_step()
                self._count_time()
                if progress.step % config.log_interval == 0:
                    self._end_interval()
                    bar.set_postfix_str(self.status, refresh=False)
                bar.update(length)
                self.clock.tick(self._checkpoint)
            self._count_time(wait=True)

    def _count_time(self, wait: bool = False) -> None:
        """Adds what passed since the last call to the time of training; with `wait`, until the device has done its
        work."""
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self.progress.interval_seconds += now - self._since
        self._since = now

    def _checkpoint(self) -> None:
        self._count_time(wait=True)
        self._save_last()
        self._since = time.monotonic()

    def train_step(self, length: int | None = None) -> int:
        """One segment of all columns, of `length` rows or as many as are drawn: forward, backward, clip, step. Returns
        the segment's rows, fewer where the text ends."""
        optim, progress = self.config.optim, self.progress
        if self.profile:
            self.profile.start()
        drawn = length or random_bptt_length(optim.bptt, optim.bptt + optim.bptt_delta, self.bptt_generator)
        inputs, targets = segment(self.source, progress.row, drawn)
        self.optimizer.zero_grad()
        mark = self._mark
        mark("data")
        for i, columns in enumerate(range(0, optim.batch_size, self._sub_batch)):
            part = slice(columns, columns + self._sub_batch)
            output = self._forward(inputs[:, part], targets[:, part], self.hidden[i])
            self.hidden[i] = detach(output.hidden)
            loss = output.loss
            if optim.alpha:
                loss = loss + optim.alpha * activation_regularization(output.dropped)
            if optim.beta:
                loss = loss + optim.beta * temporal_activation_regularization(output.raw)
            (loss * (self._sub_batch / optim.batch_size)).backward()
            mark("embedding, backward")
            self.interval_loss += output.loss.detach() * (self._sub_batch * inputs.shape[0])
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip)
        mark("clipping")
        # the rate follows the drawn length, also where the text ends before it, as in the published code
        self.optimizer.step(scale=drawn / optim.bptt)
        mark("optimizer")
        progress.row += inputs.shape[0]
        progress.step += 1
        progress.words += inputs.numel()
        progress.interval_words += inputs.numel()
        if self.profile:
            self._profiled(inputs.numel())
        return inputs.shape[0]

    def _mark(self, stage: str) -> None:
        if self.profile:
            self.profile.mark(stage)

    def _profiled(self, words: int) -> None:
        """Writes the profile once it has seen its steps."""
        self.profile.stop(words)
        if self.profile.done:
            report, self.profile = self.profile.report(), None
            write_json(self.folder / "profile.json", report)
            tqdm.write(as_table(report))

    def _forward(self, inputs: Tensor, targets: Tensor, hidden):
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                return self.model(inputs, targets, hidden)
        except ValueError as error:  # the head refuses NaN
            if all(p.isfinite().all() for p in self.model.parameters()):
                raise
            raise self._diverged(f"parameters are no longer finite at step {self.progress.step}") from error

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"training diverged: {what}; the checkpoints in {self.folder} are from before that; try a lower --lr or "
            "--clip"
        )

    def _end_interval(self) -> None:
        """Notes the interval's numbers. On a GPU its loss is written an interval later, so that the host need not wait
        for it."""
        self._write_interval()
        progress = self.progress
        speed = progress.interval_words / progress.interval_seconds
        values = {
            "epoch": progress.epoch + 1,
            "words_per_second": speed,
            "lr": self.config.optim.lr,
            "epoch_fraction": progress.epoch + progress.row / (self.source.shape[0] - 1),
        }
        self.noted = progress.step, progress.interval_words, values, read_later(self.interval_loss)
        self._start_interval()
        if self.device.type != "cuda":
            self._write_interval()

    def _write_interval(self) -> None:
        """Writes what is noted to the logs."""
        if self.noted is None:
            return
        (step, words, values, total), self.noted = self.noted, None
        loss = total() / words
        if loss != loss:
            raise self._diverged(f"the loss is NaN before step {step}")
        self.metrics.write("train", step, loss=loss, ppl=perplexity(loss), **values)
        self.status = f"loss {loss:.3f}, ppl {perplexity(loss):.2f}, {values['words_per_second']:,.0f} words/s"

    def _start_interval(self) -> None:
        self.interval_loss.zero_()
        self.progress.interval_words, self.progress.interval_seconds = 0, 0.0

    def _validate(self) -> float:
        config = self.config
        allow_tf32(self.device, False)
        return evaluate(self.model, self.corpus.valid, config.valid_batch_size, config.optim.bptt, "validate")

    def _keep_if_best(self, loss: float, epoch: int) -> bool:
        better = self.progress.best is None or loss < self.progress.best
        if better:
            self.progress.best = loss
            meta = {"config": self.config.to_json(), "epoch": epoch, "valid_loss": loss}
            save_checkpoint(self.folder / "best.safetensors", self._parameters(), meta, self.config.checkpoint_max_mib)
        return better

    def _finish_epoch(self) -> None:
        """Validates with the averages if there are any, keeps the best model, and may start averaging or end
        fine-tuning."""
        progress = self.progress
        self._write_interval()
        with self.optimizer.averaged():
            loss = self._validate()
            if loss != loss:
                raise self._diverged(f"the validation loss of epoch {progress.epoch + 1} is NaN")
            better = self._keep_if_best(loss, progress.epoch + 1)
        averaging = self.optimizer.averaging
        fires = self.optimizer.record(loss)
        progress.stopped = fires and self.config.start is not None
        progress.epoch += 1
        progress.row = 0
        self.hidden = self._initial_hidden()
        self._start_interval()
        self.metrics.write(
            "valid", progress.step, epoch=progress.epoch, loss=loss, ppl=perplexity(loss), averaging=averaging
        )
        self._save_last()
        plot_learning_curves({self.config.model.head: self.folder}, self.folder / "learning-curve.png")
        starts = self.optimizer.averaging and not averaging
        tqdm.write(
            f"epoch {progress.epoch}: valid loss {loss:.4f}, ppl {perplexity(loss):.2f}"
            + (" (best)" if better else "")
            + (", averaging starts" if starts else "")
            + (", fine-tuning ends" if progress.stopped else "")
        )

    def _finish(self) -> dict[str, Any]:
        config, progress = self.config, self.progress
        best = self.folder / "best.safetensors"
        tensors, meta = load_checkpoint(best)
        load_parameters(self.model, tensors, best)
        allow_tf32(self.device, False)
        test = evaluate(self.model, self.corpus.test, config.test_batch_size, config.optim.bptt, "test")
        result = {
            "valid_ppl": perplexity(meta["valid_loss"]),
            "test_ppl": perplexity(test),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "words_per_second": progress.words / progress.seconds if progress.seconds else None,
            "peak_memory_mib": max(progress.peak_memory_mib, peak_memory_mib(self.device)),
            "seed": config.seed,
            "head": config.model.head,
            "recipe": config.recipe,
            "best_epoch": meta["epoch"],
            "epochs": progress.epoch,
            "training_seconds": progress.seconds,
        }
        write_json(self.folder / "result.json", result)
        return result

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())  # a tied weight once

    def _save_last(self) -> None:
        self._write_interval()
        progress = self.progress
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self._diverged(f"parameters are no longer finite at step {progress.step}")
        progress.metrics_bytes = self.metrics.sync() if self.metrics else 0
        progress.peak_memory_mib = max(progress.peak_memory_mib, peak_memory_mib(self.device))
        optimizer_tensors, optimizer_meta = self.optimizer.state_dict()
        tensors = {f"model.{name}": t for name, t in self._parameters().items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors.items()}
        for i, layers in enumerate(self.hidden):
            for layer, (h, c) in enumerate(layers):
                tensors |= {f"hidden.{i}.{layer}.h": h, f"hidden.{i}.{layer}.c": c}
        tensors |= {"random.torch": torch.get_rng_state(), "random.bptt": self.bptt_generator.get_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["interval_loss"] = self.interval_loss
        meta = {
            "config": self.config.to_json(),
            "progress": dataclasses.asdict(progress),
            "optimizer": optimizer_meta,
            "train": digest(self.corpus.train),
        }
        save_checkpoint(self.folder / "last.safetensors", tensors, meta, self.config.checkpoint_max_mib)

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        path = self.folder / "last.safetensors"
        check_vocabulary(self.corpus, self.folder / "vocabulary.txt")
        if meta.get("train", text := digest(self.corpus.train)) != text:
            raise CheckpointError(
                f"data: {self.config.data} has another train.txt than the run in {self.folder} was trained on"
            )
        load_parameters(self.model, group(tensors, "model"), path)
        try:
            self.progress = Progress(**meta["progress"])
            self.optimizer.load_state_dict(group(tensors, "optimizer"), meta["optimizer"])
            self.hidden = [
                [
                    (tensors[f"hidden.{i}.{layer}.h"].to(self.device), tensors[f"hidden.{i}.{layer}.c"].to(self.device))
                    for layer in range(len(layers))
                ]
                for i, layers in enumerate(self.hidden)
            ]
            self.interval_loss = tensors["interval_loss"].to(self.device)
            torch.set_rng_state(tensors["random.torch"])
            self.bptt_generator.set_state(tensors["random.bptt"])
            if self.device.type == "cuda" and "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} is of another version: {error}") from None


def begun(path: Path) -> bool:
    """Whether a file is what a run leaves that was killed while it wrote its very first checkpoint."""
    return path.name.startswith("last.safetensors.")


def resumed_config(folder: Path) -> TrainConfig:
    """The configuration of the run in `folder`, ready to continue it. Raises CheckpointError."""
    _, meta = load_checkpoint(folder / "last.safetensors")
    return dataclasses.replace(
        TrainConfig.from_json(meta["config"]), out=folder, resume=folder, time_limit=0.0, profile=0
    )


def train_to_the_end(folder: Path, new: Callable[[], TrainConfig], **flags: Any) -> None:
    """Trains in `folder`: from the start with the configuration `new()`, or from its last checkpoint; not at all if it
    is finished. `flags` replace fields, of a run that is continued only those that may change."""
    if (folder / "result.json").is_file():
        return
    exists = (folder / "last.safetensors").is_file()
    config = resumed_config(folder) if exists else dataclasses.replace(new(), out=folder)
    print(f"{folder}: {'continued' if exists else 'fine-tuning' if config.start else 'training'}", flush=True)
    changed = dataclasses.replace(config, **flags)
    if exists:
        check_resumable(config, changed)
    Trainer(changed).run()


def check_resumable(saved: TrainConfig, asked: TrainConfig) -> None:
    """Raises ConfigError if `asked` differs from `saved` in more than RESUMABLE_FLAGS."""
    for part_saved, part_asked in ((saved, asked), (saved.model, asked.model), (saved.optim, asked.optim)):
        for field in dataclasses.fields(part_saved):
            before, now = getattr(part_saved, field.name), getattr(part_asked, field.name)
            if before != now and not dataclasses.is_dataclass(before) and field.name not in RESUMABLE_FLAGS:
                raise ConfigError(f"{field.name} cannot change when a run is resumed: it was {before}, got {now}")
