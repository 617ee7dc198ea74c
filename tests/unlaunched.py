"""A driver for Triton on machines without a GPU: kernels are compiled for an H100 and never launched."""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched: list[tuple] = []
"""Arguments of each launch: the grid, the stream, handles of the kernel, and the kernel's own arguments."""


class _Utils:
    def load_binary(self, name, kernel, shared, device):
        return name, kernel, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448}


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        launched.append(arguments)


class Driver:
    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def install() -> None:
    driver.set_active(Driver())
