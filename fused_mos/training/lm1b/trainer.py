"""The training loop for One Billion Words: data-parallel, with an optionally sharded decoder, and resumable on any
number of ranks."""

import dataclasses
import hashlib
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ...data.corpus import CorpusError
from ...data.token_stream import PreparedCorpus, Segment, TokenFile, TrainStream
from ...lm import AWDLSTM
from ...lm.awd_lstm import carry_on, gradients
from ...runtime import UserError, files, signals
from ...runtime.progress import bar, say
from ...vocab_parallel import parallelize
from .. import folder as run_folder
from .. import meter, settings
from ..device import (
    allow_tf32,
    autocast,
    check_backend,
    check_precision,
    on_device,
    peak_memory_mib,
    recurrent_products,
)
from ..errors import CheckpointError, TrainingDiverged
from ..finite import diverged, explained, first_not_finite
from ..graphs import Replayed, allocate_gradients, recorder_for
from ..metrics import MetricsLog, perplexity, plot_learning_curves
from . import checkpoint, memory
from .best import BestModel
from .config import LM1BConfig
from .evaluation import check_columns, evaluate
from .exchange import StepDecision, exchange
from .loss import SummedLoss
from .optim import learning_rate, make_optimizer
from .ranks import Ranks
from .state import Progress, RunTensors, check_identity, identity, initialize, saved_form


class LM1BTrainer:
    """Trains a model and writes its run folder: config.json, metrics.jsonl, tensorboard/, checkpoints/, best/,
    learning-curve.png and, at the end, result.json.

    Raises ConfigError, CorpusError or CheckpointError, on all ranks, before anything in the folder is changed.
    """

    def __init__(self, config: LM1BConfig, ranks: Ranks):
        config.check_ranks(ranks.n_ranks)
        self.config, self.ranks, self.device = config, ranks, ranks.device
        self.folder = config.run_folder
        run_folder.check_name("out", self.folder)
        self.checkpoints = self.folder / checkpoint.FOLDER
        self.clock = signals.CheckpointClock(config.checkpoint_minutes, config.time_limit)
        check_precision(config.precision, self.device)
        check_backend(config.model.backend, self.device, config.precision == "bfloat16")
        self.corpus = self._read_corpus()
        check_columns(config.eval_batch_size, self.corpus.heldout)
        self.progress = Progress()
        self.stream = TrainStream(
            self.corpus.train,
            config.batch_size,
            ranks.columns(config.batch_size),
            config.bptt,
            self.corpus.bos,
            config.seed,
            self.progress.position,
        )
        self.memory = "" if config.evaluate else memory.check(config, len(self.corpus.vocabulary), ranks)
        torch.manual_seed(config.seed)
        # initialised on the CPU, so that it is the same on every device
        products = recurrent_products(self.device, config.precision)
        self.model = AWDLSTM(len(self.corpus.vocabulary), **dataclasses.asdict(config.model), products=products)
        self.shard = parallelize(self.model, ranks.mesh["vocab"].get_group()) if ranks.n_vocab > 1 else None
        self.model.to(self.device)
        self.loss = SummedLoss(self.model, self.corpus.bos, config.head_chunk)
        self.optimizer = make_optimizer(config, self.model, self.device)
        initialize(self.model, self.optimizer)
        self.tensors = RunTensors(self.model, self.optimizer, self.shard, ranks)
        self.best = BestModel(config, self.corpus, self.tensors, ranks)
        self._seed_dropout(0)
        self.parts = [range(start, start + self._part) for start in range(0, len(self.stream.columns), self._part)]
        self.hidden = [self.model.initial_hidden(self._part) for _ in self.parts]
        self.nll = torch.zeros((), dtype=torch.float64, device=self.device)
        """Loss of a step, summed over this rank's words."""
        self.loss_scale = torch.ones((), device=self.device)
        self.metrics: MetricsLog | None = None
        self._lock = None if config.evaluate else self._claim_folder()
        self.resumed = checkpoint.newest(self.checkpoints, ranks)
        if self.resumed:
            self._restore(self.resumed)
        elif config.resume:
            raise CheckpointError(f"there is no checkpoint in {self.checkpoints}")
        elif config.init_bias and not config.evaluate:
            self.model.head.init_bias(ranks.add_up(self.corpus.count_targets(ranks.rank, ranks.n_ranks)))
        self.stopwatch = meter.Stopwatch(self.progress, self.device)
        self.distributed: DistributedDataParallel | None = None
        if ranks.n_data > 1:  # only after loading: it copies rank 0's parameters to all ranks
            group, devices = ranks.mesh["data"].get_group(), [self.device] if self.device.type == "cuda" else None
            self.distributed = DistributedDataParallel(
                self.loss, devices, process_group=group, gradient_as_bucket_view=True
            )
        # collectives within a step and DistributedDataParallel's hooks cannot be recorded
        recorder = recorder_for(config, self.device) if ranks.n_ranks == 1 else None
        self.graphs: Replayed | None = None
        if recorder:
            allocate_gradients(self.model.parameters())
            self.graphs = Replayed(self._gradients, recorder, config.bptt)

    @property
    def _part(self) -> int:
        return len(self.stream.columns) // self.config.micro_batches

    @property
    def n_parameters(self) -> int:
        """Number of parameters of the whole model, of which this rank may hold a shard."""
        own = sum(p.numel() for p in self.model.parameters())
        if self.shard is None:
            return own
        rows_of_others = self.shard.n_classes - (self.shard.stop - self.shard.start)
        return own + rows_of_others * (self.config.model.embedding_size + 1)

    def _read_corpus(self) -> PreparedCorpus:
        error = None
        try:
            corpus = PreparedCorpus(self.config.data)
            corpus.check(self.ranks.local_rank, self.ranks.n_local)  # each machine checks all of its files
        except CorpusError as failure:
            error = failure
        self.ranks.agree(error)
        digests = [corpus.digest, *(file.sha256 for file in (*corpus.train, *corpus.heldout))]
        if not self.ranks.have_the_same(hashlib.sha256("".join(digests).encode())):
            raise CorpusError(f"data: {self.config.data} is not the same corpus on all ranks")
        return corpus

    def _claim_folder(self) -> files.FolderLock | None:
        """Locks the run's folder for the main rank. If that fails, all ranks raise."""
        lock, error = None, None
        if self.ranks.is_main:
            try:
                lock = run_folder.claim(self.folder, lambda path: path == self.checkpoints)
            except UserError as failure:
                error = failure
        self.ranks.agree(error)
        return lock

    def _seed_dropout(self, step: int) -> None:
        """Seeds dropout. Ranks that read different text draw different masks."""
        torch.manual_seed(hash((self.config.seed, step, self.ranks.data)) % 2**63)

    # --------------------------------------------------------------------------------------------------------- training

    def run(self) -> dict[str, Any]:
        """Trains to the end, evaluates the best model on the held-out shards, and returns the content of result.json.

        Raises Stopped or TimeLimitReached after saving everything, TrainingDiverged, CaptureFailed, or CheckpointError
        if the disk is full.
        """
        if not self.resumed:
            self._save()  # before any other file, so that a run killed at any moment can continue
        if self.ranks.is_main:
            files.write_json(self.folder / "config.json", saved_form(self.config))
            self.metrics = MetricsLog(self.folder, self.progress.metrics_bytes, self.progress.step)
        try:
            with signals.noting():
                self._train()
                self._evaluate_and_keep_best()
                self._save()
            result = self.final_evaluation()
            self.write_result(result)
            return result
        finally:
            if self.metrics:
                self.metrics.close()
            if self._lock:
                self._lock.release()

    @property
    def _done(self) -> bool:
        config, progress = self.config, self.progress
        return progress.position.epoch >= config.epochs or 0 < config.max_steps <= progress.step

    def _train(self) -> None:
        config, progress = self.config, self.progress
        columns, rows = config.batch_size, self.stream.rows_per_epoch
        with bar(
            desc="train",
            unit="words",
            total=min(rows * config.epochs, (config.max_steps or math.inf) * config.bptt) * columns,
            initial=round(self.stream.fraction * rows) * columns,
            disable=not self.ranks.is_main,
        ) as shown:
            self.stopwatch.start()
            while not self._done:
                for segment in self.stream.segments():
                    decision = self.train_step(segment)
                    shown.update(len(segment.inputs) * columns)
                    self.stopwatch.lap()
                    if progress.step % config.log_interval == 0:
                        self._log(shown)
                    if progress.step % config.eval_interval == 0:
                        self._evaluate_and_keep_best()
                        self.stopwatch.start()
                    if decision.save:
                        self._save()
                        self.clock.saved()
                        self.stopwatch.start()
                    if decision.signum:
                        raise signals.Stopped(decision.signum)
                    if decision.stop:
                        raise signals.TimeLimitReached
                    if self._done:
                        break

    def train_step(self, segment: Segment) -> StepDecision:
        """Takes one training step on a segment of this rank's columns. Returns what to do after it, the same on all
        ranks.

        On a single rank, the forward and backward pass may be a graph's replay.
        """
        ranks, config, progress = self.ranks, self.config, self.progress
        self.model.train()
        allow_tf32(self.device, config.precision != "float32")
        inputs, targets = on_device(segment.inputs, self.device), on_device(segment.targets, self.device)
        words = max(segment.words, 1)
        # times n_data, since DistributedDataParallel averages over ranks and the loss is a sum over words
        self.loss_scale.fill_(ranks.n_data / words)
        with explained(self.tensors.own_parameters, self._diverged):
            (self.graphs or self._gradients)(inputs, targets)
        sharded, whole = self.tensors.gradients()
        total, norm, decision = exchange(self.nll, sharded, whole, ranks, self.clock)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise self._diverged(f"loss {total / words:.4g}, norm of the gradient {norm:.4g}; nothing was updated")
        if config.clip and norm > config.clip:
            torch._foreach_mul_(gradients(self.model.parameters()), config.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, progress.step, self.total_steps)
        self.optimizer.step()
        progress.count(words)
        progress.interval_loss += total
        return decision

    def _diverged(self, what: str) -> TrainingDiverged:
        return diverged(what, self.progress.step, self.checkpoints)

    def _gradients(self, inputs: Tensor, targets: Tensor) -> None:
        """Computes the gradients of a segment (T, columns of this rank), its `nll`, and the new hidden states. It
        writes to permanent tensors only, since a graph may replay it."""
        distributed = self.distributed
        forward = self.loss if distributed is None else distributed
        # with micro-batches, DistributedDataParallel would allocate new gradients beside those in its buckets
        in_place = self.graphs is not None or distributed is not None and len(self.parts) > 1
        self.optimizer.zero_grad(set_to_none=not in_place)
        self.nll.zero_()
        for i, part in enumerate(self.parts):
            last = i + 1 == len(self.parts)
            columns = slice(part.start, part.stop)
            with nullcontext() if last or distributed is None else distributed.no_sync():
                with autocast(self.device, self.config.precision):
                    loss, hidden = forward(inputs[:, columns], targets[:, columns], self.hidden[i])
                (loss * self.loss_scale).backward()
            carry_on(self.hidden[i], hidden)
            self.nll += loss.detach()

    @property
    def total_steps(self) -> int:
        config = self.config
        rows = (file.n_tokens // config.batch_size - 1 for file in self.corpus.train)
        steps = config.epochs * sum(-(-n // config.bptt) for n in rows)
        return min(steps, config.max_steps) if config.max_steps else steps

    def _log(self, shown: tqdm) -> None:
        progress = self.progress
        loss = progress.interval_loss / progress.interval_words
        speed = progress.interval_words / progress.interval_seconds
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
        shown.set_postfix_str(f"ppl {perplexity(loss):.2f}", refresh=False)
        progress.interval_loss = 0.0
        progress.start_interval()

    # ------------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, shards: list[TokenFile]) -> tuple[float, int]:
        """Returns the mean NLL and the number of words. Raises TrainingDiverged, on all ranks, if the NLL is not
        finite."""
        with explained(self.tensors.own_parameters, self._diverged):
            loss, words = evaluate(self.loss, shards, self.config.eval_batch_size, self.config.bptt, self.ranks)
        if not math.isfinite(loss):
            raise self._diverged(f"the held-out loss is {loss}")
        return loss, words

    def _evaluate_and_keep_best(self) -> None:
        progress = self.progress
        if progress.evaluated == progress.step:
            return
        progress.evaluated = progress.step
        loss, words = self._evaluate(self.corpus.heldout[: self.config.eval_shards or None])
        better = progress.best is None or loss < progress.best
        if better:
            progress.best = loss
            self.best.save(progress.step, loss)
        if self.metrics:  # only the main rank has them
            epoch = self.stream.fraction
            self.metrics.write(
                "valid", progress.step, loss=loss, ppl=perplexity(loss), words=words, epoch=epoch, averaging=False
            )
            plot_learning_curves({self.config.model.head: self.folder}, self.folder / "learning-curve.png")
            say(
                f"step {progress.step}: held-out ppl {perplexity(loss):.2f} over {words:,} words"
                + (" (best)" if better else "")
            )

    def final_evaluation(self) -> dict[str, Any]:
        """Evaluates the best model on all held-out shards and returns the content of result.json. Raises
        CheckpointError if there is no best model."""
        best = self.best.load(self.progress.best, self.resumed or self.checkpoints)
        loss, words = self._evaluate(self.corpus.heldout)
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
            "best_step": best.step,
            "steps": progress.step,
            "words": progress.words,
            "ranks": self.ranks.n_ranks,
            "words_per_second": progress.words_per_second,
            "training_seconds": progress.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json on the main rank. Raises FileError."""
        if self.ranks.is_main:
            files.write_json(self.folder / "result.json", result)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """Saves a checkpoint and deletes older ones. Raises TrainingDiverged if a tensor is not finite."""
        progress = self.progress
        name = first_not_finite(self.tensors.own_parameters() | self.tensors.own_optimizer_state())
        self.ranks.agree(self._diverged(f"{name} is no longer finite") if name else None)
        if self.metrics:
            progress.metrics_bytes = self.metrics.sync()
        state = identity(self.config, self.corpus) | {
            "progress": dataclasses.asdict(progress),
            "random": [self.ranks.n_data, self.device.type],
        }
        tensors = self.tensors.training() | self.tensors.hidden(self.hidden) | self.tensors.random()
        path = self.checkpoints / checkpoint.step_name(progress.step)
        checkpoint.save(path, tensors, state, self.ranks)
        if self.ranks.is_main:
            checkpoint.remove_older(self.checkpoints, checkpoint.KEPT)

    def _restore(self, path: Path) -> None:
        state = checkpoint.read_state(path, "progress", "random")
        check_identity(state, path, self.config, self.corpus)
        tensors = self.tensors.training() | self.tensors.hidden(self.hidden)
        same_ranks = state["random"] == [self.ranks.n_data, self.device.type]
        if same_ranks:
            tensors |= self.tensors.random()
        checkpoint.load(path, tensors)
        try:
            self.progress = settings.read_record(Progress, state["progress"])
            self.stream.go_to(self.progress.position)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path} is of another version: {error}") from None
        if name := first_not_finite(self.tensors.own_parameters() | self.tensors.own_optimizer_state()):
            raise CheckpointError(f"checkpoint {path} cannot be used: numbers of {name} are not finite")
        if self._lock:
            checkpoint.set_aside_newer(self.checkpoints, path)
        self.hidden = self.tensors.parts_of(tensors, self._part)
        if same_ranks:
            self.tensors.set_random(tensors)
        else:
            self._seed_dropout(self.progress.step)
