"""Device queries and contexts for launching the kernels of csrc/cuda."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import torch


class NativeKernels:
    """The kernels of a module built from csrc/cuda/bindings.cpp.

    Args:
        native: the module.
        limits: device -> (multiprocessors, bytes of shared memory that a block may use).
        on: device -> a context that makes it the current device and yields the address of the stream to launch on.
    """

    def __init__(
        self,
        native: ModuleType,
        limits: Callable[[torch.device], tuple[int, int]],
        on: Callable[[torch.device], AbstractContextManager[int]],
    ):
        self.native, self.limits, self.on = native, limits, on


def limits(device: torch.device) -> tuple[int, int]:
    """The device's number of multiprocessors, and the bytes of shared memory that a block may use."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@contextmanager
def on(device: torch.device) -> Iterator[int]:
    """A context that makes it the current device and yields the address of the stream to launch on."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def too_new(runtime: int, driver: int) -> str | None:
    """None if the driver can run the kernels, that is, supports their major version of CUDA, else the reason why not.
    Versions are numbers as CUDA encodes them."""
    if runtime // 1000 <= driver // 1000:
        return None
    built, has = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return (
        f"its kernels were built with CUDA {built}, but the driver is for {has}; "
        "install with an older nvcc (CUDACXX), or a newer driver"
    )
