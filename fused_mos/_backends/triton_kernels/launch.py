"""Launches kernels on the tensors' device with the tile of its architecture, or records the launches instead.

Recording runs the backend's own code on meta tensors and notes the launches it would make, for the proof by compilation
(proof.py) and for the tuner's candidates.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configurations
from .configurations import Architecture, Tile
from .tiles import TileConstants

INTERPRETED = triton.knobs.runtime.interpret
"""True if TRITON_INTERPRET=1 was set when triton was imported: kernels then run on CPU tensors."""


@dataclass
class Call:
    """One launch: the kernel, its arguments in order (tensors, numbers, None, or NamedTuples of these), its constants
    and its tile."""

    kernel: triton.runtime.JITFunction
    key: str  # the tile's configuration; "" for kernels without one
    arguments: tuple
    constants: dict
    warps: int
    stages: int


@dataclass
class _Override:
    """Replaces the device's own architecture while recording, tuning and testing."""

    architecture: Architecture
    calls: list[Call] | None = None
    tiles: dict[str, Tile] = field(default_factory=dict)


_override: _Override | None = None


@contextlib.contextmanager
def overridden(
    architecture: Architecture, tiles: dict[str, Tile] | None = None, record: bool = False
) -> Iterator[list[Call]]:
    """Take tiles from `tiles`, or else from `architecture`, inside the `with` block. Yields the list of recorded
    calls."""
    global _override
    calls: list[Call] = []
    before, _override = _override, _Override(architecture, calls if record else None, tiles or {})
    try:
        yield calls
    finally:
        _override = before


def architecture_of(device: torch.device) -> Architecture:
    if _override is not None:
        return _override.architecture
    if device.type != "cuda":
        return configurations.INTERPRETER
    return configurations.of_device(torch.cuda.current_device() if device.index is None else device.index)


def choose_tile(family: str, like: Tensor, n_rows: int, e: Tensor) -> tuple[Tile, dict]:
    """The tile for `n_rows` rows of `like`'s width and dtype, and the arguments of `launch` that it sets. `e` is the
    embedding as the kernel loads it."""
    precision = configurations.precision(like.dtype)
    key = configurations.tile_key(family, precision, n_rows, like.shape[-1])
    tiles = architecture_of(like.device).tiles | (_override.tiles if _override is not None else {})
    tile = tiles.get(key, configurations.INTERPRETER_TILE)
    tile = replace(tile, features=min(tile.features, max(triton.next_power_of_2(like.shape[-1]), 16)))
    # three TF32 products of high and low parts have float32's accuracy and run on tensor cores
    dot = "tf32x3" if precision == "ieee" else "tf32"
    rounds = precision == "tf32" and e.nbytes > configurations.LARGEST_ROUNDED
    constants = TileConstants(tile.rows, tile.classes, tile.features, dot, tile.resident, rounds, tile.described)
    return tile, {"key": key, "warps": tile.warps, "stages": tile.stages, "TILE": constants}


def _variant(arguments: tuple) -> tuple[torch.device, list]:
    """The tensors' device, and those properties of the arguments for which Triton compiles a kernel anew: dtypes, and
    whether addresses and integers are multiples of 16."""
    device: torch.device = torch.device("cpu")
    variant: list[object] = []
    for argument in arguments:
        for member in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(member, Tensor):
                device = member.device
                variant.append((member.dtype, member.data_ptr() % 16 == 0))
            elif isinstance(member, TensorDescriptor):
                variant.append((member.base.dtype, *member.block_shape))
            elif isinstance(member, int):
                variant.append((member == 1, member % 16 == 0, -(2**31) <= member < 2**31))
            else:
                variant.append(type(member))
    return device, variant


_compiled: dict[tuple, CompiledKernel] = {}
"""Compiled kernels by their `_variant` and constants. Triton's own lookup takes longer than many kernels run."""


def launch(
    kernel: triton.runtime.JITFunction,
    grid: tuple[int, ...],
    *arguments,
    key: str = "",
    warps: int = 4,
    stages: int = 1,
    **constants,
) -> None:
    """Launch `kernel` on the device of its tensors."""
    if 0 in grid:
        return
    if _override is not None and _override.calls is not None:
        _override.calls.append(Call(kernel, key, arguments, constants, warps, stages))
        return
    device, variant = _variant(arguments)
    rest = [constants[name] for name in kernel.arg_names[len(arguments) :]]
    # Triton launches on the current device's current stream
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        of_call = id(kernel), device, warps, stages, *rest, *variant
        if compiled := _compiled.get(of_call):
            compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
            return
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        compiled = kernel[grid](*arguments, *rest, **options)
        if not INTERPRETED:
            _compiled[of_call] = compiled
