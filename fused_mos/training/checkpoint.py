"""Checkpoints: one safetensors file of tensors and JSON, written atomically; loading one executes no code."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another model, with its path."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes to a file beside `path` and renames it, so that a kill at any moment leaves the old or the new one whole."""
    partial = path.with_name(path.name + ".partial")
    safetensors.torch.save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, {"fused_mos": json.dumps(meta)})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON of a checkpoint. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["fused_mos"])
            return {name: file.get_tensor(name) for name in file.keys()}, meta
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error}); nothing was changed") from None


def group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {name.removeprefix(prefix + "."): t for name, t in tensors.items() if name.startswith(prefix + ".")}


def load_parameters(model, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies `tensors` into the model's parameters, tied ones once. Raises CheckpointError unless names and shapes fit."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        raise CheckpointError(f"checkpoint {path} does not fit the model: {name} is only in {'the model' if name in parameters else 'the checkpoint'}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"checkpoint {path} does not fit the model: {name} is {tuple(tensors[name].shape)} there and {tuple(parameter.shape)} here"
            )
        parameter.data.copy_(tensors[name])
