"""The JSON of `--benchmark-json` says on what it was measured."""

import platform

import torch

import fused_mos


def pytest_benchmark_update_machine_info(config, machine_info):
    on_gpu = torch.cuda.is_available()
    machine_info.clear()  # of which a name of the host is a part
    machine_info |= {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "device type": "cuda" if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backends": fused_mos.backends(),
    }


def _cpu_name() -> str:
    import cpuinfo  # which pytest-benchmark brings

    return cpuinfo.get_cpu_info().get("brand_raw", platform.machine())
