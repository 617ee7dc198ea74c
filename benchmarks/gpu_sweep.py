"""Find the fastest tile of a kernel family at a shape, and print what was found as entries of configurations.py.

Unlike `python -m fused_mos.tune`, which keeps its tiles in the user's cache, this is for the table that all users get.
"""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from fused_mos._backends.triton_kernels import configurations, proof, tuning
from fused_mos._backends.triton_kernels.configurations import Tile

from .gpu_cases import SHAPES
from .gpu_device import DEVICE, DRY_RUN
from .gpu_timing import stream_milliseconds

CALLS = 1 if DRY_RUN else 5
"""Calls whose mean is a candidate's time."""
AGAIN = 1 if DRY_RUN else 8
"""Candidates that are measured twice more, in turns with the tile in use."""
GAIN = 0.03
"""Relative gain from which the table should change."""


def measure(shape: str, dtype: str, family: str) -> dict:
    """The row of a sweep: the tile in use, the fastest, and the milliseconds of both (median, minimum, maximum)."""
    with proof.float32_products(dtype) as torch_dtype:
        return _sweep(SHAPES[shape], torch_dtype, family)


def _sweep(shape: tuple[int, int, int, int], dtype: torch.dtype, family: str) -> dict:
    n, k, d, _ = shape
    architecture = tuning.architecture_of(torch.device(DEVICE))
    precision = configurations.precision(dtype)
    rows = n * k if family in ("statistics", "gradient") else n
    key = configurations.tile_key(family, precision, rows, d)
    operations = proof.operations(shape, dtype, DEVICE)
    operation = next(operations[name] for name in tuning.OPERATIONS[family] if name in operations)
    tiles = list(tuning.candidates(family, precision, key.split()[0], d, architecture.shared_memory))
    tiles = tiles[:2] if DRY_RUN else _compiling(tiles, key, shape, dtype)
    before = architecture.tiles.get(key, configurations.INTERPRETER_TILE)

    def milliseconds(tile: Tile) -> float:
        with tuning.overridden(architecture, {key: tile}):
            try:
                operation()
                return stream_milliseconds(operation, CALLS)
            except triton.runtime.errors.OutOfResources:
                return math.inf

    best = sorted(tiles, key=milliseconds)[:AGAIN]
    times: dict[Tile, list[float]] = {tile: [] for tile in (before, *best)}
    for _ in range(3):
        for tile, values in times.items():
            values.append(milliseconds(tile))
    spreads = {tile: sorted(values) for tile, values in times.items()}
    fastest = min(spreads, key=lambda tile: spreads[tile][1])
    return {
        "key": key,
        "candidates": len(tiles),
        "tile": list(_fields(fastest)),
        "ms": _median_and_range(spreads[fastest]),
        "tile before": list(_fields(before)),
        "ms before": _median_and_range(spreads[before]),
    }


def _median_and_range(values: list[float]) -> list[float]:
    least, median, most = values
    return [round(value, 5) for value in (median, least, most)]


def _fields(tile: Tile) -> Iterable[int | bool]:
    return (getattr(tile, name) for name in tile.__dataclass_fields__)


def _compiling(tiles: list[Tile], key: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tile]:
    """The tiles whose kernels compile without a fault, compiled in parallel."""
    name = configurations.architecture_name(torch.cuda.get_device_capability())
    architecture = configurations.ARCHITECTURES[name]

    def is_sound(calls: list[proof.Call]) -> bool:
        return not any(proof.compile_call(call, name, ()).faults(name) for call in calls)

    calls = []
    for tile in tiles:  # not in parallel, because a recording replaces the architecture of the whole process
        recorded = proof.recorded_calls(architecture, shape, dtype, {key: tile})
        calls.append([call for call in recorded if call.key == key])
    with ThreadPoolExecutor() as executor:
        return [tile for tile, sound in zip(tiles, executor.map(is_sound, calls)) if sound]


def table(rows: Iterable[dict], say: Callable[[str], None] = print) -> None:
    """Print an entry for each configuration that another tile makes faster in every round; where shapes disagree, that
    of the one which gains most."""
    best: dict[str, dict] = {}
    for row in rows:
        gains = row.get("ms before", [0])[0] - row.get("ms", [0])[0]
        if "key" not in row or row["ms"][2] * (1 + GAIN) > row["ms before"][1]:
            continue
        if row["key"] not in best or gains > best[row["key"]]["gains"]:
            best[row["key"]] = row | {"gains": gains}
    for key, row in sorted(best.items()):
        fields = row["tile"] if row["tile"][-1] else row["tile"][:-1]  # residence in shared memory is the exception
        say(f'    "{key}": Tile({", ".join(map(str, fields))}),  # {row["ms before"][0]:.3f} -> {row["ms"][0]:.3f} ms')
