"""Finds the fastest tile for each configuration that a shape uses, by measuring on this GPU.

All candidates are compiled first, in parallel. A candidate is measured only if no kernel that would use it spills
registers or exceeds shared memory.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
from torch.utils.benchmark import Timer

from . import proof
from .configurations import ARCHITECTURES, INTERPRETER_TILE, Architecture, Tile, precision, tile_key
from .launch import architecture_of, overridden

OPERATIONS = {
    "statistics": ("statistics",),
    "sample": ("sample",),
    "gradient": ("gradient, in the forward pass", "gradient, recomputed"),
    "mixture": ("log_prob",),
    "mixture-gradient": ("log_prob backward",),
}
"""The operations to measure for a family: the first of these that the shape has."""

ACCUMULATORS = {"statistics": 128, "sample": 64, "gradient": 128, "mixture": 64, "mixture-gradient": 32}
"""Most accumulators per thread. The random numbers of "sample" and the sum of "mixture" need as many registers
again."""


def candidates(family: str, products: str, rows: str, n_features: int, architecture: Architecture) -> Iterator[Tile]:
    """Tiles worth compiling: those whose accumulators fit into registers and whose operands fit into shared memory."""
    shared_memory = architecture.shared_memory
    itemsize = 2 if products == "16-bit" else 4
    heights = {"few": (16,), "some": (16, 32, 64), "many": (64, 128, 256)}[rows]
    depths = {"16-bit": (32, 64, 128), "tf32": (32, 64), "ieee": (16, 32)}[products]
    accumulators = ACCUMULATORS[family]
    for height, classes, features, warps, stages in itertools.product(
        heights, (32, 64, 128, 256), depths, (4, 8), (2, 3, 4)
    ):
        if not accumulators / 8 <= height * classes / (32 * warps) <= accumulators:
            continue
        streamed = stages * (height + classes) * features * itemsize
        if streamed <= shared_memory:
            yield Tile(height, classes, features, warps, stages)
        kept = (classes if "mixture" in family else height) * math.ceil(n_features / features) * features * itemsize
        # the results pass through shared memory, too
        written = height * classes * itemsize if family == "gradient" else 0
        if family != "sample" and architecture.has_tma and streamed + written <= shared_memory:
            yield Tile(height, classes, features, warps, stages, described=True)
        if family != "gradient" and products == "16-bit" and stages == 2 and kept + streamed // 2 <= shared_memory:
            yield Tile(height, classes, features, warps, stages, resident=True)


@dataclass
class Progress:
    """The state after a candidate: configuration, candidates measured and in total, and the fastest tile so far."""

    key: str
    done: int
    total: int
    best: Tile
    seconds: float
    seconds_before: float  # with the tile used so far


def tune(
    shape: tuple[int, int, int, int],  # N, K, D, V
    dtype: torch.dtype,
    device: torch.device,
    skip: set[str],
    compile_for: str | None,
) -> Iterator[Progress]:
    """Tune the configurations of a shape that are not in `skip`, and yield the progress after each candidate.

    `compile_for` is the architecture to compile candidates for; None compiles none ahead.
    """
    n, k, d, _ = shape
    architecture = architecture_of(device)
    operations = proof.operations(shape, dtype, device)
    for family, names in OPERATIONS.items():
        rows = n * k if family in ("statistics", "gradient") else n
        key = tile_key(family, precision(dtype), rows, d)
        if key in skip:
            continue
        operation = next(operations[name] for name in names if name in operations)
        tiles = list(candidates(family, precision(dtype), key.split()[0], d, architecture))
        sound = _compiled(tiles, key, shape, dtype, compile_for) if compile_for else tiles
        in_use = _seconds(operation)
        best, best_seconds = architecture.tiles.get(key, INTERPRETER_TILE), in_use
        for i, tile in enumerate(sound):
            with overridden(architecture, {key: tile}):
                seconds = _seconds(operation)
            if seconds < best_seconds:
                best, best_seconds = tile, seconds
            yield Progress(key, i + 1, len(sound), best, best_seconds, in_use)


def _compiled(
    tiles: list[Tile], key: str, shape: tuple[int, int, int, int], dtype: torch.dtype, name: str
) -> list[Tile]:
    """The tiles that compile without a fault."""
    architecture = ARCHITECTURES[name]

    def is_sound(tile: Tile, calls: list[proof.Call]) -> bool:
        return not any(proof.compile_call(call, name, ()).faults(name) for call in calls)

    calls = [
        [call for call in proof.recorded_calls(architecture, shape, dtype, {key: tile}) if call.key == key]
        for tile in tiles
    ]
    with ThreadPoolExecutor() as executor:
        return [tile for tile, sound in zip(tiles, executor.map(is_sound, tiles, calls)) if sound]


def _seconds(operation: Callable[[], object]) -> float:
    """Median seconds of repeated runs; infinite if the tile needs more resources than the GPU has."""
    try:
        operation()
        return Timer("operation()", globals={"operation": operation}).blocked_autorange(min_run_time=0.1).median
    except triton.runtime.errors.OutOfResources:
        return math.inf
