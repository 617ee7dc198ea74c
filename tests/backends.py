"""The backends that this machine can test, as pytest parameters.

conftest.py sets the environment that Triton and OpenMP read before this is imported.
"""

import pytest
import torch

try:
    from fused_mos import _cpu
    from fused_mos._backends import cpu
except ImportError:  # installed without a compiler: the tests of the native kernels are skipped
    _cpu = cpu = None

from fused_mos import _backends

ON_GPU = torch.cuda.is_available()

triton = None if _backends.why_absent("triton") else _backends.kernels("triton")
configurations = triton and triton.configurations

INSTRUCTION_SETS = ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"]

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not triton, reason="triton is not installed"))
CPU = pytest.param("cpu", marks=pytest.mark.skipif(_cpu is None, reason="the native kernels are not installed"))


def use_instruction_set(name: str, monkeypatch) -> None:
    if _cpu is None:
        pytest.skip("the native kernels are not installed")
    if name not in _cpu.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setenv("FUSED_MOS_ISA", name)
