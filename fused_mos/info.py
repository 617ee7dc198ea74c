"""python -m fused_mos.info

Versions, machine and backends, to paste into a bug report.
"""

import dataclasses
import os
import platform
import sys
from importlib import metadata

from .runtime import command
from .runtime.text import counted, show

PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors")
PREFIXES = ("FUSED_MOS_", "OMP_", "TRITON_")
"""Environment variables that change what is computed, or how fast."""


@dataclasses.dataclass
class Flags:
    """This command has no flags."""


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    """What a bug report needs to know: name -> value, both for people."""
    import torch

    from . import __version__, backends

    found = {
        "fused_mos": f"{__version__}, {os.path.dirname(__file__)}",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        **{package: version_of(package) for package in PACKAGES},
        "CPU": f"{processor()}, {counted(os.cpu_count() or 1, 'core')}, {counted(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "CUDA": torch.version.cuda or "torch is built without it",
    }
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"{device.major}.{device.minor}"
        found[f"GPU {i}"] = f"{device.name}, capability {capability}, {device.total_memory / 2**30:.0f} GiB"
    found |= {f"backend {name}": state for name, state in backends().items()}
    return found | {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def work(arguments: list[str]) -> None:
    command.parse(Flags, "info", __doc__, arguments)
    for name, value in facts().items():
        show(f"{name + ':':<19}{value}")


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
