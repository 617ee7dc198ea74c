"""Where the GPU benchmarks run: on the GPU, or in a rehearsal on a CPU, in Triton's interpreter."""

import os
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DRY_RUN = os.environ.get("TRITON_INTERPRET") == "1"
"""True in a rehearsal: the same code on tiny shapes, whose times mean nothing."""
DEVICE = "cpu" if DRY_RUN else "cuda"


def environment(dry_run: bool) -> dict[str, str]:
    """Environment of a process that measures, which triton and Liger read when they are imported."""
    # Liger would else read the targets on the host, which neither ours nor a graph can
    changed = os.environ | {"LIGER_SCALED_CE_SM90_VALIDATE_TARGETS": "0"}
    return changed | {"TRITON_INTERPRET": "1"} if dry_run else changed


def prepare() -> str | None:
    """Make the device ready. Returns why the Triton backend cannot be measured here, or None if it can."""
    import fused_mos

    if DRY_RUN:  # the interpreter does not compute bfloat16 as a GPU does
        sys.path.append(str(ROOT / "tests"))
        import triton_interpreter

        triton_interpreter.repair()
    state = fused_mos.backends()["triton"]
    return None if state.startswith("available") else state


def gpu_name() -> str:
    return f"none ({platform.machine()})" if DRY_RUN else torch.cuda.get_device_name()


def synchronize() -> None:
    """Wait for the GPU."""
    if not DRY_RUN:
        torch.cuda.synchronize()


def is_lost() -> bool:
    """True if a failed kernel or capture has left the CUDA context in a state in which nothing more can be measured."""
    if DRY_RUN:
        return False
    try:
        torch.cuda.synchronize()
        return torch.cuda.is_current_stream_capturing() or torch.ones(2, device=DEVICE).sum().item() != 2
    except Exception:  # the error of any kernel before it
        return True
