"""Memory beyond inputs, outputs and gradients: how much of it the backend may take."""

import functools
import os

import torch

from ..tracing import assume_constant_result

WORKSPACE_BYTES = 288 * 2**20
"""Bytes beyond inputs, outputs and gradients, of which the largest part is a block of dl: enough for the paper's Penn
Treebank in one block."""

WORKSPACE_SHARE = 0.02
"""Share of a GPU's memory that the workspace may be, where that is more."""


def workspace_bytes(device: torch.device) -> int:
    """Bytes beyond inputs, outputs and gradients: WORKSPACE_BYTES, or WORKSPACE_SHARE of a GPU's memory where that is
    more; or what the environment variable FUSED_MOS_WORKSPACE_MIB says."""
    return _workspace_bytes(device.type == "cuda")


@assume_constant_result
def _workspace_bytes(on_gpu: bool) -> int:
    if mib := os.environ.get("FUSED_MOS_WORKSPACE_MIB"):
        if not mib.isdecimal() or int(mib) < 1:
            raise ValueError(f"FUSED_MOS_WORKSPACE_MIB must be a positive number of MiB, got {mib!r}")
        return int(mib) * 2**20
    return max(WORKSPACE_BYTES, int(WORKSPACE_SHARE * _memory_of_gpu())) if on_gpu else WORKSPACE_BYTES


@functools.cache
def _memory_of_gpu() -> int:
    """Bytes of the smallest GPU, so that equal calls are cut into equal blocks on all of them; 0 without any."""
    n_gpus = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(i).total_memory for i in range(n_gpus)), default=0)
