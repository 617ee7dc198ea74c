"""Find the fastest tile of a kernel family at a shape, and print it as an entry of configurations.py.

This is for the table that all users get; `python -m fused_mos.tune` saves its tiles in the user's cache.
"""

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import torch
import triton

from fused_mos._backends.triton_kernels import configurations, proof, tuning
from fused_mos._backends.triton_kernels.configurations import Tile

from .gpu_cases import SHAPES
from .gpu_device import DEVICE, DRY_RUN
from .gpu_timing import stream_milliseconds

CALLS = 1 if DRY_RUN else 5
"""Calls to average for the time of a candidate."""
BATCH = 2 if DRY_RUN else 32
"""Candidates to compile at once."""
BUDGET = 200.0
"""Seconds after which no more batches are compiled."""
AGAIN = 1 if DRY_RUN else 8
"""Candidates to measure twice more, in turns with the current tile."""
GAIN = 0.03
"""Least relative gain for which the table should change."""


def measure(shape: str, dtype: str, family: str) -> dict:
    """The row of a sweep: the current and the fastest tile, and the milliseconds of both (median, minimum, maximum)."""
    with proof.float32_products(dtype) as torch_dtype:
        return _sweep(SHAPES[shape], torch_dtype, family)


def _sweep(shape: tuple[int, int, int, int], dtype: torch.dtype, family: str) -> dict:
    architecture = tuning.architecture_of(torch.device(DEVICE))
    operations = proof.operations(shape, dtype, DEVICE)
    name = next(name for name in tuning.OPERATIONS[family] if name in operations)
    key = _key(name, family, shape, dtype)
    operation = operations[name]
    before = architecture.tiles.get(key, configurations.INTERPRETER_TILE)
    rows, precision, *_ = key.split()
    tiles = tuning.candidates(family, precision, rows, shape[2], architecture)
    # tiles similar to the current one first, in case there is no time for all
    ordered = sorted(tiles, key=lambda tile: sum(a != b for a, b in zip(astuple(tile)[:5], astuple(before))))

    def milliseconds(tile: Tile) -> float:
        with tuning.overridden(architecture, {key: tile}):
            try:
                operation()
                return stream_milliseconds(operation, CALLS)
            except triton.runtime.errors.OutOfResources:
                return math.inf

    measured: dict[Tile, float] = {}
    start = time.perf_counter()
    for i in range(0, len(ordered), BATCH):
        if DRY_RUN and i or time.perf_counter() - start > BUDGET:
            break
        for tile in _compiling(ordered[i : i + BATCH], key, shape, dtype):
            measured[tile] = milliseconds(tile)
    best = sorted(measured, key=measured.__getitem__)[:AGAIN]
    times: dict[Tile, list[float]] = {tile: [] for tile in (before, *best)}
    for _ in range(3):
        for tile, values in times.items():
            values.append(milliseconds(tile))
    spreads = {tile: sorted(values) for tile, values in times.items()}
    fastest = min(spreads, key=lambda tile: spreads[tile][1])
    return {
        "key": key,
        "candidates": [len(measured), len(ordered)],
        "tile": list(astuple(fastest)),
        "ms": _median_and_range(spreads[fastest]),
        "tile before": list(astuple(before)),
        "ms before": _median_and_range(spreads[before]),
    }


def _key(name: str, family: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> str:
    """The configuration of a family from which an operation takes its tile."""
    architecture = tuning.architecture_of(torch.device(DEVICE))
    with tuning.overridden(architecture, record=True) as calls:
        proof.operations(shape, dtype, "meta")[name]()
    return next(call.key for call in calls if family in call.key.split())


def _median_and_range(values: list[float]) -> list[float]:
    least, median, most = values
    return [round(value, 5) for value in (median, least, most)]


def _compiling(tiles: list[Tile], key: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tile]:
    """The tiles whose kernels compile without a fault, compiled in parallel. (The interpreter accepts all.)"""
    if DRY_RUN:
        return tiles
    name = configurations.architecture_name(torch.cuda.get_device_capability())
    architecture = configurations.ARCHITECTURES[name]

    def is_sound(calls: list[proof.Call]) -> bool:
        return not any(proof.compile_call(call, name, ()).faults(name) for call in calls)

    calls = []
    for tile in tiles:  # one by one, since recording replaces the architecture of the whole process
        recorded = proof.recorded_calls(architecture, shape, dtype, {key: tile})
        calls.append([call for call in recorded if call.key == key])
    with ThreadPoolExecutor() as executor:
        return [tile for tile, sound in zip(tiles, executor.map(is_sound, calls)) if sound]


def table(rows: Iterable[dict], say: Callable[[str], None] = print) -> None:
    """Print an entry for each configuration that another tile made faster in every round. If shapes disagree, the one
    with the largest gain decides."""
    best: dict[str, dict] = {}
    for row in rows:
        gains = row.get("ms before", [0])[0] - row.get("ms", [0])[0]
        if "key" not in row or row["ms"][2] * (1 + GAIN) > row["ms before"][1]:
            continue
        if row["key"] not in best or gains > best[row["key"]]["gains"]:
            best[row["key"]] = row | {"gains": gains}
    for key, row in sorted(best.items()):
        fields = row["tile"] if row["tile"][-1] else row["tile"][:-1]  # `resident` is written only if True
        say(f'    "{key}": Tile({", ".join(map(str, fields))}),  # {row["ms before"][0]:.3f} -> {row["ms"][0]:.3f} ms')
