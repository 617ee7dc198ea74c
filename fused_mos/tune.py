"""python -m fused_mos.tune [--shapes NAME …] [--shape N K D V]: tune the Triton kernels' tiles for this GPU.

python -m fused_mos.tune --compile-only --arch sm_90 [--json FILE]: compile every kernel without a GPU and show its
resources.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ._backends.triton_kernels import configurations
from ._backends.triton_kernels.shapes import DTYPES, ODD_SHAPES, SHAPES
from .runtime import UserError, command, files
from .runtime.progress import bar, say
from .runtime.text import show

if TYPE_CHECKING:  # mypy rejects a Literal of computed names
    Shape = str
    DType = str
    Architecture = str
else:
    Shape = Literal[tuple(SHAPES | ODD_SHAPES)]
    DType = Literal[tuple(DTYPES)]
    Architecture = Literal[tuple(configurations.ARCHITECTURES)]


class TuneError(UserError):
    """The GPU or a flag does not allow tuning."""


@dataclass
class Flags:
    shapes: tuple[Shape, ...] = tuple(SHAPES)
    """Shapes to tune, by name. The default is those of the paper and the benchmarks, and the short inputs of
    generation; odd shapes must be named."""

    shape: tuple[int, int, int, int] | None = None
    """Your model's N tokens, K experts, D latent features and V classes, instead of `shapes`."""

    dtypes: tuple[DType, ...] = tuple(DTYPES)
    """Products to tune: 16-bit, and float32 with TF32 or in full precision."""

    again: bool = False
    """Tune configurations again that are in the cache already."""

    compile_only: bool = False
    """Compile every kernel with every tile of the table instead of measuring. Shows registers, shared memory, programs
    per multiprocessor, the widest load and store in bits, and instructions. The exit status is 1 if a kernel spills
    registers, exceeds the architecture's resources, or compiles to slower machine code than it should."""

    arch: Architecture = "sm_90"
    """Architecture to compile for."""

    json: Path | None = None
    """File to write the compiled kernels' resources to."""

    brief: bool = False
    """Compile each configuration of a kernel once instead of for every shape and dtype."""


def compile_only(config: Flags) -> int:
    """Compile every kernel, show its resources, and return the number of faults."""
    import triton

    from ._backends.triton_kernels import proof
    from ._backends.triton_kernels.launch import INTERPRETED

    if INTERPRETED:
        raise TuneError("--compile-only cannot compile while triton interprets; unset TRITON_INTERPRET")
    if config.shape:
        raise TuneError("--compile-only is for --shapes, got --shape")
    calls = proof.distinct_calls(config.arch, config.shapes, config.dtypes, config.brief)
    compiled = []
    for kernel in bar(proof.compile_all(calls, config.arch), total=len(calls), desc=config.arch, unit="kernels"):
        compiled.append(kernel)
        for fault in kernel.faults(config.arch) + kernel.over_budget(config.arch):
            say(f"FAULT {kernel.kernel} {kernel.dtype} ({kernel.key}) {kernel.tile}: {fault}", sys.stderr)
    compiled.sort(key=lambda kernel: (kernel.kernel, kernel.key, kernel.dtype, kernel.shapes))
    show(
        f"{'kernel':24} {'configuration':30} {'dtype':5} {'tile, warps, stages':20} {'registers':>9} {'stack':>5} "
        f"{'shared':>7} {'programs':>8} {'load':>4} {'store':>5} {'slots':>6}  instructions"
    )
    for kernel in compiled:
        tile = "x".join(map(str, kernel.tile))
        found = ", ".join(f"{count} {name}" for name, count in kernel.instructions.items() if count)
        found += "  (soft cap)" if kernel.capped else ""
        machine = kernel.sass
        code = (
            f"{machine.widest_load:4} {machine.widest_store:5} {machine.slots_per_exponential or '':6}"
            if machine
            else " " * 17
        )
        show(
            f"{kernel.kernel:24} {kernel.key:30} {kernel.dtype:5} {tile:20} {kernel.registers:9} {kernel.stack:5} "
            f"{kernel.shared:7} {kernel.programs:8} {code}  {found}"
        )
    n_faults = sum(len(kernel.faults(config.arch) + kernel.over_budget(config.arch)) for kernel in compiled)
    show(f"{len(compiled)} kernels compiled for {config.arch} with triton {triton.__version__}, {n_faults} faults")
    if config.json:
        kernels = [
            json.dumps(asdict(kernel) | {"faults": kernel.faults(config.arch) + kernel.over_budget(config.arch)})
            for kernel in compiled
        ]
        about = json.dumps({"architecture": config.arch, "triton": triton.__version__, "kernels": []}, indent=1)
        text = about.replace("[]", "[\n" + ",\n".join(kernels) + "\n]")  # one line per kernel
        files.write_text(config.json, text + "\n")
    return n_faults


def tune(config: Flags) -> None:
    """Tune every shape and dtype. Each configuration is saved at once, so an interrupted run keeps what it found."""
    from ._backends import triton as backend
    from ._backends.triton_kernels import proof, tuning
    from ._backends.triton_kernels.launch import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        raise TuneError("torch finds no CUDA GPU to tune for; --compile-only needs none")
    device = torch.device("cpu" if INTERPRETED else f"cuda:{torch.cuda.current_device()}")
    if reason := backend.unsupported(device):
        raise TuneError(reason)
    gpu, compile_for = "interpreter", None
    if device.type == "cuda":
        gpu, compile_for = (
            torch.cuda.get_device_name(),
            configurations.architecture_name(torch.cuda.get_device_capability()),
        )
    chosen = (
        {"your shape": config.shape} if config.shape else {name: (SHAPES | ODD_SHAPES)[name] for name in config.shapes}
    )
    tuned = configurations.load_tuned(gpu)
    done = set() if config.again or config.shape else set(tuned)
    for dtype_name in config.dtypes:
        for name, shape in chosen.items():
            with (
                proof.float32_products(dtype_name) as dtype,
                bar(desc=f"{name} {dtype_name}", unit="tiles", total=0) as shown,
            ):
                for progress in tuning.tune(shape, dtype, device, done, compile_for):
                    shown.n, shown.total = progress.done, progress.total
                    shown.set_postfix_str(f"{progress.key}: {progress.seconds_before / progress.seconds:.2f}x")
                    if progress.done == progress.total:
                        done.add(progress.key)
                        tuned[progress.key] = progress.best
                        configurations.save_tuned(gpu, tuned)
                        times = f"{progress.seconds * 1e3:.3f} ms, before {progress.seconds_before * 1e3:.3f} ms"
                        say(f"{progress.key}: {progress.best}, {times}")
    show(f"{len(tuned)} configurations in {configurations.cache_file(gpu)}")


def work(arguments: list[str]) -> int:
    config = command.parse(Flags, "tune", __doc__, arguments)
    try:
        if config.compile_only:
            return 1 if compile_only(config) else 0
        tune(config)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise TuneError("tuning needs triton, which is not installed; pip install triton") from None
    except ValueError as error:
        raise TuneError(str(error)) from None
    return 0


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, "the configurations found so far are kept, and skipped next time")


if __name__ == "__main__":
    sys.exit(main())
