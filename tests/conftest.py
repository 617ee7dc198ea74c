"""Fixtures shared by all tests."""

import os
import signal

# waiting threads sleep instead of spinning: two test processes share the cores, and with spinning threads a test took
# eight times as long
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch's deterministic algorithms ask for
else:  # the Triton kernels are interpreted; triton looks at this when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from backends import INSTRUCTION_SETS, ON_GPU, TRITON, configurations, cpu, triton, use_instruction_set
from markers import add_markers

if triton and triton.INTERPRETED:
    import triton_interpreter

    triton_interpreter.repair()


def pytest_configure():
    """Stop ignoring SIGINT. Background jobs of a script ignore it, and the processes that tests start would inherit
    that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items):
    for item in items:
        add_markers(item)


@pytest.fixture(autouse=True)
def seeded_and_strict():
    """Seed torch, so results do not depend on the order of tests, and fill torch.empty with NaN to expose elements that
    nothing writes."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def default_device(request):
    """Make the tensors of the Triton backend's tests on the GPU, if there is one."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    on_gpu = ON_GPU and any(isinstance(value, str) and value == "triton" for value in parameters.values())
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)


TRITON_KERNELS = "fused_mos._backends.triton_kernels"


@pytest.fixture(params=["one tile", "many tiles"])
def workspace(request, monkeypatch):
    """Run a test with the usual workspace and with a small one, in which every loop has several tiles (of 64 columns in
    `tiled`) or chunks."""
    from fused_mos._backends import tiled, tiled_products

    if request.param == "many tiles":
        if triton:
            monkeypatch.setattr(f"{TRITON_KERNELS}.workspace.WORKSPACE_BYTES", 128 * 1024)
            monkeypatch.setattr(f"{TRITON_KERNELS}.workspace.WORKSPACE_SHARE", 0)
            monkeypatch.setattr(f"{TRITON_KERNELS}.backward.MAX_ROWS", 64)
            monkeypatch.setattr(triton, "MIN_GRADIENT_ROWS", 1)
            monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(32, 128, 32, 4, 1))
        monkeypatch.setitem(tiled_products.WORKSPACE_BYTES, "cpu", 16 * 1024)
        monkeypatch.setattr(tiled_products, "MAX_ROWS", 32)
        monkeypatch.setattr(tiled, "MIN_GRADIENT_ROWS", 1)  # also where its blocks are of one token
        if cpu:
            monkeypatch.setattr("fused_mos._backends.cpu_operands.WORKSPACE_BYTES", 16 * 1024)
            monkeypatch.setattr(cpu, "FORWARD_WORKSPACE_BYTES", 32 * 1024)
            monkeypatch.setattr(cpu, "MAX_FORWARD_WORKSPACE_BYTES", 0)
            monkeypatch.setattr(cpu, "MIN_GRADIENT_ROWS", 1)
            monkeypatch.setattr(cpu, "MIN_GRADIENT_ROWS_WITH_AMX", 1)
            monkeypatch.setattr("fused_mos._backends.cpu_one_sweep.MIN_ROWS", 1)
    return request.param


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Run a test with the native kernels of each instruction set that this processor has."""
    use_instruction_set(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["tiled", TRITON, *INSTRUCTION_SETS])
def backend(request, monkeypatch):
    """The name of each fused backend; `cpu` comes once for each instruction set."""
    if request.param in ("tiled", "triton"):
        return request.param
    use_instruction_set(request.param, monkeypatch)
    return "cpu"
