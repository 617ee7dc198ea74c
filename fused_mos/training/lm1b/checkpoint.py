"""Checkpoints of many ranks: torch.distributed.checkpoint in safetensors files, readable by any number of ranks.

    RUN/checkpoints/step-00001200/shard-00001-model-00001-of-00001.safetensors …   each rank's share
                                  state.json                                       everything else

A checkpoint is written to a partial folder and renamed when it is complete, so a kill at any moment leaves the last one
intact. state.json has the digests of all files and of itself, which are verified when a run continues. The previous
checkpoint is kept in case the last one is damaged. Loading executes no code.
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
"""Suffix of a damaged checkpoint that a run could not continue from."""
KEPT = 2
"""Number of checkpoints to keep."""
COMPLETE = re.compile(r"step-\d{8,}")
"""Names of complete checkpoints."""


def save(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    """Writes a checkpoint, all ranks together. An existing one of this name is from the same step; it is kept unless it
    is damaged.

    Args:
        tensors: DTensors, or tensors that are the same on all ranks; no scalars.
        state: the content of state.json.

    Raises CheckpointError on all ranks.
    """
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
    """Loads a checkpoint, written by any number of ranks, into `tensors` in place. Raises CheckpointError on all
    ranks."""
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except CheckpointException as failure:
        raise CheckpointError(
            f"checkpoint {path} is damaged or of another model ({_reason(failure)}); nothing was changed"
        ) from None


def read_state(path: Path, *keys: str) -> dict[str, Any]:
    """Returns the content of state.json. Raises CheckpointError, also if it lacks one of `keys`."""
    try:
        state = files.read_sealed(path / STATE)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); nothing was changed") from None
    if missing := [key for key in keys if key not in state]:
        raise CheckpointError(f"checkpoint {path} is of another version or kind: {STATE} has no {missing[0]!r}")
    return state


def newest(folder: Path, ranks: Ranks) -> Path | None:
    """Returns the last complete checkpoint that the main rank finds or, if that is damaged, the previous one with a
    warning on stderr. Raises CheckpointError or OtherRankFailed, on all ranks, if all are damaged."""
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
    """Verifies the digests; each rank checks some of the files. Raises CheckpointError or OtherRankFailed, on all
    ranks."""
    error = None
    try:
        digests = read_state(path).get("files", {})  # versions before 0.2 saved none
        if not isinstance(digests, dict):
            raise CheckpointError(f"checkpoint {path} is of another version: files must be an object, got {digests!r}")
        for file in path.glob("*.safetensors"):  # loading reads every one of them
            files.check_regular(file)
        for name, digest in sorted(digests.items())[ranks.rank :: ranks.n_ranks]:
            if files.sha256(path / Path(name).name) != digest:
                raise CheckpointError(f"checkpoint {path} is damaged (the content of {name}); nothing was changed")
    except (CheckpointError, OSError, ValueError) as failure:  # ValueError: an impossible file name
        error = failure if isinstance(failure, CheckpointError) else CheckpointError(f"checkpoint {path}: {failure}")
    ranks.agree(error)


def saved_config(folder: Path) -> LM1BConfig:
    """Returns the configuration in the last checkpoint of the run in `folder` or, if that is damaged, in the previous
    one. Raises CheckpointError, ConfigError."""
    error = CheckpointError(f"there is no checkpoint in {folder / FOLDER}")
    for i, name in enumerate(_complete_names(folder / FOLDER)):
        try:
            return LM1BConfig.from_json(read_state(folder / FOLDER / name, "config")["config"])
        except CheckpointError as failure:
            error = error if i else failure
    raise error


def _complete_names(folder: Path) -> list[str]:
    """Returns the names of complete checkpoints, the last one first."""
    names = (path.name for path in folder.glob("step-*") if COMPLETE.fullmatch(path.name))
    return sorted(names, key=lambda name: int(name.removeprefix("step-")), reverse=True)


def step_name(step: int) -> str:
    return f"step-{step:08}"


def set_aside_newer(folder: Path, path: Path) -> None:
    """Renames the damaged checkpoints after `path`, since the run will write their names again."""
    names = _complete_names(folder)
    for name in names[: names.index(path.name)]:
        _set_aside(folder / name)


def _set_aside(path: Path) -> None:
    aside = path.with_name(path.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    files.rename(path, aside)


def remove_older(folder: Path, kept: int = 1) -> None:
    """Deletes all but the last `kept` checkpoints, and leftovers of killed runs."""
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
    """Runs `action` on the main rank, unless there is an `error` already. If anything failed, all ranks raise: the
    failing ones CheckpointError, the others OtherRankFailed."""
    if ranks.is_main and error is None:
        try:
            action()
        except OSError as failure:
            error = failure
    wrapped = None
    if error is not None:
        shutil.rmtree(path.with_name(path.name + files.PARTIAL), ignore_errors=True)
        wrapped = CheckpointError(
            f"checkpoint {path} could not be written ({_reason(error)}); the last complete one is unchanged"
        )
    ranks.agree(wrapped)


def _reason(error: BaseException) -> str:
    """Returns the innermost cause in one line, or "the disk is full"."""
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, files.FileError) and error.__cause__:
        error = error.__cause__  # FileError itself would repeat the advice to the user
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    return str(error).strip().split("\n")[-1] or type(error).__name__
