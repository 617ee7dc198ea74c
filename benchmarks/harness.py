"""Shared by benchmarks and experiments: inputs, timing in turns, the floor, and memory."""

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

try:
    from fused_mos import _cpu
except ImportError:
    _cpu = None

NATIVE = _cpu is not None
"""True if the CPU's native kernels were compiled."""
Shape = tuple[int, int, int, int]
"""N, K, D, V."""


def inputs(n: int, k: int, d: int, v: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """latent, prior_logits, weight, target and bias of a newly initialised head. All but the target require grad."""
    options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    return [
        torch.randn(n, k, d, **options).tanh_().to(dtype).requires_grad_(),
        torch.randn(n, k, **options).requires_grad_(),
        torch.rand(v, d, **options).mul_(0.2).sub_(0.1).to(dtype).requires_grad_(),
        torch.randint(0, v, (n,), **options),
        torch.zeros(v, dtype=dtype, device=device, requires_grad=True),
    ]


# ----------------------------------------------------------------------------------------------------------------- time


def seconds(call: Callable[[], object], on_gpu: bool = False, before: Callable[[], object] | None = None) -> float:
    """Time of one call. On a GPU it includes the host's time to launch the kernels, unless `before` keeps the device
    busy for longer than that."""
    if before:
        before()
    if on_gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def clear(arguments: Iterable[Tensor]) -> None:
    for tensor in arguments:
        tensor.grad = None


def step(loss: Callable[..., Tensor], arguments: list[Tensor]) -> None:
    """Run forward and backward into new gradients."""
    clear(arguments)
    loss(*arguments).backward()


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    on_gpu: bool = False,
    before: Callable[[], object] | None = None,
    warm_up: bool = True,
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call. After a warm-up, all calls take turns for `rounds` rounds, so ratios are reliable on a
    noisy machine. Once there are two rounds, none starts after `budget` seconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    if warm_up:
        for call in calls.values():
            seconds(call, on_gpu, before)
    start = time.perf_counter()
    for turn in range(rounds):
        if turn > 1 and time.perf_counter() - start > budget:
            break
        for name, call in calls.items():
            times[name].append(seconds(call, on_gpu, before))
    return times


def spread(values: Iterable[float], digits: int = 4) -> list[float]:
    """Median, minimum and maximum."""
    values = list(values)
    return [round(f(values), digits) for f in (statistics.median, min, max)]


def attempt(call: Callable[[], object]) -> str | None:
    """Make the call once, as a warm-up. Return why it cannot be measured, or None."""
    try:
        call()
        return None
    except (torch.OutOfMemoryError, MemoryError):
        return "out of memory"
    except Exception as error:  # peers can fail in any way
        lines = str(error).strip().splitlines() or ["no message"]
        return f"{type(error).__name__}: {lines[0][:200]}"


# ---------------------------------------------------------------------------------------------------------------- floor


def mm_calls(
    n: int, k: int, d: int, v: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Callable[[], object]]:
    """The three products of a training step by torch.mm."""
    z, e, p = (torch.randn(size, device=device, dtype=dtype) for size in ((n * k, d), (v, d), (n * k, v)))
    return {
        "mm z·Eᵀ": lambda: torch.mm(z, e.t()),
        "mm P·E": lambda: torch.mm(p, e),
        "mm Pᵀ·z": lambda: torch.mm(p.t(), z),
    }


def aligned_classes(v: int, most: int) -> int:
    """A multiple of 64 classes: the first that is at least `v`, or the last up to `most` if that is less."""
    return max(min(math.ceil(v / 64), most // 64), 1) * 64


class Floor:
    """The time of one product, 2·N·K·D·V operations, at the best rate of this device, measured between the contenders.

    On a CPU with native kernels, the best rate is that of a register-only loop of multiply-adds. Elsewhere it is the
    best rate of torch.mm among the step's three products. They are timed on a part of the classes: 10,000 on a CPU,
    otherwise as many as keep the largest matrix within a GiB. On a GPU both widths are padded: with rows that are not
    aligned to 16 bytes, cuBLAS falls back to kernels at a third of the rate.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        n, k, d, v = shape
        self.by_peak = device == "cpu" and NATIVE and dtype in (torch.float32, torch.bfloat16)
        self.gflop = 2 * n * k * d * v / 1e9
        self._peaks: list[float] = []
        bf16 = dtype == torch.bfloat16 and self.by_peak and _cpu.bf16_products()
        on_cpu = device == "cpu"
        part = min(v, 10_000) if on_cpu else aligned_classes(v, 2**30 // (n * k * dtype.itemsize))
        width = d if on_cpu else math.ceil(d / 8) * 8
        self.calls = (
            {"peak": lambda: self._peaks.append(_cpu.peak_gflops(torch.get_num_threads(), bf16))}
            if self.by_peak
            else mm_calls(n, k, width, part, dtype, device)
        )
        self._scale = v * d / (part * width)

    def seconds_of_product(self, times: dict[str, list[float]]) -> float:
        if self.by_peak:
            return self.gflop / statistics.median(self._peaks)
        return self._scale * min(statistics.median(times[name]) for name in self.calls)


# --------------------------------------------------------------------------------------------------------------- memory


def available_bytes(device: str) -> int:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # memory that torch caches is free, too
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else []
    found = next((line for line in lines if line.startswith("MemAvailable")), None)
    return int(found.split()[1]) << 10 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def lacking(needed: int, device: str) -> str | None:
    """None if so many bytes are free, else the reason why a call that needs them cannot run."""
    free = available_bytes(device)
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if needed > free else None


def memory(call: Callable[[], object], arguments: list[Tensor]) -> dict[str, float | None]:
    """Memory of a call: "peak MiB", the peak besides the inputs, and "kept MiB", the gradients and the result.

    The peak includes what is kept; it cannot be subtracted, since the peak may be before the gradients exist. On a GPU
    the peak is torch's. On Linux it is the growth of the process, to about a MiB, and at least the kept memory and the
    native kernels' workspace, which calls share. Elsewhere it is None.
    """
    clear(arguments)
    gc.collect()
    on_gpu = arguments[0].is_cuda
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory, to count it when it is used again
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak resident size
        except (AttributeError, OSError):
            call()
            return {"peak MiB": None, "kept MiB": None}
        before = _status("VmRSS")
        if _cpu:
            _cpu.reset_peak_bytes()
    result = call()
    peak = (torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")) - before
    results = (result,) if isinstance(result, Tensor) else result or ()
    kept = sum(tensor.nbytes for tensor in (*(t.grad for t in arguments if t.grad is not None), *results))
    workspace = _cpu.peak_bytes() if _cpu and not on_gpu else 0
    return {"peak MiB": round(max(peak, kept + workspace) / 2**20, 1), "kept MiB": round(kept / 2**20, 1)}


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10
