"""Compiles every kernel that the backend would launch on an architecture, without a GPU, and checks the results.

The backend's own code runs on meta tensors and its launches are recorded. So each kernel is compiled with the constants
and the divisibility of a real launch. Use a separate process: triton must not be interpreting.
"""

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import triton as backend
from ..resources import Resources, kernel_resources
from ..transform import IDENTITY, Transform
from . import sass, workspace
from .configurations import ARCHITECTURES, Architecture, Tile
from .launch import Call, overridden
from .loss import WeightedLosses
from .operands import move_rows
from .sass import Sass, programs_per_multiprocessor
from .shapes import DTYPES, ODD_SHAPES, SHAPES

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.bool: "u1"}
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "cp.async": r"\bcp\.async\.(?:ca|cg)",
    "TMA": r"\bcp\.async\.bulk\.tensor",
    "ex2": r"\bex2\.approx",
}

WRITERS = ("exponentials_kernel", "recheck_kernel", "gradient_kernel")
"""The kernels that dominate training: they compute one exponential and write one number per logit."""

PERSISTENT_WRITERS = ("persistent_exponentials_kernel", "persistent_gradient_kernel")
"""Their variants that store tiles by TMA."""

WITH_WIDE_PRODUCTS = (
    "statistics_kernel",
    "described_statistics_kernel",
    "reference_kernel",
    *WRITERS,
    *PERSISTENT_WRITERS,
)

LARGE_WORKSPACE = int(workspace.WORKSPACE_SHARE * 192 * 2**30)
"""Workspace bytes of a large GPU. It can store exponentials of shapes whose logits are otherwise recomputed."""

CAPPED = Transform(softcap=30.0)
CAPPED_SHAPES = ("ptb", "lm1b")
"""Shapes to compile with a soft cap too, in bfloat16: many rows, narrow and wide."""

CAPPED_SPILL = 256
"""Bytes that a thread of a kernel with a soft cap may spill, once per tile: the derivative needs the logit besides its
gradient."""

MOST_SLOTS = 8.5
"""Most instructions per exponential in WRITERS: about the number of cycles that its unit takes."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: stack bytes and registers per thread, bytes of shared memory, and PTX instructions."""

    kernel: str
    shapes: tuple[str, ...]
    dtype: str
    key: str
    tile: tuple[int, ...]  # rows, classes, features, warps, stages
    registers: int
    stack: int
    local: int
    shared: int
    instructions: dict[str, int]
    sass: Sass | None = None
    programs: int = 0  # programs that a multiprocessor holds
    written: int = 0  # bytes that a thread writes of a tile of exponentials or of dl
    capped: bool = False  # compiled with a soft cap
    error: str = ""  # why compilation failed; the numbers are then 0

    def faults(self, architecture: str) -> list[str]:
        """Faults that make the kernel useless with any tile."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack > (CAPPED_SPILL if self.capped else 0) or self.local:
            found.append(f"spills (stack {self.stack}, local {self.local})")
        limit = ARCHITECTURES[architecture].shared_memory
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, {architecture} has {limit}")
        # wgmma needs at least 64 rows and four warps
        if (
            architecture == "sm_90"
            and self.key
            and "16-bit" in self.key
            and self.tile[0] >= 64
            and not self.instructions["wgmma"]
        ):
            found.append("has no wgmma")
        return found

    def over_budget(self, architecture: str) -> list[str]:
        """Signs of slow machine code that no kernel of the table shows, to detect a change that costs time."""
        if self.error or self.sass is None:
            return []
        found, machine = [], self.sass
        if machine.wide_stores * 16 < self.written:
            found.append(
                f"stores {machine.wide_stores * 16} of its tile's {self.written} bytes a thread in 128 bits at a time, "
                f"others in at most {machine.widest_store}"
            )
        if self.kernel in (*WRITERS, *PERSISTENT_WRITERS) and machine.scaled_exponentials:
            found.append(f"keeps denormal results of {machine.scaled_exponentials} exponentials")
        slots = machine.slots_per_exponential
        if (
            self.kernel in ("exponentials_kernel", "persistent_exponentials_kernel")
            and not self.capped
            and self.key.startswith("many 16-bit")
            and slots > MOST_SLOTS
        ):
            found.append(f"issues {slots} instructions for an exponential")
        if (
            architecture == "sm_90"
            and self.kernel in WITH_WIDE_PRODUCTS
            and self.tile[0] >= 64
            and machine.product_columns < 64
        ):
            found.append(f"multiplies by {machine.product_columns} columns at a time")
        if not self.programs:
            found.append("fits into no multiprocessor")
        return found


def operations(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str, transform: Transform = IDENTITY
) -> dict[str, Callable[[], object]]:
    """All functions of the backend at (N, K, D, V), by name, on random tensors."""
    n, k, d, v = shape

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    latent, weight, bias = random(n, k, d), random(v, d) * d**-0.5, random(v)
    prior_logits, log_total = (torch.randn(n, k, device=device) for _ in range(2))
    target, one = torch.randint(v, (n,), device=device), torch.ones((), device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    grad = torch.randn(n, device=device)
    inputs = latent, prior_logits, weight, bias
    statistics, row_statistic = (log_total, log_total, log_total), log_total.view(-1)
    mixture = latent, prior_logits, weight, bias, log_total, log_total
    needs = (True,) * 4
    rows_ = latent.view(n * k, d)
    found = {
        "statistics": lambda: backend.nll(*inputs, target, -100, transform),
        "statistics without targets": lambda: backend.row_statistics(rows_, weight, bias, None, transform),
        "normalisers": lambda: backend.normalisers(*inputs, transform),
        "loss": lambda: backend.nll_with_gradients(*inputs, target, -100, 0.0, True, (False,) * 4, transform),
        "gradient, recomputed": lambda: backend.nll_backward(
            grad, *inputs, target, *statistics, -100, 0.0, needs, transform
        ),
        "gradient of normalisers": lambda: backend.rows_backward(
            rows_, weight, bias, None, *(row_statistic,) * 3, None, needs[:3], transform
        ),
        "log_prob": lambda: backend.log_prob(*mixture, transform),
        "predict": lambda: backend.predict(*mixture, transform),
        "log_prob backward": lambda: backend.log_prob_backward(
            torch.randn(n, v, device=device), *mixture, needs, transform
        ),
        "sample": lambda: backend.sample(
            backend.choose_rows(latent, prior_logits, seed), weight, bias, transform, seed
        ),
    }
    if backend.gradient_in_forward_pays(n, k, weight, bias):
        loss_weights = torch.rand(3, n, device=device)
        found["gradient, in the forward pass"] = lambda: backend.nll_with_gradients(
            *inputs, target, -100, 0.0, True, needs, transform
        )
        found["weighted losses"] = lambda: backend.nll_with_gradients(
            *inputs, target, -100, 0.0, False, (False,) * 4, transform, loss_weights
        )
        found["gradient of weighted losses"] = lambda: backend.nll_with_gradients(
            *inputs, target, -100, 0.0, False, needs, transform, loss_weights
        )
        found["backward pass"] = lambda: backend.scaled(inputs, one, one)
    return found


def recorded_calls(
    architecture: Architecture,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    tiles: dict[str, Tile],
    transform: Transform = IDENTITY,
) -> list[Call]:
    """The launches of all functions of the backend at (N, K, D, V)."""
    with overridden(architecture, tiles, record=True) as calls:
        for operation in operations(shape, dtype, "meta", transform).values():
            operation()
        # only real tensors tell which rows survive a filter
        n, k, _, v = shape
        moved = torch.empty(n * k // 4, dtype=torch.int64, device="meta")
        move_rows(torch.empty(n * k, -(-v // 16) * 16, dtype=dtype, device="meta"), moved, moved)
    return calls


def _specialisation(argument) -> tuple[str, object, bool]:
    """An argument's type, its value if it is a constant, and whether it is a multiple of 16, as Triton's launcher sees
    them."""
    if argument is None:
        return "constexpr", None, False
    if isinstance(argument, Tensor):
        return "*" + TYPES[argument.dtype], None, argument.storage_offset() * argument.itemsize % 16 == 0
    if isinstance(argument, TensorDescriptor):
        return f"tensordesc<{TYPES[argument.base.dtype]}{argument.block_shape}>", None, False
    if isinstance(argument, float):
        return "fp32", None, False
    if argument == 1:
        return "constexpr", 1, False
    return _integer(argument), None, argument % 16 == 0


def _integer(argument: int) -> str:
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def _members(arguments: tuple) -> Iterator[tuple[tuple[int, ...], object]]:
    """All arguments with their paths as Triton counts them. The members of a NamedTuple come one by one."""
    for i, argument in enumerate(arguments):
        if isinstance(argument, tuple):
            yield from (((i, j), member) for j, member in enumerate(argument))
        else:
            yield (i,), argument


def _type(argument) -> str | tuple:
    """An argument's type. The type of a NamedTuple is the same NamedTuple of its members' types."""
    if isinstance(argument, tuple):
        return type(argument)(*(_specialisation(member)[0] for member in argument))
    return _specialisation(argument)[0]


def variant(call: Call) -> str:
    """The properties of a launch for which Triton compiles a kernel anew, as text."""
    plain = {i for i, parameter in enumerate(call.kernel.params) if parameter.do_not_specialize}
    members = [
        _integer(member) if path[0] in plain else _specialisation(member)  # type: ignore[arg-type]
        for path, member in _members(call.arguments)
    ]
    return repr((call.kernel.__name__, call.key, members, call.constants))


def _source(call: Call) -> tuple[ASTSource, dict]:
    names = call.kernel.arg_names
    plain = {i for i, parameter in enumerate(call.kernel.params) if parameter.do_not_specialize}
    signature = {
        name: _integer(argument) if i in plain else _type(argument)
        for i, (name, argument) in enumerate(zip(names, call.arguments))
    }
    signature |= dict.fromkeys(call.constants, "constexpr")
    constants: dict[tuple[int, ...], object] = {(names.index(name),): value for name, value in call.constants.items()}
    attributes = {}
    for path, argument in _members(call.arguments):
        if path[0] in plain:
            continue
        kind, value, is_aligned = _specialisation(argument)
        if kind == "constexpr":
            constants[path] = value
        if is_aligned:
            attributes[path] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes), {
        "num_warps": call.warps,
        "num_stages": call.stages,
        "enable_fp_fusion": True,
    }


def _read(cubin: bytes) -> tuple[Resources, Sass]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (resources,) = kernel_resources(file.name)
        return resources, sass.read(sass.disassembled(file.name))


def _tile(call: Call) -> tuple[int, ...]:
    """Rows, classes, features, warps and stages; 0 for those the kernel's tile does not have."""
    constants = call.constants
    if "TILE" in constants:
        rows, classes, features, *_ = constants["TILE"]
    else:
        rows = constants.get("ROWS", constants.get("TOKENS", 0))
        classes, features = 0, constants.get("FEATURES", 0)
    return rows, classes, features, call.warps, call.stages


def is_capped(call: Call) -> bool:
    return any(getattr(argument, "inverse_softcap", None) is not None for argument in call.arguments)


def _written(call: Call, dtype: str) -> int:
    """Bytes per thread of the tile of exponentials or dl that a kernel writes; 0 for other kernels."""
    if call.kernel.__name__ not in WRITERS and not call.constants.get("SECOND_SWEEP"):
        return 0
    rows, classes, _, warps, _ = _tile(call)
    return rows * classes * (4 if dtype == "fp32" else 2) // (32 * warps)


def compile_call(call: Call, architecture: str, shapes: tuple[str, ...]) -> Compiled:
    source, options = _source(call)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    dtype = next(TYPES[member.dtype] for _, member in _members(call.arguments) if isinstance(member, Tensor))
    about = call.kernel.__name__, shapes, dtype, call.key, _tile(call)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # the compiler fails in many ways; each concerns only this kernel
        return Compiled(*about, 0, 0, 0, 0, {}, error=f"{type(error).__name__}: {str(error).strip() or 'no message'}")
    (resources, machine), ptx = _read(compiled.asm["cubin"]), compiled.asm["ptx"]
    instructions = {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}
    shared = compiled.metadata.shared
    return Compiled(
        *about,
        resources.registers,
        resources.stack,
        resources.local,
        shared,
        instructions,
        machine,
        programs_per_multiprocessor(architecture, call.warps, resources.registers, shared),
        _written(call, dtype),
        is_capped(call),
    )


@contextlib.contextmanager
def _workspace(n_bytes: int) -> Iterator[None]:
    before, workspace.WORKSPACE_BYTES = workspace.WORKSPACE_BYTES, n_bytes
    try:
        yield
    finally:
        workspace.WORKSPACE_BYTES = before


@contextlib.contextmanager
def float32_products(name: str) -> Iterator[torch.dtype]:
    """Set torch's precision of float32 products to that of `DTYPES[name]` inside the `with` block."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield DTYPES[name]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def distinct_calls(
    architecture: str, shapes: Iterable[str] = SHAPES, dtypes: Iterable[str] = DTYPES, brief: bool = False
) -> list[tuple[Call, tuple[str, ...]]]:
    """Each distinct kernel once or, with `brief`, each configuration of a kernel once, and the shapes that launch
    it."""
    found: dict[tuple, tuple[Call, list[str]]] = {}
    for dtype_name, n_bytes in itertools.product(dtypes, (workspace.WORKSPACE_BYTES, LARGE_WORKSPACE)):
        with float32_products(dtype_name) as dtype, _workspace(n_bytes):
            for shape in shapes:
                sizes, capped = (SHAPES | ODD_SHAPES)[shape], dtype_name == "bfloat16" and shape in CAPPED_SHAPES
                calls = recorded_calls(ARCHITECTURES[architecture], sizes, dtype, {})
                if capped:
                    calls += recorded_calls(ARCHITECTURES[architecture], sizes, dtype, {}, CAPPED)
                for call in calls:
                    sweep = call.constants.get("SECOND_SWEEP")  # the second writes dl, the first sums
                    tile = call.kernel.__name__, call.key, call.warps, call.stages, sweep
                    kind = is_capped(call), any(isinstance(argument, WeightedLosses) for argument in call.arguments)
                    same = *tile, *kind, "" if brief else variant(call)
                    names = found.setdefault(same, (call, []))[1]
                    if shape not in names:
                        names.append(shape)
    return [(call, tuple(names)) for call, names in found.values()]


def compile_all(calls: list[tuple[Call, tuple[str, ...]]], architecture: str) -> Iterator[Compiled]:
    """Compile all calls in parallel threads: most of the time is spent in ptxas and in passes that release the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        yield from executor.map(lambda item: compile_call(item[0], architecture, item[1]), calls)
