"""The loop of a One Billion Word run: data-parallel, with a decoder that may be sharded, resumable on any number of
ranks."""

import dataclasses
import hashlib
import math
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ...data.corpus import CorpusError
from ...data.token_stream import Position, PreparedCorpus, TokenFile, TrainStream, evaluation_segments
from ...lm import AWDLSTM
from ...vocab_parallel import parallelize
from ..checkpoint import CheckpointClock, CheckpointError, TimeLimitReached
from ..config import ConfigError
from ..device import allow_tf32, peak_memory_mib
from ..logging import MetricsLog, perplexity, plot_learning_curves
from ..run import write_json
from ..trainer import TrainingDiverged
from . import checkpoint, memory
from .config import LM1BConfig
from .loss import SummedLoss
from .optim import learning_rate, make_optimizer
from .ranks import Ranks
from .state import RunTensors, initialize

CHANGEABLE = {
    "data",
    "out",
    "evaluate",
    "accumulate",
    "head_chunk",
    "epochs",
    "max_steps",
    "vocab_parallel",
    "device",
    "eval_interval",
    "eval_shards",
    "eval_batch_size",
    "log_interval",
    "checkpoint_minutes",
    "time_limit",
    "memory_gib",
    "backend",
}
"""Fields that may differ from those of the checkpoint; any other would make it another run."""


class Stopped(Exception):
    """A signal has arrived, on any rank; everything is saved. `signum`: which."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@dataclasses.dataclass
class Progress:
    """Where a run stands; with the parameters, optimizer, hidden and random states this is all of its state, the same
    on all ranks."""

    position: Position = dataclasses.field(default_factory=Position)
    step: int = 0
    words: int = 0  # predicted, over all ranks
    seconds: float = 0.0  # of training
    best: float | None = None  # lowest held-out loss
    evaluated: int = 0  # step of the last evaluation
    interval_loss: float = 0.0  # sums since the last line of metrics.jsonl
    interval_words: int = 0
    interval_seconds: float = 0.0
    metrics_bytes: int = 0


class Wish(NamedTuple):
    """What all ranks do after a step, if one of them wants it."""

    signum: int  # of a signal that ends the run, or 0
    save: bool
    stop: bool  # the time is up


class LM1BTrainer:
    """A run in its folder: config.json, metrics.jsonl, tensorboard/, checkpoints/, best/, learning-curve.png and, at
    the end, result.json.

    Raises ConfigError, CorpusError or CheckpointError, on all ranks, before anything in the folder is changed.
    """

    def __init__(self, config: LM1BConfig, ranks: Ranks):
        config.check_ranks(ranks.n_ranks)
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.folder = config.run_folder
        self.checkpoints, self.best = self.folder / "checkpoints", self.folder / "best"
        self.clock = CheckpointClock(config.checkpoint_minutes, config.time_limit)
        if config.precision == "tf32" and self.device.type != "cuda":
            raise ConfigError(f"precision tf32 is that of NVIDIA GPUs, got device {self.device}")
        self.corpus = self._read_corpus()
        self.memory = "" if config.evaluate else memory.check(config, len(self.corpus.vocabulary), ranks)
        self.progress = Progress()
        self.stream = TrainStream(
            self.corpus.train,
            config.batch_size,
            ranks.columns(config.batch_size),
            config.bptt,
            config.seed,
            self.progress.position,
        )
        torch.manual_seed(config.seed)
        self.model = AWDLSTM(
            len(self.corpus.vocabulary), **dataclasses.asdict(config.model)
        )  # on the CPU: the same on every device
        self.shard = parallelize(self.model, ranks.mesh["vocab"].get_group()) if ranks.n_vocab > 1 else None
        self.model.to(self.device)
        self.loss = SummedLoss(self.model, self.corpus.bos, config.head_chunk)
        self.optimizer = make_optimizer(config, self.model, self.device)
        initialize(self.model, self.optimizer)
        self.tensors = RunTensors(self.model, self.optimizer, self.shard, ranks)
        self._seed_dropout(0)
        self.parts = [range(start, start + self._part) for start in range(0, len(self.stream.columns), self._part)]
        self.hidden = [self.model.initial_hidden(self._part) for _ in self.parts]
        self.signals = {signal.SIGTERM: 0, signal.SIGINT: 0}
        self.metrics: MetricsLog | None = None
        self.resumed = checkpoint.newest(self.checkpoints, ranks)
        if self.resumed:
            self._restore(self.resumed)
        elif not config.evaluate:
            self._check_empty()
        self.distributed = self.loss
        if ranks.n_data > 1:  # only now: it makes the parameters of all ranks the same
            group, devices = ranks.mesh["data"].get_group(), [self.device] if self.device.type == "cuda" else None
            self.distributed = DistributedDataParallel(
                self.loss, devices, process_group=group, gradient_as_bucket_view=True
            )

    @property
    def _part(self) -> int:
        return len(self.stream.columns) // self.config.accumulate

    @property
    def n_parameters(self) -> int:
        sharded = (
            0
            if self.shard is None
            else (self.shard.n_classes - self.shard.stop + self.shard.start) * (self.config.model.embedding_size + 1)
        )
        return sum(p.numel() for p in self.model.parameters()) + sharded

    def _read_corpus(self) -> PreparedCorpus:
        error = corpus = None
        try:
            corpus = PreparedCorpus(self.config.data)
            corpus.check(self.ranks.local_rank, self.ranks.n_local)  # each machine its own files
        except CorpusError as failure:
            error = failure
        self.ranks.agree(error)
        if not self.ranks.have_the_same(
            hashlib.sha256("".join([corpus.digest, *(f.sha256 for f in (*corpus.train, *corpus.heldout))]).encode())
        ):
            raise CorpusError(f"data: {self.config.data} is not the same corpus on all ranks")
        return corpus

    def _check_empty(self) -> None:
        # a folder of checkpoints, none of them complete, is that of a run which was killed while it wrote its first
        others = (
            self.ranks.first
            and self.folder.exists()
            and (not self.folder.is_dir() or any(p != self.checkpoints for p in self.folder.iterdir()))
        )
        message = f"out: {self.folder} is not empty and holds no checkpoint; name another --out"
        self.ranks.agree(ConfigError(message) if others else None)

    def _seed_dropout(self, step: int) -> None:
        """Each group of ranks that reads other text draws other masks."""
        torch.manual_seed(hash((self.config.seed, step, self.ranks.data)) % 2**63)

    # --------------------------------------------------------------------------------------------------------- training

    def run(self) -> dict[str, Any]:
        """Trains to the end, evaluates the best model on the held-out shards, and returns what it writes to
        result.json.

        Raises Stopped or TimeLimitReached, with everything saved, TrainingDiverged, or CheckpointError where the disk
        is full.
        """
        if not self.resumed:
            self._save()  # before anything else, so that there is no moment from which a run cannot go on
        if self.ranks.first:
            write_json(self.folder / "config.json", self.config.to_json())
            self.metrics = MetricsLog(self.folder, self.progress.metrics_bytes, self.progress.step)
        before = {number: signal.signal(number, self._on_signal) for number in self.signals}
        try:
            self._train()
            self._evaluate_and_keep_best()
            self._save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.metrics:
                self.metrics.close()
        return self.final_evaluation()

    @property
    def _done(self) -> bool:
        config, progress = self.config, self.progress
        return progress.position.epoch >= config.epochs or 0 < config.max_steps <= progress.step

    def _train(self) -> None:
        config, progress = self.config, self.progress
        interval = 0.5 if sys.stderr.isatty() else 30.0
        rows, done = (
            self.stream.rows_per_epoch * config.epochs,
            round(self.stream.fraction * self.stream.rows_per_epoch),
        )
        with tqdm(
            total=rows,
            initial=done,
            unit="rows",
            mininterval=interval,
            dynamic_ncols=True,
            disable=not self.ranks.first,
        ) as bar:
            self._since = time.monotonic()
            while not self._done:
                for inputs, targets in self.stream.segments():
                    wish = self.train_step(inputs, targets)
                    bar.update(len(inputs))
                    self._count_time()
                    if progress.step % config.log_interval == 0:
                        self._log(bar)
                    if progress.step % config.eval_interval == 0:
                        self._evaluate_and_keep_best()
                        self._since = time.monotonic()
                    if wish.save:
                        self._save()
                        self.clock.saved()
                        self._since = time.monotonic()
                    if wish.signum:
                        raise Stopped(wish.signum)
                    if wish.stop:
                        raise TimeLimitReached
                    if self._done:
                        break

    def train_step(self, inputs: Tensor, targets: Tensor) -> "Wish":
        """One segment of this rank's columns (T, B). Returns what is to be done after it, the same on all ranks."""
        ranks, config, progress = self.ranks, self.config, self.progress
        self.model.train()
        allow_tf32(self.device, config.precision != "float32")
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        words = ranks.sums((targets != self.corpus.bos).sum() / ranks.n_vocab)[0].clamp(min=1)
        # in several parts DistributedDataParallel would make new gradients beside those in its buckets
        self.optimizer.zero_grad(set_to_none=self.distributed is self.loss or len(self.parts) == 1)
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, part in enumerate(self.parts):
            last = i + 1 == len(self.parts)
            columns = slice(part.start, part.stop)
            with nullcontext() if last or self.distributed is self.loss else self.distributed.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                    loss, self.hidden[i] = self.distributed(inputs[:, columns], targets[:, columns], self.hidden[i])
                # DistributedDataParallel takes the mean over ranks of what is here a sum over words
                (loss * (ranks.n_data / words).to(loss.dtype)).backward()
            nll += loss.detach()
        total, norm, words, wish = self._exchange(nll, words)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"training diverged at step {progress.step + 1}: loss {total / max(words, 1):.4g}, norm of the "
                f"gradient {norm:.4g}; nothing was "
                f"updated, and the checkpoints in {self.checkpoints} are from before that; try a lower --lr or --clip"
            )
        if config.clip and norm > config.clip:
            torch._foreach_mul_([p.grad for p in self.model.parameters()], config.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, progress.step, self.total_steps)
        self.optimizer.step()
        progress.step += 1
        progress.words += round(words)
        progress.interval_loss += total
        progress.interval_words += round(words)
        return wish

    def _exchange(self, nll: Tensor, words: Tensor) -> tuple[float, float, float, "Wish"]:
        """Over all ranks: the summed NLL, the norm of the whole gradient, the words, and what is to be done. The one
        time that a step waits."""
        sharded, whole = [], []
        for name, p in self.model.named_parameters():
            (sharded if self.tensors.is_sharded(name) else whole).append(p.grad)
        ranks, clock = self.ranks, self.clock
        if ranks.n_vocab > 1:  # the same up to rounding, on which some kernels do not decide alike
            for grad in whole:
                dist.all_reduce(grad, group=ranks.mesh["vocab"].get_group())
            torch._foreach_div_(whole, ranks.n_vocab)
        squares = [
            torch.nn.utils.get_total_norm(grads).double() ** 2 if grads else nll.new_zeros(())
            for grads in (sharded, whole)
        ]
        times = (clock.due, clock.over) if ranks.first else (0, 0)  # clocks differ
        numbers = ranks.sums(
            nll / ranks.n_vocab, squares[0] / ranks.n_data + squares[1] / ranks.n_ranks, *self.signals.values(), *times
        )
        total, square, terminate, interrupt, due, over, words = torch.cat([numbers, words[None]]).tolist()
        signum = signal.SIGINT if interrupt else signal.SIGTERM if terminate else 0
        return total, math.sqrt(square), words, Wish(signum, bool(due or signum), bool(over))

    @property
    def total_steps(self) -> int:
        config = self.config
        rows = (file.n_tokens // config.batch_size - 1 for file in self.corpus.train)
        steps = config.epochs * sum(-(-n // config.bptt) for n in rows)
        return min(steps, config.max_steps) if config.max_steps else steps

    def _on_signal(self, signum: int, frame) -> None:
        """The next step will see it; a second one of the kind acts at once."""
        self.signals[signum] = 1
        signal.signal(signum, signal.SIG_DFL)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._since
        self.progress.interval_seconds += now - self._since
        self._since = now

    def _log(self, bar: tqdm) -> None:
        progress = self.progress
        loss, speed = (
            progress.interval_loss / progress.interval_words,
            progress.interval_words / progress.interval_seconds,
        )
        if self.metrics:
            self.metrics.write(
                "train",
                progress.step,
                loss=loss,
                ppl=perplexity(loss),
                words_per_second=speed,
                words_per_second_per_rank=speed / self.ranks.n_ranks,
                lr=learning_rate(self.config, progress.step - 1, self.total_steps),
                epoch_fraction=self.stream.fraction,
            )
        bar.set_postfix_str(
            f"loss {loss:.3f}, ppl {perplexity(loss):.2f}, {speed:,.0f} words/s, {speed / self.ranks.n_ranks:,.0f} a "
            "rank",
            refresh=False,
        )
        progress.interval_loss, progress.interval_words, progress.interval_seconds = 0.0, 0, 0.0

    # ------------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, files: list[TokenFile]) -> tuple[float, int]:
        """Mean NLL in nats over every word of the files, </S> and <UNK> among them, and how many that are. The hidden
        state starts anew with each file."""
        config, ranks = self.config, self.ranks
        self.model.eval()
        allow_tf32(self.device, False)
        columns = ranks.columns(config.eval_batch_size)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for file in tqdm(
            files,
            desc="evaluate",
            unit="shards",
            leave=False,
            dynamic_ncols=True,
            disable=not ranks.first or len(files) == 1,
        ):
            hidden = self.model.initial_hidden(len(columns))
            for inputs, targets in evaluation_segments(
                file, self.corpus.bos, config.eval_batch_size, columns, config.bptt
            ):
                targets = targets.to(self.device)
                loss, hidden = self.loss(inputs.to(self.device), targets, hidden)
                total += loss
                count += (targets != self.corpus.bos).sum()
        loss, words = (ranks.sums(total, count) / ranks.n_vocab).tolist()
        return loss / words, round(words)

    def _evaluate_and_keep_best(self) -> None:
        progress = self.progress
        if progress.evaluated == progress.step:
            return
        progress.evaluated = progress.step
        loss, words = self.evaluate(self.corpus.heldout[: self.config.eval_shards or None])
        better = progress.best is None or loss < progress.best
        if better:
            progress.best = loss
            path = self.best / checkpoint.step_name(progress.step)
            checkpoint.save(path, self.tensors.parameters(), {"step": progress.step, "loss": loss}, self.ranks)
            if self.ranks.first:
                checkpoint.remove_older(self.best, path)
        if self.ranks.first:
            epoch = self.stream.fraction
            self.metrics.write(
                "valid", progress.step, loss=loss, ppl=perplexity(loss), words=words, epoch=epoch, averaging=False
            )
            plot_learning_curves({self.config.model.head: self.folder}, self.folder / "learning-curve.png")
            tqdm.write(
                f"step {progress.step}: held-out ppl {perplexity(loss):.2f} over {words:,} words"
                + (" (best)" if better else "")
            )

    def final_evaluation(self) -> dict[str, Any]:
        """The best model on all held-out shards. Raises CheckpointError where there is none."""
        best = checkpoint.newest(self.best, self.ranks)
        if best is None:
            raise CheckpointError(f"{self.folder} has no best model: it is not the folder of a run that was evaluated")
        state = checkpoint.read_state(best)
        checkpoint.load(best, self.tensors.parameters())
        loss, words = self.evaluate(self.corpus.heldout)
        progress = self.progress
        result = {
            "recipe": self.config.recipe,
            "head": self.config.model.head,
            "seed": self.config.seed,
            "parameters": self.n_parameters,
            "vocabulary": len(self.corpus.vocabulary),
            "heldout_ppl": perplexity(loss),
            "heldout_loss": loss,
            "heldout_words": words,
            "best_step": state["step"],
            "steps": progress.step,
            "words": progress.words,
            "ranks": self.ranks.n_ranks,
            "words_per_second": progress.words / progress.seconds if progress.seconds else None,
            "training_seconds": progress.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        if self.ranks.first:
            write_json(self.folder / "result.json", result)
        return result

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        progress = self.progress
        if self.metrics:
            progress.metrics_bytes = self.metrics.sync()
        state = {
            "config": self.config.to_json(),
            "progress": dataclasses.asdict(progress),
            "vocabulary": self.corpus.digest,
            "shards": [file.sha256 for file in self.corpus.train],
            "random": [self.ranks.n_data, self.device.type],
        }
        path = self.checkpoints / checkpoint.step_name(progress.step)
        checkpoint.save(
            path, self.tensors.training() | self.tensors.hidden(self.hidden) | self.tensors.random(), state, self.ranks
        )
        if self.ranks.first:
            checkpoint.remove_older(self.checkpoints, path)

    def _restore(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        self._check_same_run(state, path)
        tensors = self.tensors.training() | self.tensors.hidden(self.hidden)
        same_ranks = state["random"] == [self.ranks.n_data, self.device.type]
        if same_ranks:
            tensors |= self.tensors.random()
        checkpoint.load(path, tensors)
        try:
            values = state["progress"]
            self.progress = Progress(**values | {"position": Position(**values["position"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path} is of another version: {error}") from None
        self.stream.position = self.progress.position
        self.hidden = self.tensors.parts_of(tensors, self._part)
        if same_ranks:
            self.tensors.set_random(tensors)
        else:
            self._seed_dropout(self.progress.step)

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        if state["vocabulary"] != self.corpus.digest or state["shards"] != [file.sha256 for file in self.corpus.train]:
            raise CheckpointError(f"data: {self.config.data} is not the corpus that {path} was trained on")
        saved, asked, default = state["config"], self.config.to_json(), LM1BConfig().to_json()
        for was, now, otherwise in ((saved["model"], asked["model"], default["model"]), (saved, asked, default)):
            for name in now:
                before = was.get(
                    name, otherwise[name]
                )  # a field that came later has the value that it has where nobody asks for another
                if name not in {"model", *CHANGEABLE} and _as_json(before) != _as_json(now[name]):
                    raise ConfigError(
                        f"{name} cannot change when a run goes on: it was {before}, got {now[name]}; name another --out"
                    )


def _as_json(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value
