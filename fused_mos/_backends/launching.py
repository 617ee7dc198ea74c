"""What a launch of csrc/cuda's kernels asks of a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
