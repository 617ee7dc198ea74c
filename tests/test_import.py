"""Importing the package is cheap, and the modules that it leaves for later are loaded when they are needed."""

import os
import subprocess
import sys

import pytest
from backends import _cpu, triton

HEAVY = [
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "matplotlib",
    "safetensors",
    "sympy",
    "tensorboard",
    "tqdm",
    "transformers",
    "triton",
    "tyro",
]


def run(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def imported_with(module: str) -> list[str]:
    """Modules that it adds to those of torch."""
    return run(
        f"import sys, torch\nbefore = set(sys.modules)\nimport {module}\nprint(*sorted(set(sys.modules) - before))"
    ).split()


@pytest.mark.parametrize("module", ["fused_mos", "fused_mos.vocab_parallel"])
def test_importing_the_package_brings_nothing_heavy(module):
    """Beyond torch. (Any of these takes longer than the whole package.)"""
    imported = imported_with(module)
    assert "fused_mos.functional" in imported and module in imported
    assert not [m for m in imported if any(m == heavy or m.startswith(heavy + ".") for heavy in HEAVY)]
    assert "fused_mos._backends.triton" not in imported


@pytest.mark.parametrize("backend", ["tiled", "cpu", "triton"])
def test_a_backend_is_loaded_while_a_graph_is_traced(backend):
    """In a program that has computed nothing before: one graph, the values of tiled."""
    if (triton if backend == "triton" else _cpu) is None:
        pytest.skip(f"the {backend} backend is not available")
    # bfloat16 asks the native kernels whether they multiply it; Triton's interpreter gets it wrong unless mended
    dtype = "torch.float32" if backend == "triton" else "torch.bfloat16"
    program = f"""
import sys, torch, fused_mos
device = "cuda" if {backend!r} == "triton" and torch.cuda.is_available() else "cpu"
heads = [fused_mos.MoS(6, 90, 3, 4, backend=b, device=device, dtype={dtype}) for b in ("tiled", {backend!r})]
heads[1].load_state_dict(heads[0].state_dict())
x, y = torch.randn(7, 6, dtype={dtype}, device=device), torch.randint(90, (7,), device=device)
assert {backend!r} == "tiled" or "fused_mos._backends.{backend}" not in sys.modules
losses = torch.compile(lambda x: [head(x, y).loss for head in heads], fullgraph=True, backend="aot_eager")(x)
assert "fused_mos._backends.{backend}" in sys.modules
torch.testing.assert_close(*losses, rtol=0, atol=1e-2)
"""
    run(program)
