"""Time decoding with few tokens, for gpu.py: the one-pass kernel of csrc/cuda and the Triton backend, over the time to
read the embedding."""

import statistics
from collections.abc import Callable

import torch

from fused_mos import functional as F

from .harness import inputs, interleaved

SHAPES = {
    f"{name}, {n} tokens": (n, *rest)
    for name, rest in {
        "wikitext2": (15, 300, 33_278),
        "lm1b": (7, 1_024, 100_000),
        "lm1b-all-words": (7, 1_024, 793_471),
    }.items()
    for n in (1, 8)
}
GOAL = 1.3
"""Wanted time over the floor, in bfloat16."""


def bytes_per_second(device: str, rounds: int) -> float:
    """Rate of a large copy, counting what it reads and what it writes."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, rounds, on_gpu=device == "cuda")["copy"]
    return 2 * source.nbytes / statistics.median(times)


def calls(arguments: list[torch.Tensor], backends: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """The calls of each backend, and those of `cuda` replayed from a graph as well."""
    z, a, w, _, b = (tensor.detach() for tensor in arguments)
    functions = {
        "log_prob": F.mos_log_prob,
        "topk": lambda *x, **options: F.mos_topk(*x, k=5, **options),
        "sample": F.mos_sample,
    }
    found = {}
    for backend in backends:
        for name, function in functions.items():
            call = found[f"{backend} {name}"] = lambda function=function, backend=backend: function(
                z, a, w, b, backend=backend
            )
            if backend == "cuda" and name != "sample":  # whose random numbers are torch's, too
                found[f"cuda {name}, graph"] = captured(call).replay
    return found


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def time_decoding(shape: tuple[int, int, int, int], backends: tuple[str, ...], device: str, rounds: int) -> dict:
    """Milliseconds (median, minimum, maximum) of each call, and the median over the floor."""
    speed = bytes_per_second(device, rounds)
    arguments = inputs(*shape, torch.bfloat16, device=device)
    floor = arguments[2].nbytes / speed
    rows, scratch = {}, torch.empty((256 << 20) if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def before() -> None:
        """Leaves nothing of the embedding in the cache, and the device busy for about a millisecond, until the host has
        queued the call."""
        scratch.zero_()
        if device == "cuda":
            torch.cuda._sleep(2_000_000)

    with torch.no_grad():
        for name, times in interleaved(calls(arguments, backends), rounds, device == "cuda", before).items():
            median = statistics.median(times)
            rows[name] = {
                "ms": [round(1e3 * f(times), 5) for f in (statistics.median, min, max)],
                "over floor": round(median / floor, 3),
            }
    return {"shape": shape, "floor ms": round(1e3 * floor, 5), "copy GB/s": round(speed / 1e9), "rows": rows}
