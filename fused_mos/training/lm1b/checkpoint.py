"""Checkpoints of many ranks, by torch.distributed.checkpoint in safetensors files: any number of ranks can read them,
and loading runs no code.

    RUN/checkpoints/step-00001200/shard-00001-model-00001-of-00001.safetensors …   each rank's share
                                  state.json                                       all else

A checkpoint is written beside its name and renamed when it is complete, so a kill at any moment leaves the last one
whole. state.json has the digests of all files and of itself, which are checked when a run goes on. The checkpoint
before the last one is kept, in case that one is damaged.
"""

import errno
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ...runtime import files
from ...runtime.text import show
from ..errors import CheckpointError
from .config import LM1BConfig
from .ranks import OtherRankFailed, Ranks

FOLDER = "checkpoints"
STATE = "state.json"
DAMAGED = ".damaged"
"""Suffix of a checkpoint that a run could not go on from."""
KEPT = 2
"""Checkpoints of a run that are kept."""
COMPLETE = re.compile(r"step-\d{8,}")
"""Names of checkpoints that were written to the end."""


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    """Writes a checkpoint, all ranks together; `tensors` are DTensors or the same on all ranks, and not scalars. One of
    this name stays as it is, unless it is damaged: it is of the same step. Raises CheckpointError, on all ranks."""
    if ranks.sums(ranks.is_main and path.exists()).item():
        try:
            _verify(path, ranks)
            return
        except (CheckpointError, OtherRankFailed):
            _main_does(ranks, path, lambda: _set_aside(path))
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


def read_state(path: Path, *keys: str) -> dict[str, Any]:
    """The content of state.json, which must have these keys. Raises CheckpointError."""
    try:
        state = files.read_sealed(path / STATE)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); nothing was changed") from None
    if missing := [key for key in keys if key not in state]:
        raise CheckpointError(f"checkpoint {path} is of another version or kind: {STATE} has no {missing[0]!r}")
    return state


def newest(folder: Path, ranks: Ranks) -> Path | None:
    """The last complete checkpoint, as the main rank sees it, or the one before it where that is damaged, and says so
    on stderr. Raises CheckpointError or OtherRankFailed, on all ranks, where all are damaged."""
    steps = [int(name.removeprefix("step-")) for name in _complete_names(folder)[:KEPT]] if ranks.is_main else []
    shared = ranks.sums(*(step + 1 for step in steps), *[0] * (KEPT - len(steps))).tolist()
    paths = [folder / step_name(int(number) - 1) for number in shared if number]
    for path, older in zip(paths, [*paths[1:], None]):
        try:
            _verify(path, ranks)
            return path
        except (CheckpointError, OtherRankFailed) as error:
            if older is None:
                raise
            if ranks.is_main:
                why = error if isinstance(error, CheckpointError) else f"checkpoint {path} is damaged"
                show(f"warning: {why}; continuing from the previous one, {older}", file=sys.stderr)
    return None


def _verify(path: Path, ranks: Ranks) -> None:
    """Compares digests, each rank those of some files. Raises CheckpointError or OtherRankFailed, on all ranks."""
    error = None
    try:
        digests = read_state(path).get("files", {})  # versions before 0.2 wrote none
        if not isinstance(digests, dict):
            raise CheckpointError(f"checkpoint {path} is of another version: files must be an object, got {digests!r}")
        for file in path.glob("*.safetensors"):  # all of them are read
            files.check_regular(file)
        for name, digest in sorted(digests.items())[ranks.rank :: ranks.n_ranks]:
            if files.sha256(path / Path(name).name) != digest:
                raise CheckpointError(f"checkpoint {path} is damaged (the content of {name}); nothing was changed")
    except (CheckpointError, OSError, ValueError) as failure:  # ValueError: of a name that no file can have
        error = failure if isinstance(failure, CheckpointError) else CheckpointError(f"checkpoint {path}: {failure}")
    ranks.agree(error)


def saved_config(folder: Path) -> LM1BConfig:
    """The configuration of the run in `folder`, as its last checkpoint has it, or the one before it where that is
    damaged. Raises CheckpointError, ConfigError."""
    error = CheckpointError(f"there is no checkpoint in {folder / FOLDER}")
    for i, name in enumerate(_complete_names(folder / FOLDER)):
        try:
            return LM1BConfig.from_json(read_state(folder / FOLDER / name, "config")["config"])
        except CheckpointError as failure:
            error = error if i else failure
    raise error


def _complete_names(folder: Path) -> list[str]:
    """Names of complete checkpoints, the last one first."""
    names = (path.name for path in folder.glob("step-*") if COMPLETE.fullmatch(path.name))
    return sorted(names, key=lambda name: int(name.removeprefix("step-")), reverse=True)


def step_name(step: int) -> str:
    return f"step-{step:08}"


def set_aside_newer(folder: Path, path: Path) -> None:
    """Renames the checkpoints after `path`, which are damaged: one of their names may be written again."""
    names = _complete_names(folder)
    for name in names[: names.index(path.name)]:
        _set_aside(folder / name)


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    files.rename(path, aside)


def remove_older(folder: Path, kept: int = 1) -> None:
    """Deletes all but the last checkpoints, so many, and what kills have left."""
    names = _complete_names(folder)[:kept]
    for path in folder.glob("step-*"):
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    files.make_folder(path)


def _complete(partial: Path, path: Path, state: dict[str, Any]) -> None:
    digests = {file.name: files.sha256(file) for file in partial.glob("*.safetensors")}
    files.write_sealed(partial / STATE, state | {"files": digests})
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
