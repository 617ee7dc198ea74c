"""The state of a run: saving it to the checkpoint last.safetensors, and restoring it."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Corpus, digest
from ..lm import AWDLSTM, NTASGD
from ..lm.awd_lstm import Hidden, carry_on
from ..runtime import files
from . import checkpoint, meter, settings
from .checkpoint import Checkpoint, fitting, group
from .config import TrainConfig
from .errors import CheckpointError, ConfigError
from .run import check_vocabulary
from .settings import COUNT, NOT_NEGATIVE, NUMBER, read_record, setting


@dataclasses.dataclass
class Progress(meter.Progress):
    """Progress of a run. The rest of its state: parameters, optimizer, hidden states and random generators."""

    epoch: int = setting(0, COUNT)  # finished epochs
    stopped: bool = False  # True once the rule that ends fine-tuning has fired
    row: int = setting(0, COUNT)  # rows of the training text done in the current epoch
    peak_memory_mib: float = setting(0.0, NOT_NEGATIVE)


@dataclasses.dataclass
class OptimizerRecord:
    """The part of the optimizer's state that is saved as JSON."""

    averaging: bool = False
    averaged_steps: int = setting(0, COUNT)
    history: tuple[float, ...] = setting((), NUMBER)  # validation losses


class RunTensors:
    """Collects a run's state as named tensors, and restores it; `checkpoint.load_parameters` restores parameters."""

    def __init__(self, model: AWDLSTM, optimizer: NTASGD, bptt_generator: torch.Generator, device: torch.device):
        self.model, self.optimizer, self.bptt_generator, self.device = model, optimizer, bptt_generator, device

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())  # lists a tied weight once

    def to_save(self, hidden: list[Hidden], interval_loss: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the tensors and the JSON part of the optimizer's state, for `restore`.

        Args:
            hidden: hidden state of each micro-batch.
            interval_loss: (), sum of losses since the last line of metrics.jsonl.
        """
        optimizer_tensors, optimizer_meta = self.optimizer.state_dict()
        tensors = {f"model.{name}": t for name, t in self.parameters().items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors.items()}
        for i, layers in enumerate(hidden):
            for layer, (h, c) in enumerate(layers):
                tensors |= {f"hidden.{i}.{layer}.h": h, f"hidden.{i}.{layer}.c": c}
        tensors |= {"random.torch": torch.get_rng_state(), "random.bptt": self.bptt_generator.get_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["interval_loss"] = interval_loss
        return tensors, optimizer_meta

    def restore(
        self, tensors: dict[str, Tensor], optimizer_meta: dict[str, Any], hidden: list[Hidden], interval_loss: Tensor
    ) -> None:
        """Restores the optimizer and the random generators, and copies into `hidden` and `interval_loss`. Raises
        KeyError, ValueError, TypeError or RuntimeError if something is missing or has another shape, type or range."""
        record = read_record(OptimizerRecord, optimizer_meta)
        self.optimizer.load_state_dict(group(tensors, "optimizer"), dataclasses.asdict(record))
        for i, layers in enumerate(hidden):
            saved = [
                (fitting(tensors, f"hidden.{i}.{n}.h", h), fitting(tensors, f"hidden.{i}.{n}.c", c))
                for n, (h, c) in enumerate(layers)
            ]
            carry_on(layers, saved)
        interval_loss.copy_(fitting(tensors, "interval_loss", interval_loss))
        torch.set_rng_state(tensors["random.torch"])
        self.bptt_generator.set_state(tensors["random.bptt"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)


def last_path(folder: Path) -> Path:
    """Path of the last checkpoint of the run in `folder`."""
    return folder / "last.safetensors"


def has_begun(folder: Path) -> bool:
    """True if there is a run in `folder` that can continue."""
    return checkpoint.exists(last_path(folder))


def load_last(config: TrainConfig, corpus: Corpus) -> Checkpoint | None:
    """Loads the checkpoint that a run continues from: the last one or, if that is damaged, the previous one. Returns
    None for a new run. Raises CheckpointError, or ConfigError if the checkpoint is that of another run."""
    folder = config.run_folder
    if not has_begun(folder) and not config.resume:
        return None
    loaded = checkpoint.load_latest(last_path(folder), "config", "progress", "optimizer")
    meta = loaded.meta
    saved = TrainConfig.from_json(meta["config"])
    settings.check_same_run(saved, config)
    _check_start(saved, meta.get("start"), config)
    check_vocabulary(corpus, folder / "vocabulary.txt")
    if meta.get("train", text := digest(corpus.train)) != text:
        raise CheckpointError(f"data: {config.data} has another train.txt than the run in {folder} was trained on")
    return loaded


def start_digest(config: TrainConfig) -> str | None:
    """Digest of the model that fine-tuning starts from; None without fine-tuning, or if that model is gone."""
    best = config.start and config.start / "best.safetensors"
    return checkpoint.digest(best) if best and best.is_file() else None


def _check_start(saved: TrainConfig, saved_digest: str | None, config: TrainConfig) -> None:
    """Raises ConfigError unless the saved run and the command that continues it start from the same model."""
    if bool(saved.start) != bool(config.start):
        kind = "fine-tuning another" if config.start else "no fine-tuning"
        raise ConfigError(
            f"out: {config.run_folder} holds a run that this command, {kind}, did not begin; name another"
        )
    if not saved.start or not config.start or config.resume:  # --resume names no model
        return
    now = start_digest(config)
    if saved_digest and now:
        same = saved_digest == now
    else:  # saved before version 0.2, or the model is gone: compare folders, unless the folder has moved
        same = files.real(saved.start) == files.real(config.start) or not saved.start.exists()
    if not same:
        raise ConfigError(
            f"out: the fine-tuning in {config.run_folder} began from another model than the best one that "
            f"{config.start} has now; continue it with --resume {config.run_folder}, or name another --out"
        )


def is_of_run(path: Path) -> bool:
    """True if `path` is the last checkpoint of a run, or left over from a run killed while writing its first one."""
    last = last_path(path.parent)
    return path == last or path.name.startswith(f"{last.name}.")
