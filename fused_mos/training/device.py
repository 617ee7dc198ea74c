"""The device of a run: its name, its float32 products, its memory, and copies to it and from it without waiting."""

import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from .._backends import resolve
from .errors import ConfigError


def device_named(name: str) -> torch.device:
    """The device of this name, for "auto" a GPU if there is one. Raises ConfigError unless it is a CPU or a GPU that
    can be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu, cuda, cuda:1 …, got {name!r}")
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def allow_tf32(device: torch.device, allowed: bool) -> None:
    """Sets whether float32 products on a GPU may be rounded to TF32. torch keeps this as a setting of the process, and
    by default allows it in cuDNN's LSTM.

    Both are set by their new names alone. The old ones set the CPU's precision, too, and do not take TF32 from the LSTM
    where `torch.backends.fp32_precision` allows it.
    """
    if device.type == "cuda":
        precision = "tf32" if allowed else "ieee"
        torch.backends.cuda.matmul.fp32_precision = precision
        # torch gives this module its attributes when it is imported, where mypy does not see them
        torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a run's forward pass. Nothing is cast twice in it, so it keeps no casts: a cache must not outlive
    the CUDA graph that its tensors were made in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def recurrent_products(device: torch.device, precision: str) -> torch.dtype | None:
    """What the LSTM's products in training are rounded to, None for nothing. On a GPU that kernel was not run yet."""
    return torch.bfloat16 if device.type == "cpu" and precision == "bfloat16" else None


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ConfigError where a run's products cannot have this precision on this device."""
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision tf32 is that of NVIDIA GPUs, got device {device}")


def check_backend(backend: str, device: torch.device, bfloat16: bool = False) -> None:
    """Raises ConfigError where the head cannot be computed with this backend on this device."""
    try:
        resolve(backend, device, torch.bfloat16 if bfloat16 else torch.float32)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to a run's device. The host does not wait for a GPU: it copies from pinned memory.

    Contiguous memory, since torch packs anything else into memory that is not pinned, and waits.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class AsyncScalar:
    """The present value of a tensor (), copied from a GPU while the host goes on."""

    def __init__(self, number: Tensor):
        self._copied: torch.cuda.Event | None = None
        if number.device.type != "cuda":
            self._host = number.clone()
            return
        self._host = torch.empty((), dtype=number.dtype, pin_memory=True)
        self._host.copy_(number, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def item(self) -> float:
        """Waits for that copy alone."""
        if self._copied:
            self._copied.synchronize()
        return self._host.item()


def memory_bytes(device: torch.device) -> int:
    """Memory that this process could have: what is free on a GPU, or all of the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
    return total


def check_memory(n_parameters: int, device: torch.device) -> None:
    """Raises ConfigError where parameters and their gradients alone are more than the device's memory; the system would
    end the process without a word."""
    needed, limit = 2 * 4 * n_parameters, memory_bytes(device)
    if needed > limit:
        raise ConfigError(
            f"{n_parameters:,} parameters and their gradients need {needed / 2**30:,.1f} GiB, and {device} has "
            f"{limit / 2**30:,.1f}; take fewer experts or smaller sizes"
        )


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has held: of the GPU if it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
