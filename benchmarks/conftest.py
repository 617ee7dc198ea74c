"""Record the machine, versions and commit in the file of `--benchmark-json` and in each row's extra_info. Print a line
for each row as soon as it is measured."""

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
    """Brand, family and model. The numbers tell generations apart if a virtual machine hides the full name."""
    import cpuinfo  # a dependency of pytest-benchmark

    about = cpuinfo.get_cpu_info()
    name, numbers = about.get("brand_raw", platform.machine()), [about.get("family"), about.get("model")]
    return name if None in numbers else "{}, family {}, model {}".format(name, *numbers)


def _instruction_set() -> str:
    """Instruction set of the native CPU kernels. Their times depend on it more than on the processor's name."""
    try:
        from fused_mos._backends import cpu
    except ImportError:
        return "not compiled"
    return cpu.instruction_set()


@functools.cache
def _commit() -> str:
    commit = get_commit_info()
    return (
        commit["id"]
        if commit["id"] == "unversioned"
        else commit["id"][:7] + (" and changes" if commit["dirty"] else "")
    )


@pytest.fixture(autouse=True)
def _about(benchmark, request):
    benchmark.extra_info |= measured_on() | {"commit": _commit()}
    yield
    if "contender" in benchmark.extra_info:  # the test got this far
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{_line(benchmark.extra_info)}", end="", flush=True)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['figure']} {row['case']} {row['dtype']} {row['operation']}: {row['contender']}"
    if "failed" in row:
        return f"{name:95} {row['failed']}"
    if "times the mean loss" in row:
        median, least, most = row["times the mean loss"]
        products = f"{row['by products']:.2f} by products"
        return f"{name:95} {median:5.2f} ({least:.2f}–{most:.2f}) × the mean loss, {products}"
    median, least, most = row["times ours"]
    found = [
        f"{row['ms'][0]:9.2f} ms" if "ms" in row else f"{row['words a second'][0]:,.0f} words/s",
        f"{median:5.2f} ({least:.2f}–{most:.2f}) × ours",
    ]
    found += [f"{row['over floor']:.2f} × floor"] if "over floor" in row else []
    found += [f"{row['peak MiB']:,.0f} MiB"] if row.get("peak MiB") is not None else []
    return f"{name:95} {', '.join(found)}"


def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """Suppress pytest-benchmark's own table, which would show a single round, out of turn."""
    return []


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # it would include the host name
    machine_info |= measured_on() | {"backends": fused_mos.backends()}
