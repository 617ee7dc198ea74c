"""What was measured on which machine, with which versions and at which commit: for the file of `--benchmark-json`, and in each row's extra_info."""

import functools
import platform
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

import fused_mos


@functools.cache
def measured_on() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "device type": "cuda" if on_gpu else "cpu",
        "instruction set": _instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    import cpuinfo  # which pytest-benchmark brings

    return cpuinfo.get_cpu_info().get("brand_raw", platform.machine())


def _instruction_set() -> str:
    """Of the native kernels on the CPU, by which their times differ more than by the processor's name."""
    try:
        from fused_mos._backends import cpu
    except ImportError:
        return "not compiled"
    return cpu.instruction_set()


@functools.cache
def _commit() -> str:
    commit = get_commit_info()
    return commit["id"][:7] + (" and changes" if commit["dirty"] else "")


@pytest.fixture(autouse=True)
def _about(benchmark):
    benchmark.extra_info |= measured_on() | {"commit": _commit()}


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # of which a name of the host is a part
    machine_info |= measured_on() | {"backends": fused_mos.backends()}
