"""The limit of memory that the backend may take beyond inputs, outputs and gradients."""

import functools
import os

import torch

from ..tracing import assume_constant_result

WORKSPACE_BYTES = 288 * 2**20
"""Bytes beyond inputs, outputs and gradients. Most of it is a block of dl; this suffices for the paper's Penn Treebank
model in one block."""

WORKSPACE_SHARE = 0.02
"""Share of a GPU's memory that the workspace may take if that is more than WORKSPACE_BYTES."""


def workspace_bytes(device: torch.device) -> int:
    """Bytes that may be taken beyond inputs, outputs and gradients: the larger of WORKSPACE_BYTES and WORKSPACE_SHARE
    of a GPU's memory. The environment variable FUSED_MOS_WORKSPACE_MIB overrides it; ValueError unless it is
    positive."""
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
    """Bytes of the smallest GPU, 0 without one. Using the smallest cuts equal calls into equal blocks on all GPUs."""
    n_gpus = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(i).total_memory for i in range(n_gpus)), default=0)
