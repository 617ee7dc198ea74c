"""Checkpoints of many ranks, by torch.distributed.checkpoint in safetensors files: any number of ranks can read them,
and loading runs no code.

    RUN/checkpoints/step-00001200/shard-00001-model-00001-of-00001.safetensors …   each rank's share
                                  state.json                                       all else

A checkpoint is written beside its name and renamed when it is complete, so a kill at any moment leaves the last one
whole.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ...runtime import files
from ..errors import CheckpointError
from .config import LM1BConfig
from .ranks import Ranks

FOLDER = "checkpoints"
STATE = "state.json"
COMPLETE = re.compile(r"step-\d{8,}")
"""Names of checkpoints that were written to the end."""


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    """Writes a checkpoint, all ranks together; `tensors` are DTensors or the same on all ranks, and not scalars. One of
    this name stays as it is: it is of the same step. Raises CheckpointError, on all ranks."""
    if ranks.sums(ranks.is_main and path.exists()).item():
        return
    partial = path.with_name(path.name + files.PARTIAL)
    _main_does(ranks, path, lambda: _fresh_folder(partial))
    error = None
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
    except (CheckpointException, OSError) as failure:
        error = failure
    _main_does(ranks, path, lambda: _complete(partial, path, state), error)


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Reads a checkpoint into `tensors`, in place, whatever number of ranks wrote it. Raises CheckpointError, on all
    ranks."""
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except CheckpointException as failure:
        raise CheckpointError(
            f"checkpoint {path} is damaged or of another model ({_reason(failure)}); nothing was changed"
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); nothing was changed") from None


def newest(folder: Path, ranks: Ranks) -> Path | None:
    """The last complete checkpoint, as the main rank sees it."""
    names = _complete_names(folder)
    step = int(ranks.sums(int(names[-1].removeprefix("step-")) + 1 if ranks.is_main and names else 0)[0].item()) - 1
    return None if step < 0 else folder / step_name(step)


def saved_config(folder: Path) -> LM1BConfig:
    """The configuration of the run in `folder`, as its last checkpoint has it. Raises CheckpointError, ConfigError."""
    names = _complete_names(folder / FOLDER)
    if not names:
        raise CheckpointError(f"there is no checkpoint in {folder / FOLDER}")
    return LM1BConfig.from_json(read_state(folder / FOLDER / names[-1])["config"])


def _complete_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*") if COMPLETE.fullmatch(path.name))


def step_name(step: int) -> str:
    return f"step-{step:08}"


def remove_older(folder: Path, keep: Path) -> None:
    for path in folder.glob("step-*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _complete(partial: Path, path: Path, state: dict[str, Any]) -> None:
    files.write_json(partial / STATE, state)
    files.sync_folder(partial)
    files.rename(partial, path)


def _main_does(ranks: Ranks, path: Path, action: Callable[[], None], error: BaseException | None = None) -> None:
    """The main rank acts, unless there is an error; all ranks raise CheckpointError if it fails."""
    if ranks.is_main and error is None:
        try:
            action()
        except OSError as failure:
            error = failure
    wrapped = None
    if error is not None:
        shutil.rmtree(path.with_name(path.name + files.PARTIAL), ignore_errors=True)
        wrapped = CheckpointError(
            f"checkpoint {path} could not be written ({_reason(error)}); the last complete one is as it was"
        )
    ranks.agree(wrapped)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; a full disk in words."""
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, files.FileError) and error.__cause__:
        error = error.__cause__  # the file's own error would tell the user what to do a second time
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    return str(error).strip().split("\n")[-1] or type(error).__name__
