"""What a launch of csrc/cuda's kernels asks of a device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import torch


class NativeKernels:
    """Kernels of a module of csrc/cuda/bindings.cpp.

    Args:
        native: the module.
        limits: device -> (multiprocessors, bytes of shared memory that a block may use).
        on: device -> a context in which that is the current one, and that gives the address of the stream to launch on.
    """

    def __init__(
        self,
        native: ModuleType,
        limits: Callable[[torch.device], tuple[int, int]],
        on: Callable[[torch.device], AbstractContextManager[int]],
    ):
        self.native, self.limits, self.on = native, limits, on


def limits(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory that a block may use)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@contextmanager
def on(device: torch.device) -> Iterator[int]:
    """A context in which the device is the current one. Gives the address of the stream to launch on."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def too_new(runtime: int, driver: int) -> str | None:
    """Why a driver cannot run the kernels, of versions as CUDA counts them; None where it can: all of its major
    version."""
    if runtime // 1000 <= driver // 1000:
        return None
    built, has = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return (
        f"its kernels were built with CUDA {built} and the driver is for {has}; "
        "install with an older nvcc (CUDACXX), or a newer driver"
    )
