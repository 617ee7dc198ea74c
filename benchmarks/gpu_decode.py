"""Times decoding of few tokens on a GPU by the one-pass kernel of csrc/cuda and by the Triton backend, relative to the
time to read the embedding."""

import statistics
from collections.abc import Callable

import torch

import fused_mos
from fused_mos import functional as F

from .gpu_cases import DECODE_SHAPES
from .gpu_device import DEVICE, DRY_RUN
from .gpu_timing import captured
from .harness import inputs, interleaved, spread

ROUNDS = 2 if DRY_RUN else 20


def bytes_per_second() -> float:
    """Rate of a large copy, counting both reads and writes."""
    source = torch.empty((1 << 22) if DRY_RUN else (1 << 30), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, ROUNDS, on_gpu=not DRY_RUN)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def calls(arguments: list[torch.Tensor], backends: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """The calls of each backend, and those of `cuda` also replayed from a graph."""
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
            if backend == "cuda" and name != "sample":  # sample also uses torch's random numbers
                found[f"cuda {name}, graph"] = captured(call).replay
    return found


def measure(shape: str) -> dict:
    """The row of decoding at a shape in gpu_cases."""
    has_kernel = fused_mos.backends()["cuda"].startswith("available")
    return time_decoding(DECODE_SHAPES[shape], ("cuda", "triton") if has_kernel else ("triton",))


def time_decoding(shape: tuple[int, int, int, int], backends: tuple[str, ...]) -> dict:
    """Milliseconds (median, minimum, maximum) of each call, and the ratio of the median to the floor."""
    speed = bytes_per_second()
    arguments = inputs(*shape, torch.bfloat16, device=DEVICE)
    floor = arguments[2].nbytes / speed
    rows, scratch = {}, torch.empty(1 if DRY_RUN else (256 << 20), dtype=torch.uint8, device=DEVICE)

    def before() -> None:
        """Evict the embedding from the cache, and keep the device busy for about a millisecond until the host has
        queued the call."""
        scratch.zero_()
        if not DRY_RUN:
            torch.cuda._sleep(2_000_000)

    with torch.no_grad():
        for name, times in interleaved(calls(arguments, backends), ROUNDS, not DRY_RUN, before).items():
            rows[name] = {
                "ms": spread((1e3 * value for value in times), 5),
                "over floor": round(statistics.median(times) / floor, 3),
            }
    return {"shape": shape, "floor ms": round(1e3 * floor, 5), "copy GB/s": round(speed / 1e9), "rows": rows}
