"""The device of the GPU benchmarks: the GPU, or a CPU with Triton's interpreter in a rehearsal."""

import os
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DRY_RUN = os.environ.get("TRITON_INTERPRET") == "1"
"""True in a rehearsal, which runs the same code at tiny shapes. Its times mean nothing."""
DEVICE = "cpu" if DRY_RUN else "cuda"


def environment(dry_run: bool) -> dict[str, str]:
    """Environment of a measuring process. triton and Liger read it when they are imported."""
    # otherwise Liger reads the targets on the host, which ours does not and a graph cannot
    changed = os.environ | {"LIGER_SCALED_CE_SM90_VALIDATE_TARGETS": "0"}
    return changed | {"TRITON_INTERPRET": "1"} if dry_run else changed


def prepare() -> str | None:
    """Prepare the device. Return why the Triton backend cannot be measured here, or None if it can."""
    import fused_mos

    if DRY_RUN:  # the interpreter computes bfloat16 differently from a GPU
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
    """True if a failed kernel or capture has made the CUDA context unusable."""
    if DRY_RUN:
        return False
    try:
        torch.cuda.synchronize()
        return torch.cuda.is_current_stream_capturing() or torch.ones(2, device=DEVICE).sum().item() != 2
    except Exception:  # it reports the error of any earlier kernel
        return True
