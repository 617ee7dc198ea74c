"""Checkpoints: safetensors and JSON, written atomically; loading one executes no code."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ..runtime import files
from .errors import CheckpointError


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], max_mib: int = 0) -> None:
    """Writes to a file beside `path` and renames it, so that a kill at any moment leaves the old or the new one whole.

    With `max_mib`, a larger checkpoint is cut into files of that size, PATH.DIGEST.000 …, which joined in order are the
    plain one; PATH then is a safetensors file without tensors that names them. Raises FileError.
    """
    tensors, metadata = {name: t.detach().contiguous() for name, t in tensors.items()}, {"fused_mos": json.dumps(meta)}
    parts: list[str] = []
    if max_mib and sum(t.nbytes for t in tensors.values()) > max_mib << 20:
        content = memoryview(safetensors.torch.save(tensors, metadata))
        digest = hashlib.sha256(content).hexdigest()
        size = max_mib << 20
        for start in range(0, len(content), size):
            part = path.with_name(f"{path.name}.{digest[:12]}.{start // size:03}")
            with files.writing(part) as file:
                file.write(content[start : start + size])
            parts.append(part.name)
        tensors, metadata = {}, {"parts": json.dumps(parts), "sha256": digest}
    with files.replacing(path) as partial:
        try:
            safetensors.torch.save_file(tensors, partial, metadata)
        except safetensors.SafetensorError as error:  # which is no OSError, also where the disk is full
            cause = re.search(r"\(os error (\d+)\)", str(error))
            if cause is None:
                raise
            raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(path)) from error
    _remove_parts(path, parts)


def digest(path: Path) -> str:
    """SHA-256 of the checkpoint `path`; where it is in parts, of the file that names them with theirs."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remove_checkpoint(path: Path) -> None:
    """Deletes the checkpoint and its parts, if any."""
    path.unlink(missing_ok=True)
    _remove_parts(path, [])


def _remove_parts(path: Path, but: list[str]) -> None:
    for old in set(path.parent.glob(f"{path.name}.*.[0-9][0-9][0-9]")) - {path.with_name(name) for name in but}:
        old.unlink()


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON of a checkpoint. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if "parts" not in metadata:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["fused_mos"])
        content = b"".join(path.with_name(Path(name).name).read_bytes() for name in json.loads(metadata["parts"]))
        if hashlib.sha256(content).hexdigest() != metadata["sha256"]:
            raise ValueError("its parts are not those that it was saved with")
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return safetensors.torch.load(content), json.loads(header["__metadata__"]["fused_mos"])
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} lacks its part {error.filename}; nothing was changed") from None
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error}); nothing was changed") from None


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}


def load_parameters(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies `tensors` into the model's parameters, tied ones once. Raises CheckpointError unless names and shapes
    fit."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"checkpoint {path} does not fit the model: {name} is only in "
            f"{'the model' if name in parameters else 'the checkpoint'}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"checkpoint {path} does not fit the model: {name} is {tuple(tensors[name].shape)} there and "
                f"{tuple(parameter.shape)} here"
            )
        parameter.data.copy_(tensors[name])
