"""Checkpoints: safetensors files with JSON metadata, written atomically.

Loading verifies a digest, and executes no code.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from ..runtime import files
from ..runtime.text import show
from .errors import CheckpointError
from .finite import first_not_finite

PREVIOUS = ".previous"
"""Suffix of the second-last checkpoint, if it is kept."""

MOST_HEADER_BYTES = 100_000_000
"""The safetensors format allows no longer header."""


class Checkpoint(NamedTuple):
    """A loaded checkpoint."""

    tensors: dict[str, Tensor]  # on the CPU
    meta: dict[str, Any]
    path: Path  # its file


# -------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], max_mib: int = 0, keep_previous: bool = False
) -> None:
    """Saves a checkpoint. A kill at any moment leaves either the old or the new checkpoint, never a partial one.

    Args:
        max_mib: splits a larger checkpoint into parts PATH.DIGEST.000, … of this size. PATH then is a safetensors file
            without tensors that lists the parts; joined in order, they make up the unsplit file. 0: never.
        keep_previous: keeps the checkpoint that is replaced as PATH.previous.

    Raises FileError.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # all metadata in one entry: safetensors writes several in an order that changes from file to file
    text = files.to_json(meta | {"sha256": _digest(tensors, meta)})
    content = safetensors.torch.save(tensors, {"fused_mos": text})
    size = max_mib << 20
    if size and sum(t.nbytes for t in tensors.values()) > size:
        whole, content = memoryview(content), b""
        digest, parts = hashlib.sha256(whole).hexdigest(), []
        for start in range(0, len(whole), size):
            part = path.with_name(f"{path.name}.{digest[:12]}.{start // size:03}")
            with files.writing(part) as file:
                file.write(whole[start : start + size])
            parts.append(part.name)
        content = safetensors.torch.save({}, {"parts": json.dumps(parts), "sha256": digest})
    with files.writing(path, (lambda: _keep(path)) if keep_previous else lambda: None) as file:
        file.write(content)
    _remove_unused_parts(path)


def _keep(path: Path) -> None:
    """Links PATH.previous to the checkpoint at `path`, if there is one. `path` itself exists all the time."""
    if not path.is_file():
        return
    previous = _previous(path)
    link = previous.with_name(previous.name + files.PARTIAL)
    link.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # on file systems without links, no previous checkpoint is kept
        os.link(path, link)
        os.replace(link, previous)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + PREVIOUS)


def _digest(tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint: its JSON, and its contiguous CPU tensors with their names, dtypes and shapes."""
    hashed = hashlib.sha256(files.to_json(meta).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of the file `path`. A checkpoint in parts has the parts' digest in this file."""
    return files.sha256(path)


def remove_checkpoint(path: Path) -> None:
    """Deletes the checkpoint and the previous one, with their parts, if any."""
    path.unlink(missing_ok=True)
    _previous(path).unlink(missing_ok=True)
    _remove_unused_parts(path)


def _remove_unused_parts(path: Path) -> None:
    """Deletes parts that belong to no existing checkpoint."""
    parts = set(path.parent.glob(f"{path.name}.*.[0-9][0-9][0-9]"))
    if not parts:
        return
    for kept in (path, _previous(path)):
        if kept.is_file():
            with contextlib.suppress(OSError, safetensors.SafetensorError, ValueError):
                parts -= {path.with_name(name) for name in _part_names(_metadata(kept))}
    for part in parts:
        part.unlink()


# -------------------------------------------------------------------------------------------------------------- reading


def exists(path: Path) -> bool:
    """True if there is something for `load_latest` to load."""
    return path.is_file() or _previous(path).is_file()


def load_latest(path: Path, *keys: str, quietly: bool = False) -> Checkpoint:
    """Loads the checkpoint `path`. If it is damaged or missing, loads the previous one with a warning on stderr.

    Args:
        keys: that the checkpoint's JSON must have.
        quietly: without the warning.

    Raises CheckpointError for `path` if both are damaged or missing.
    """
    try:
        return Checkpoint(*load_checkpoint(path, *keys), path)
    except CheckpointError as error:
        previous = _previous(path)
        try:
            loaded = Checkpoint(*load_checkpoint(previous, *keys), previous)
        except CheckpointError:
            raise error from None
        if not quietly:
            show(f"warning: {error}; continuing from the previous one, {previous}", file=sys.stderr)
        return loaded


def load_checkpoint(path: Path, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors, on the CPU, and the JSON of a checkpoint. Raises CheckpointError if it is missing or
    damaged, if the JSON lacks one of `keys`, or if a tensor is not finite."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        metadata = _metadata(path)
        names = _part_names(metadata)
        # read, not mapped: a mapped tensor would change or vanish with the file
        content = _joined([path.with_name(name) for name in names]) if names else path.read_bytes()
        if names and hashlib.sha256(content).hexdigest() != metadata["sha256"]:
            raise ValueError("its parts do not match its digest")
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        meta = json.loads(metadata["fused_mos"])
        digest = meta.pop("sha256", None)
        if digest not in (None, _digest(tensors, meta)):  # versions before 0.2 wrote none
            raise ValueError("its content does not match its digest")
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} lacks its part {error.filename}; nothing was changed") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}); nothing was changed") from None
    except (safetensors.SafetensorError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error}); nothing was changed") from None
    if missing := [key for key in keys if key not in meta]:
        raise CheckpointError(f"checkpoint {path} is of another version or kind: it has no {missing[0]!r}")
    if name := first_not_finite(tensors):
        raise CheckpointError(f"checkpoint {path} cannot be used: numbers of {name} are not finite")
    return tensors, meta


def _metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _part_names(metadata: dict[str, str]) -> list[str]:
    """Names of a checkpoint's parts: distinct file names without a path. Raises ValueError."""
    try:
        names = json.loads(metadata.get("parts", "[]"))
    except RecursionError as error:
        raise ValueError(error) from None
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_file_name(name) for name in names):
        raise ValueError("its parts must be a list of file names")
    if len(set(names)) < len(names):
        raise ValueError("it names a part twice")
    return names


def _is_file_name(name: str) -> bool:
    return name == os.path.basename(name) and name not in ("", ".", "..")


def _joined(parts: list[Path]) -> bytes:
    """Returns the joined content of a checkpoint's parts. Raises OSError, or ValueError if their size is not that in
    the header; it checks the size before it reads the rest."""
    size = sum(part.stat().st_size for part in parts)
    for part in parts:
        files.check_regular(part)
    header_size = int.from_bytes(_first_bytes(parts, 8), "little")
    if header_size > MOST_HEADER_BYTES:
        raise ValueError("its parts do not begin with a header")
    header = json.loads(_first_bytes(parts, 8 + header_size)[8:])
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + header_size + end:
        raise ValueError(f"its parts have {size:,} bytes, and its tensors need {8 + header_size + end:,}")
    return b"".join(part.read_bytes() for part in parts)


def _first_bytes(parts: list[Path], n: int) -> bytes:
    first = b""
    for part in parts:
        with part.open("rb") as file:
            first += file.read(n - len(first))
    return first


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix.`, with that prefix removed."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}


def load_parameters(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies `tensors` into the model's parameters; tied ones are stored once. Raises CheckpointError unless they
    fit."""
    check_fit(model, tensors, path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[name])


def check_fit(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError unless `tensors` have the names, shapes and dtypes of the model's parameters, where tied
    ones count once."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"checkpoint {path} does not fit the model: {name} is only in "
            f"{'the model' if name in parameters else 'the checkpoint'}"
        )
    for name, parameter in parameters.items():
        try:
            fitting(tensors, name, parameter)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path} does not fit the model: {error}") from None


def fitting(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Returns the tensor of this name. Raises ValueError unless it has the shape and dtype of `like`."""
    tensor = tensors[name]
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, got {tensor.dtype}")
    return tensor
