"""The training loop of AWD-LSTM-MoS: SGD, then NT-ASGD, over BPTT segments of random length; resumable at any step."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..data import Corpus, batchify, digest, random_bptt_length, segment
from ..lm import AWDLSTM, NTASGD
from ..lm.awd_lstm import Hidden, activation_regularization, carry_on, temporal_activation_regularization
from ..runtime import files, signals
from ..runtime.progress import bar, say
from . import folder as run_folder
from . import meter, settings
from .checkpoint import Checkpoint, group, load_parameters, save_checkpoint
from .config import TrainConfig
from .device import (
    AsyncScalar,
    allow_tf32,
    autocast,
    check_backend,
    check_memory,
    check_precision,
    device_named,
    peak_memory_mib,
    recurrent_products,
)
from .errors import CheckpointError, TrainingDiverged
from .evaluation import evaluate
from .finite import diverged, explained, first_not_finite
from .graphs import Replayed, allocate_gradients, recorder_for
from .metrics import MetricsLog, perplexity, plot_learning_curves
from .profiling import StepProfile, as_table
from .run import check_vocabulary, load_best, read_config
from .state import Progress, RunTensors, has_begun, is_of_run, last_path, load_last, start_digest


@dataclasses.dataclass
class PendingInterval:
    """A line of metrics.jsonl whose loss is still being copied from the device."""

    step: int
    words: int
    values: dict[str, Any]
    loss: AsyncScalar


class Trainer:
    """Trains a model and writes its run folder: config.json, vocabulary.txt, metrics.jsonl, tensorboard/,
    best.safetensors, last.safetensors, learning-curve.png and, at the end, result.json.

    If the folder has a checkpoint, training continues from it. The folder stays locked until `run` ends.

    Raises ConfigError, CorpusError, CheckpointError or FolderInUse before anything in the folder is changed.
    """

    def __init__(self, config: TrainConfig):
        config.check()
        self.clock = signals.CheckpointClock(config.checkpoint_minutes, config.time_limit)
        self.device = device_named(config.device)
        check_precision(config.precision, self.device)
        check_backend(config.model.backend, self.device, config.precision == "bfloat16")
        self.folder = config.run_folder
        run_folder.check_free(self.folder, is_of_run)
        new = not has_begun(self.folder)
        start = load_best(config.start, read_config(config.start)) if config.start and new else None

        self.corpus = Corpus(config.data, config.map_unknown)
        for split, batch_size in (("valid", config.valid_batch_size), ("test", config.test_batch_size)):
            # fails for a text that is too short, here rather than after an epoch
            batchify(getattr(self.corpus, split), batch_size)
        self.train_digest = digest(self.corpus.train)
        self.source = batchify(self.corpus.train, config.optim.batch_size, least=3).to(self.device)
        # absolute paths, so that the run can be continued from any working directory
        self.config = config = dataclasses.replace(
            config, data=config.data.absolute(), start=config.start and config.start.absolute()
        )
        lock = run_folder.claim(self.folder, is_of_run) if self.folder.exists() else None
        saved = load_last(config, self.corpus)
        self.start_digest = saved.meta.get("start") if saved else start_digest(config)

        torch.manual_seed(config.seed)
        self.bptt_generator = torch.Generator().manual_seed(config.seed)
        model = dataclasses.asdict(config.model)
        with torch.device("meta"):
            shapes = AWDLSTM(len(self.corpus.vocabulary), **model)
        check_memory(sum(p.numel() for p in shapes.parameters()), self.device)
        products = recurrent_products(self.device, config.precision)
        self.model = AWDLSTM(len(self.corpus.vocabulary), **model, products=products).to(self.device)
        optim = config.optim
        self.optimizer = NTASGD(self.model.parameters(), optim.lr, optim.weight_decay, optim.nonmono)
        self.tensors = RunTensors(self.model, self.optimizer, self.bptt_generator, self.device)
        self.progress = Progress()
        self.interval_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.pending_interval: PendingInterval | None = None
        self.status = ""
        self.hidden = self._initial_hidden()
        if saved:
            self._restore(saved)
        elif config.start and start:
            check_vocabulary(self.corpus, config.start / "vocabulary.txt")
            load_parameters(self.model, start.tensors, start.path)
            self.optimizer.start_averaging()
        elif config.init_bias:
            self.model.head.init_bias(torch.bincount(self.corpus.train, minlength=len(self.corpus.vocabulary)))
        if lock is None:
            lock = run_folder.claim(self.folder, is_of_run)
            if has_begun(self.folder):
                raise files.FolderInUse(f"another process has begun a run in {self.folder}; name another --out")
        self._lock = lock
        self.resumed = saved is not None
        # after resuming from the previous checkpoint, keep that one: the last one is damaged
        self._keep_previous = saved is None or saved.path == last_path(self.folder)
        if not self.resumed:  # before any other file, so that a run killed at any moment can continue
            self._write_last()
        self.stopwatch = meter.Stopwatch(self.progress, self.device)
        self.corpus.vocabulary.save(self.folder / "vocabulary.txt")
        files.write_json(self.folder / "config.json", self._config_json())
        self.metrics = MetricsLog(self.folder, self.progress.metrics_bytes, self.progress.step)
        self.profile = StepProfile(self.model, config.profile) if config.profile else None
        self.recorder = None if config.profile else recorder_for(config, self.device)  # a graph has no stages to mark
        self.graphs: Replayed | None = None
        if self.recorder:
            allocate_gradients(self.model.parameters())
            self.graphs = Replayed(self._gradients, self.recorder, optim.bptt + optim.bptt_delta)

    def _config_json(self) -> dict[str, Any]:
        return dataclasses.replace(self.config, resume=None).to_json()

    @property
    def _micro_batch(self) -> int:
        """Number of columns in a micro-batch."""
        return self.config.optim.batch_size // self.config.optim.micro_batches

    def _initial_hidden(self) -> list[Hidden]:
        """Returns a hidden state for each micro-batch."""
        return [
            self.model.initial_hidden(self._micro_batch)
            for _ in range(0, self.config.optim.batch_size, self._micro_batch)
        ]

    def run(self) -> dict[str, Any]:
        """Trains to the last epoch, evaluates the best model, and returns the content of result.json.

        Raises TimeLimitReached or Stopped after saving everything, TrainingDiverged, CaptureFailed, or CheckpointError
        if the best model is gone.
        """
        try:
            with signals.noting():
                if self.config.start and self.progress.best is None:
                    # the starting model is the best one so far
                    self._keep_if_best(self._validate(), epoch=0)
                    self._save_last()
                while self.progress.epoch < self.config.optim.epochs and not self.progress.stopped:
                    self._train_epoch()
                    self._finish_epoch()
                return self._finish()
        finally:
            self.close()

    def close(self) -> None:
        """Closes the logs and releases the folder's lock, as `run` does at its end."""
        self.metrics.close()
        self._lock.release()

    def _train_epoch(self) -> None:
        config, progress = self.config, self.progress
        rows = self.source.shape[0]
        self.model.train()
        allow_tf32(self.device, config.precision != "float32")
        columns = config.optim.batch_size
        with bar(
            desc=f"epoch {progress.epoch + 1}/{config.optim.epochs}",
            unit="words",
            total=(rows - 1) * columns,
            initial=progress.row * columns,
        ) as shown:
            self.stopwatch.start()
            # as in the published code, a single row left at the end is skipped: it would take a full step
            while progress.row < rows - 2:
                length = self.train_step()
                self.stopwatch.lap()
                if progress.step % config.log_interval == 0:
                    self._end_interval()
                    shown.set_postfix_str(self.status, refresh=False)
                shown.update(length * columns)
                self.clock.tick(self._checkpoint)
            self.stopwatch.lap(wait=True)

    def _checkpoint(self) -> None:
        self.stopwatch.lap(wait=True)
        self._save_last()
        self.stopwatch.start()

    def train_step(self, length: int | None = None) -> int:
        """Takes one training step: forward, backward, clipping, optimizer. Returns the rows of its segment, which may
        be fewer at the end of the text.

        Everything but the optimizer may be a graph's replay. The optimizer is not recorded, since its learning rate is
        a host value that follows the segment length.

        Args:
            length: of the segment; by default it is random.
        """
        optim, progress = self.config.optim, self.progress
        if self.profile:
            self.profile.start()
        drawn = length or random_bptt_length(optim.bptt, optim.bptt + optim.bptt_delta, self.bptt_generator)
        inputs, targets = segment(self.source, progress.row, drawn)
        with explained(self.tensors.parameters, self._diverged):
            (self.graphs or self._gradients)(inputs, targets)
        # as in the published code, the learning rate follows the drawn length even if the text ends before it
        self.optimizer.step(scale=drawn / optim.bptt)
        self._mark("optimizer")
        progress.row += inputs.shape[0]
        progress.count(inputs.numel())
        if self.profile:
            self._end_profile_step(self.profile, inputs.numel())
        return inputs.shape[0]

    def _gradients(self, inputs: Tensor, targets: Tensor) -> None:
        """Computes the clipped gradients of a segment (T, B), updates the hidden states, and adds to the interval's
        loss. It writes to permanent tensors only, since a graph may replay it."""
        optim, mark = self.config.optim, self._mark
        self.optimizer.zero_grad(set_to_none=self.graphs is None)
        mark("data")
        for i, columns in enumerate(range(0, optim.batch_size, self._micro_batch)):
            part = slice(columns, columns + self._micro_batch)
            with autocast(self.device, self.config.precision):
                output = self.model(inputs[:, part], targets[:, part], self.hidden[i])
            loss = output.loss
            if optim.alpha:
                loss = loss + optim.alpha * activation_regularization(output.dropped)
            if optim.beta:
                loss = loss + optim.beta * temporal_activation_regularization(output.raw)
            (loss * (self._micro_batch / optim.batch_size)).backward()
            mark("embedding, backward")
            carry_on(self.hidden[i], output.hidden)
            self.interval_loss += output.loss.detach() * (self._micro_batch * inputs.shape[0])
        if optim.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip)
        mark("clipping")

    def _mark(self, stage: str) -> None:
        if self.profile:
            self.profile.mark(stage)

    def _end_profile_step(self, profile: StepProfile, words: int) -> None:
        """Writes profile.json after the last profiled step."""
        profile.stop(words)
        if profile.done:
            report, self.profile = profile.report(), None
            files.write_json(self.folder / "profile.json", report)
            say(as_table(report))

    def _diverged(self, what: str) -> TrainingDiverged:
        return diverged(what, self.progress.step, self.folder)

    def _end_interval(self) -> None:
        """Ends the interval and logs it. On a GPU its loss is logged one interval later, so that the host does not wait
        for it."""
        self._write_interval()
        progress = self.progress
        values = {
            "epoch": progress.epoch + 1,
            "words_per_second": progress.interval_words / progress.interval_seconds,
            "lr": self.config.optim.lr,
            "epoch_fraction": progress.epoch + progress.row / (self.source.shape[0] - 1),
        }
        loss = AsyncScalar(self.interval_loss)
        self.pending_interval = PendingInterval(progress.step, progress.interval_words, values, loss)
        self._start_interval()
        if self.device.type != "cuda":
            self._write_interval()

    def _write_interval(self) -> None:
        """Writes the pending interval to the logs, if there is one."""
        if self.pending_interval is None:
            return
        pending, self.pending_interval = self.pending_interval, None
        loss = pending.loss.item() / pending.words
        if loss != loss:
            raise self._diverged(f"the loss before step {pending.step} is NaN")
        self.metrics.write("train", pending.step, loss=loss, ppl=perplexity(loss), **pending.values)
        self.status = f"ppl {perplexity(loss):.2f}"

    def _start_interval(self) -> None:
        self.interval_loss.zero_()
        self.progress.start_interval()

    def _validate(self) -> float:
        config = self.config
        allow_tf32(self.device, False)
        tokens, columns, bptt = self.corpus.valid, config.valid_batch_size, config.optim.bptt
        with explained(self.tensors.parameters, self._diverged):
            loss = evaluate(self.model, tokens, columns, bptt, "validate", signals.check, self.recorder)
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss after {self.progress.epoch} epochs is {loss}")
        return loss

    def _keep_if_best(self, loss: float, epoch: int) -> bool:
        better = self.progress.best is None or loss < self.progress.best
        if better:
            self.progress.best = loss
            path, tensors = self.folder / "best.safetensors", self.tensors.parameters()
            meta = {"config": self._config_json(), "epoch": epoch, "valid_loss": loss}
            meta |= {"train": self.train_digest, "vocabulary": self.corpus.vocabulary.digest}
            save_checkpoint(path, tensors, meta, self.config.checkpoint_max_mib)
        return better

    def _finish_epoch(self) -> None:
        """Validates, with the averaged weights if there are any, and saves the best model. It may start averaging or
        end fine-tuning."""
        progress = self.progress
        self._write_interval()
        try:
            with self.optimizer.averaged():
                loss = self._validate()
                better = self._keep_if_best(loss, progress.epoch + 1)
        except signals.Stopped:
            self._save_last()  # at the last row of the epoch: when the run continues, it validates first
            raise
        averaging = self.optimizer.averaging
        fires = self.optimizer.record(loss)
        progress.stopped = fires and self.config.start is not None
        progress.epoch += 1
        progress.row = 0
        for hidden, zeros in zip(self.hidden, self._initial_hidden()):
            carry_on(hidden, zeros)
        self._start_interval()
        self.metrics.write(
            "valid", progress.step, epoch=progress.epoch, loss=loss, ppl=perplexity(loss), averaging=averaging
        )
        self._save_last()
        plot_learning_curves({self.config.model.head: self.folder}, self.folder / "learning-curve.png")
        notes = [
            "best" if better else "",
            "averaging starts" if self.optimizer.averaging and not averaging else "",
            "fine-tuning ends" if progress.stopped else "",
        ]
        told = f" ({', '.join(filter(None, notes))})" if any(notes) else ""
        say(f"epoch {progress.epoch}: valid loss {loss:.4f}, ppl {perplexity(loss):.2f}{told}")

    def _finish(self) -> dict[str, Any]:
        config, progress = self.config, self.progress
        best = load_best(self.folder, config, validated=True)
        load_parameters(self.model, best.tensors, best.path)
        allow_tf32(self.device, False)
        tokens, columns, bptt = self.corpus.test, config.test_batch_size, config.optim.bptt
        test = evaluate(self.model, tokens, columns, bptt, "test", signals.check, self.recorder)
        result = {
            "valid_ppl": perplexity(best.meta["valid_loss"]),
            "test_ppl": perplexity(test),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "words_per_second": progress.words_per_second,
            "peak_memory_mib": max(progress.peak_memory_mib, peak_memory_mib(self.device)),
            "seed": config.seed,
            "head": config.model.head,
            "recipe": config.recipe,
            "best_epoch": best.meta["epoch"],
            "epochs": progress.epoch,
            "training_seconds": progress.seconds,
        }
        files.write_json(self.folder / "result.json", result)
        return result

    def _save_last(self) -> None:
        """Saves the run and flushes its logs. Raises TrainingDiverged if a tensor is not finite."""
        self._write_interval()
        self.progress.metrics_bytes = self.metrics.sync()
        self._write_last()

    def _write_last(self) -> None:
        progress = self.progress
        progress.peak_memory_mib = max(progress.peak_memory_mib, peak_memory_mib(self.device))
        tensors, optimizer_meta = self.tensors.to_save(self.hidden, self.interval_loss)
        if name := first_not_finite(tensors):
            raise self._diverged(f"{name} is no longer finite")
        meta = {
            "config": self._config_json(),
            "progress": dataclasses.asdict(progress),
            "optimizer": optimizer_meta,
            "train": self.train_digest,
            "start": self.start_digest,
        }
        path, max_mib = last_path(self.folder), self.config.checkpoint_max_mib
        save_checkpoint(path, tensors, meta, max_mib, self._keep_previous)
        self._keep_previous = True

    def _restore(self, saved: Checkpoint) -> None:
        tensors, meta, path = saved
        load_parameters(self.model, group(tensors, "model"), path)
        try:
            self.progress = settings.read_record(Progress, meta["progress"])
            if self.progress.row >= (rows := self.source.shape[0]):
                raise ValueError(f"row must be less than {rows}, the rows of the text, got {self.progress.row}")
            self.tensors.restore(tensors, meta["optimizer"], self.hidden, self.interval_loss)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {path} is of another version or model: {error}") from None
        if self.progress.best is not None:  # check the best model here rather than at the run's end
            best = load_best(self.folder, self.config, validated=True)
            # a newer one, from an epoch that this run is about to repeat, is at least as good
            if best.meta["valid_loss"] > self.progress.best:
                raise CheckpointError(
                    f"{best.path} is older than {path}: its validation loss is {best.meta['valid_loss']:.4f}, and the "
                    f"run's best is {self.progress.best:.4f}; restore the newer one"
                )
