"""Checkpoints: safetensors and JSON, written atomically, with a digest that is checked when they are loaded; loading
one executes no code."""

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
"""Suffix of the checkpoint before the last one, where that is kept."""

MOST_HEADER_BYTES = 100_000_000
"""No longer header is a safetensors file's."""


class Checkpoint(NamedTuple):
    """A checkpoint that was loaded."""

    tensors: dict[str, Tensor]  # on the CPU
    meta: dict[str, Any]
    path: Path  # its file


# -------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], max_mib: int = 0, keep_previous: bool = False
) -> None:
    """Writes to a file beside `path` and renames it, so that a kill at any moment leaves the old or the new one whole.

    With `max_mib`, a larger checkpoint is cut into files of that size, PATH.DIGEST.000 …, which joined in order are the
    plain one; PATH then is a safetensors file without tensors that names them. With `keep_previous`, the checkpoint
    that is replaced stays as PATH.previous. Raises FileError.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # within the JSON: safetensors writes several entries in an order that changes from file to file
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
    """Makes PATH.previous another name of `path`, if there is one, so that there is no moment without `path`."""
    if not path.is_file():
        return
    previous = _previous(path)
    link = previous.with_name(previous.name + files.PARTIAL)
    link.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a file system without links keeps no older one
        os.link(path, link)
        os.replace(link, previous)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + PREVIOUS)


def _digest(tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """SHA-256 of contiguous tensors on the CPU, with their names, types and shapes, and of a checkpoint's JSON."""
    hashed = hashlib.sha256(files.to_json(meta).encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of the checkpoint `path`; where it is in parts, of the file that names them with theirs."""
    return files.sha256(path)


def remove_checkpoint(path: Path) -> None:
    """Deletes the checkpoint, the one before it, and their parts, if any."""
    path.unlink(missing_ok=True)
    _previous(path).unlink(missing_ok=True)
    _remove_unused_parts(path)


def _remove_unused_parts(path: Path) -> None:
    """Deletes the parts of checkpoints that are gone."""
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
    """Loads a checkpoint or, where that is damaged or missing, the one before it, and says so on stderr. Raises
    CheckpointError for the first where both are."""
    try:
        return Checkpoint(*load_checkpoint(path, *keys), path)
    except CheckpointError as error:
        previous = _previous(path)
        try:
            loaded = Checkpoint(*load_checkpoint(previous, *keys), previous)
        except CheckpointError:
            raise error from None
        if not quietly:
            show(f"warning: {error}; going on from the one before it, {previous}", file=sys.stderr)
        return loaded


def load_checkpoint(path: Path, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON of a checkpoint; the latter must have these keys. Raises CheckpointError,
    also where a number in it is not finite."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        metadata = _metadata(path)
        names = _part_names(metadata)
        # read instead of mapped: a mapped tensor would change, or be gone, with the file
        content = _joined([path.with_name(name) for name in names]) if names else path.read_bytes()
        if names and hashlib.sha256(content).hexdigest() != metadata["sha256"]:
            raise ValueError("its parts are not those that it was saved with")
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        meta = json.loads(metadata["fused_mos"])
        digest = meta.pop("sha256", None)
        if digest not in (None, _digest(tensors, meta)):  # versions before 0.2 wrote none
            raise ValueError("its content does not have the digest that it was saved with")
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
    """File names of a checkpoint's parts, each once, none of which leads out of its folder. Raises ValueError."""
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
    """The content of a checkpoint's parts. Raises OSError, or ValueError, before it has read much, where they have
    other than the bytes that the header in the first ones says."""
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
    """The tensors under `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}


def load_parameters(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies `tensors` into the model's parameters, tied ones once. Raises CheckpointError unless they fit."""
    check_fit(model, tensors, path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[name])


def check_fit(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError unless `tensors` have the names, shapes and types of the model's parameters, tied ones
    once."""
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
    """The tensor of this name. Raises ValueError unless it has the shape and type of `like`."""
    tensor = tensors[name]
    if tensor.shape != like.shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} there and {tuple(like.shape)} here")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} is {tensor.dtype} there and {like.dtype} here")
    return tensor
