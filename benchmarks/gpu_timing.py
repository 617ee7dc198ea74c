"""Times one call on a GPU: its kernels by the profiler, the host that enqueues it, and the whole call."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from .gpu_device import DEVICE, DRY_RUN, synchronize
from .harness import mm_calls

Call = Callable[[], object]
WARM_UPS = 1 if DRY_RUN else 3
"""Calls before a graph is captured, to keep lazy initialisation and compilation out of it."""
NO_KERNEL = ("Memcpy", "Memset")


class Event(NamedTuple):
    """Work of the GPU, a kernel, a copy or a fill, in microseconds."""

    name: str
    start: float
    end: float


def device_events(call: Call, calls: int) -> list[Event]:
    """The GPU's work during `calls` calls, from the profiler. (In a dry run, torch's operators.)"""
    activity = ProfilerActivity.CPU if DRY_RUN else ProfilerActivity.CUDA
    synchronize()
    with profile(activities=[activity]) as profiler:
        for _ in range(calls):
            call()
        synchronize()
    wanted = torch.autograd.DeviceType.CPU if DRY_RUN else torch.autograd.DeviceType.CUDA
    found = [
        Event(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    if not found:
        raise RuntimeError("the profiler recorded no kernel")
    return found


def busy_microseconds(events: list[Event]) -> float:
    """Length of the union of the events: kernels on several streams overlap."""
    total, end = 0.0, -math.inf
    for event in sorted(events, key=lambda event: event.start):
        total += max(event.end - max(event.start, end), 0.0)
        end = max(end, event.end)
    return total


def summary(events: list[Event], calls: int) -> dict:
    """GPU milliseconds per call, the number of kernels, and the longest kernels as [name, microseconds, number]."""
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event.end - event.start)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:12]
    return {
        "gpu ms": round(busy_microseconds(events) / calls / 1e3, 5),
        "launches": round(sum(not event.name.startswith(NO_KERNEL) for event in events) / calls, 1),
        "kernels": [[name[:80], round(sum(t) / calls, 2), round(len(t) / calls, 2)] for name, t in longest],
    }


def host_and_wall(call: Call) -> tuple[float, float]:
    """Seconds until the call returns, and until the GPU has finished."""
    synchronize()
    start = time.perf_counter()
    call()
    enqueued = time.perf_counter()
    synchronize()
    return enqueued - start, time.perf_counter() - start


def in_turns(calls: dict[str, Call], rounds: int, budget: float) -> dict[str, list[tuple[float, float]]]:
    """`host_and_wall` of each call, in turns. Once there are three rounds, none starts after `budget` seconds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn > 2 and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            times[name].append(host_and_wall(call))
    return times


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """Capture the call's work as a CUDA graph, which owns the memory that the call allocates."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def stream_milliseconds(call: Call, calls: int) -> float:
    """Time per call of several calls queued behind other work, so the GPU never waits for the host. This is cheaper
    than the profiler."""
    if DRY_RUN:
        return 1e3 * statistics.median(host_and_wall(call)[1] for _ in range(calls))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # about 10 ms
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def products(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """GPU milliseconds of the step's three products by torch.mm, with and without padding D and V to multiples of 64.
    If rows are not aligned to 16 bytes, cuBLAS falls back to kernels at a third of the rate."""
    n, k, d, v = shape
    padded = (math.ceil(d / 64) * 64, math.ceil(v / 64) * 64)
    widths = {"": (d, v)} if padded == (d, v) else {"": (d, v), ", padded": padded}
    found = {}
    for kind, (width, classes) in widths.items():
        for name, call in mm_calls(n, k, width, classes, dtype, DEVICE).items():
            call()
            found[name + kind] = summary(device_events(call, 5), 5)["gpu ms"]
    return found
