"""Which addresses the programs of a launch read and write, in Triton's interpreter: on a GPU they run in any order."""

import contextlib
import inspect
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from backends import configurations, triton

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted

import triton.language as tl
from triton import jit
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_mos._backends.triton_kernels import (
    backward,
    described,
    exponentials,
    finish,
    forward,
    gradients,
    launch,
    loss,
    mixture,
    parts,
    proof,
    rows,
    workspace,
)

MODULES = (exponentials, finish, gradients, loss, mixture, rows)
KERNELS = {name for module in MODULES for name, _ in inspect.getmembers(module) if name.endswith("_kernel")}
DESCRIBED = {name for name, _ in inspect.getmembers(described) if name.endswith("_kernel")}


@dataclass
class Launch:
    """Addresses that the programs of one launch accessed, as the elements' first bytes."""

    kernel: str
    tensors: list[torch.Tensor]
    loads: dict[tuple, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))  # by program
    stores: dict[tuple, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    early: dict[tuple, int] = field(default_factory=dict)  # addresses that a program loads after it stored them

    def faults(self) -> list[str]:
        found = []
        written = {program: np.concatenate(parts) for program, parts in self.stores.items()}
        read = {program: np.unique(np.concatenate(parts)) for program, parts in self.loads.items()}
        for program, addresses in written.items():
            if len(np.unique(addresses)) < len(addresses):
                found.append(f"program {program} writes an address twice")
            if self.early.get(program):
                found.append(f"program {program} reads what it wrote")
        owners = [np.full(len(np.unique(a)), i) for i, a in enumerate(written.values())]
        if written:
            everything, owner = np.concatenate([np.unique(a) for a in written.values()]), np.concatenate(owners)
            order = np.argsort(everything, kind="stable")
            everything, owner = everything[order], owner[order]
            if (everything[1:] == everything[:-1]).any():
                found.append("two programs write the same address")
            numbers = {program: i for i, program in enumerate(written)}
            for program, addresses in read.items():
                place = np.searchsorted(everything, addresses)
                here = everything[np.minimum(place, len(everything) - 1)] == addresses
                others = owner[place[here]] != numbers.get(program, -1)
                if others.any():
                    found.append(f"program {program} reads what another one writes")
        for what, sets in (("writes", written), ("reads", read)):
            for program, addresses in sets.items():
                if not self._is_inside(addresses).all():
                    found.append(f"program {program} {what} outside of the arguments")
        return [f"{self.kernel}: {fault}" for fault in found]

    def _is_inside(self, addresses: np.ndarray) -> np.ndarray:
        inside = np.zeros(len(addresses), bool)
        for tensor in self.tensors:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            if tensor.numel():
                start = tensor.data_ptr()
                inside |= (addresses >= start) & (addresses <= start + last * tensor.itemsize)
        return inside


@contextlib.contextmanager
def recorded_launches(monkeypatch):
    """Yields the list of launches, each with its programs' addresses."""
    launches: list[Launch] = []
    call, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def recorded_call(self, *arguments, **options):
        members = itertools.chain.from_iterable(a if isinstance(a, tuple) else (a,) for a in arguments)
        bases = (member.base if isinstance(member, TensorDescriptor) else member for member in members)
        tensors = [base for base in bases if isinstance(base, torch.Tensor)]
        launches.append(Launch(self.fn.__name__, tensors))
        return call(self, *arguments, **options)

    def addresses(pointers, mask) -> np.ndarray:
        places, is_accessed = np.broadcast_arrays(pointers.data, mask.data)
        return places[is_accessed.astype(bool)]

    def recorded_load(self, pointers, mask, *others, **options):
        now, program = launches[-1], self.grid_idx
        found = addresses(pointers, mask)
        now.loads[program].append(found)
        for earlier in now.stores.get(program, ()) if found.size else ():
            apart = not earlier.size or found.max() < earlier.min() or found.min() > earlier.max()
            if not apart and np.isin(found, earlier).any():
                now.early[program] = now.early.get(program, 0) + 1
        return load(self, pointers, mask, *others, **options)

    def recorded_store(self, pointers, value, mask, *others):
        launches[-1].stores[self.grid_idx].append(addresses(pointers, mask))
        return store(self, pointers, value, mask, *others)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", recorded_call)
        patch.setattr(InterpreterBuilder, "create_masked_load", recorded_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", recorded_store)
        yield launches


def _everything(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Call all functions of the backend, also with filtered rows and with references that are too small."""
    for operation in proof.operations(shape, dtype, "cpu").values():
        operation()
    n, k, d, v = shape
    inputs = torch.randn(n, k, d).to(dtype), 5 * torch.randn(n, k).to(dtype), torch.randn(v, d).to(dtype), None
    inputs[2][v // 2 :] *= 100
    target = torch.randint(v, (n,))
    target[::3] = -100
    if triton.gradient_in_forward_pays(n, k, *inputs[2:]):
        triton.nll_with_gradients(*inputs, target, -100, 0.1, False, (True,) * 4)
    forward._first_of_best(torch.rand(3, 300), torch.randint(v, (3, 300)))
    losses, *statistics = triton.nll(*inputs, target, -100)
    triton.nll_backward(losses, *inputs, target, *statistics, -100, 0.1, (True,) * 4)


def _kernels(dtype: torch.dtype) -> set[str]:
    """All kernels, without the one for the bias's gradient in 16 bits, which columns of a product compute."""
    return KERNELS if dtype == torch.float32 else KERNELS - {"column_sums_kernel"}


def _with_descriptors(kernels: set[str]) -> set[str]:
    """Replace plain kernels by their variants with descriptors, for a GPU that has these."""
    return kernels - {re.sub("^(described|persistent)_", "", name) for name in DESCRIBED} | DESCRIBED


def _assert_no_conflict(launches: list[Launch]) -> None:
    for one in launches:
        assert not one.faults(), one.faults()[:4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_programs_do_not_meet(dtype, monkeypatch):
    """Odd sizes, with small tiles and a small workspace, so that each launch has several programs."""
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(16, 64, 32, 4, 1))
    monkeypatch.setattr(workspace, "WORKSPACE_BYTES", 160 * 1024)
    monkeypatch.setattr(backward, "MAX_ROWS", 64)
    monkeypatch.setattr(triton, "MIN_GRADIENT_ROWS", 1)
    monkeypatch.setattr(parts, "LEAST_PRODUCTS", 1)
    with recorded_launches(monkeypatch) as launches:
        _everything((23, 3, 19, 200), dtype)
    _assert_no_conflict(launches)
    several = {one.kernel for one in launches if len(one.stores) > 1}
    assert several == _kernels(dtype) | ({"split_kernel"} if dtype == torch.float32 else set())


@pytest.mark.parametrize(("architecture", "dtype"), [("sm_90", torch.bfloat16), ("sm_80", torch.float32)], ids=str)
def test_programs_of_real_tiles_do_not_meet(architecture, dtype, monkeypatch):
    with launch.overridden(configurations.ARCHITECTURES[architecture]), recorded_launches(monkeypatch) as launches:
        _everything((45, 3, 19, 300), dtype)
    _assert_no_conflict(launches)
    found = {one.kernel for one in launches}
    if architecture == "sm_90":  # where a filter leaves rows to the plain one, too
        assert found == _with_descriptors(_kernels(dtype)) | {"gradient_kernel"}
    else:
        assert found == _kernels(dtype)


# ------------------------------------------------------------------------------------- kernels in which programs meet


@jit
def _neighbours(x_ptr, n, OVERLAP: tl.constexpr, READ: tl.constexpr, TWICE: tl.constexpr, BEYOND: tl.constexpr):
    place = tl.program_id(0) * 8 + tl.arange(0, 16 if OVERLAP else 8)
    if READ:
        tl.load(x_ptr + 16 + place, mask=place < n)
    tl.store(x_ptr + place, 1.0, mask=place < n + BEYOND)
    if TWICE:
        tl.store(x_ptr + place, 2.0, mask=place < n)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("", ""),
        ("OVERLAP", "two programs write the same address"),
        ("READ", r"program \(0, 0, 0\) reads what another one writes"),
        ("TWICE", r"program \(0, 0, 0\) writes an address twice"),
        ("BEYOND", r"program \(3, 0, 0\) writes outside of the arguments"),
    ],
    ids=["none", "overlap", "read", "twice", "beyond"],
)
def test_a_conflict_is_found(fault, message, monkeypatch):
    memory = torch.zeros(64)
    faults = dict.fromkeys(("OVERLAP", "READ", "TWICE", "BEYOND"), 0) | ({fault: 1} if fault else {})
    with recorded_launches(monkeypatch) as launches:
        _neighbours[(4,)](memory[:28], 28, **faults)
    found = launches[0].faults()
    assert not found if not fault else [f for f in found if re.search(message, f)], found
