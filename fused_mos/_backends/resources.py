"""Resources that compiled kernels use, read from a cubin or a module with triton's cuobjdump. Needs no GPU."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel: registers and stack bytes per thread, and bytes of statically declared shared memory."""

    architecture: str
    function: str  # mangled
    registers: int
    stack: int
    local: int
    shared: int


def kernel_resources(path: str | Path) -> list[Resources]:
    """The resources of each kernel in the file, for each architecture."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    output = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    found, architecture, function = [], "", ""
    for line in output.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):", line):
            function = match[1]
        elif "REG:" in line:
            used = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line))
            found.append(
                Resources(architecture, function, *(int(used[name]) for name in ("REG", "STACK", "LOCAL", "SHARED")))
            )
    return found
