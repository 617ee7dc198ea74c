"""The device of a run: its name, the precision of float32 products, its memory, and asynchronous copies."""

import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from .._backends import resolve, why_absent
from .config import RunConfig
from .errors import ConfigError


def device_named(name: str) -> torch.device:
    """Returns the device of this name; "auto" is a GPU if there is one. Raises ConfigError unless it is a usable CPU or
    GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu, cuda, cuda:1, …, got {name!r}")
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def allow_tf32(device: torch.device, allowed: bool) -> None:
    """Sets whether float32 products on a GPU may be rounded to TF32. This is a setting of the process; torch's default
    allows TF32 in cuDNN's LSTM.

    It uses only torch's new flags, `fp32_precision`. The old ones also set the CPU's precision, and cannot forbid TF32
    to the LSTM if `torch.backends.fp32_precision` allows it.
    """
    if device.type == "cuda":
        precision = "tf32" if allowed else "ieee"
        torch.backends.cuda.matmul.fp32_precision = precision
        # torch adds the attributes of this module at import, where mypy does not see them
        torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the autocast context of a forward pass. Its cache is off: nothing is cast twice, and cached tensors must
    not outlive the CUDA graph that made them."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


def recurrent_products(device: torch.device, precision: str) -> torch.dtype | None:
    """Returns the dtype of the LSTM's matrix products in training, or None for float32. It is bfloat16 on a CPU only:
    the GPU's kernel has not been run yet."""
    return torch.bfloat16 if device.type == "cpu" and precision == "bfloat16" else None


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ConfigError if the device does not support this precision of products."""
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision tf32 needs an NVIDIA GPU, got device {device}")


def check_backend(backend: str, device: torch.device, bfloat16: bool = False) -> None:
    """Raises ConfigError if this backend cannot compute the head on this device."""
    try:
        resolve(backend, device, torch.bfloat16 if bfloat16 else torch.float32)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None


def backend_in_words(config: RunConfig, device: torch.device) -> str:
    """Returns which backend computes the head in training, and whether a CPU lacks the compiled kernels."""
    name = resolve(config.model.backend, device, torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
    missing = device.type == "cpu" and why_absent("cpu")
    return f"backend {name}" + (" (no compiled kernels: see fused-mos info)" if missing else "")


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a run's device. For a GPU the copy is asynchronous, from pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    # contiguous: torch would pack anything else into memory that is not pinned, and wait
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class AsyncScalar:
    """The present value of a scalar tensor (), copied from a GPU asynchronously."""

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
        """Returns the value, waiting only for its copy."""
        if self._copied:
            self._copied.synchronize()
        return self._host.item()


def memory_bytes(device: torch.device) -> int:
    """Bytes that this process could use: the GPU's free memory, or all memory of the machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
    return total


def check_memory(n_parameters: int, device: torch.device) -> None:
    """Raises ConfigError if parameters and their gradients alone exceed the device's memory: the system would kill the
    process without a message."""
    needed, limit = 2 * 4 * n_parameters, memory_bytes(device)
    if needed > limit:
        raise ConfigError(
            f"{n_parameters:,} parameters and their gradients need {needed / 2**30:,.1f} GiB, but {device} has "
            f"{limit / 2**30:,.1f}; choose fewer experts or smaller sizes"
        )


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: on the GPU if it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
