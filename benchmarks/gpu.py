"""Check and time the Triton kernels on a GPU; write all results as JSON, and a plot of them:

    python -m benchmarks.gpu [--run RUN] [--out FILE.json]

The file is written after each step, and steps that it has are not repeated unless `--again` is given: a run that was
cut off continues where it stopped. RUN is the folder of a `python -m fused_mos.train` run, for the filter on a trained
model. `--dry-run` runs the same code on a CPU, with Triton's interpreter and tiny shapes; its times mean nothing.
"""

import dataclasses
import gc
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:  # triton looks at this when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import tyro
from tqdm import tqdm

import fused_mos
from fused_mos import functional as F
from fused_mos._backends import triton as backend
from fused_mos._backends.triton_kernels.proof import SHAPES, float32_products
from fused_mos.runtime.files import write_json
from fused_mos.training import RECIPES, Trainer
from fused_mos.training.device import allow_tf32
from fused_mos.training.profiling import StepProfile

from . import gpu_decode
from .gpu_report import goals, plot
from .harness import attempt, clear, inputs, interleaved, memory, mm_calls, spread, step
from .peers import MIXTURE, SINGLE, compiled, unavailable

HERE = Path(__file__).parent
DEVICE = "cpu" if DRY_RUN else "cuda"
ROUNDS = 2 if DRY_RUN else 20
NAMES = ("ptb", "wikitext2", "lm1b", "lm1b-all-words", "softmax")
if DRY_RUN:
    SHAPES = {"ptb": (6, 3, 24, 300), "softmax": (18, 1, 24, 300)}
    NAMES = tuple(SHAPES)
    sys.path.append(str(HERE.parent / "tests"))
    import triton_interpreter

    triton_interpreter.repair()


@dataclasses.dataclass
class Config:
    run: Path | None = None
    """Folder of a `python -m fused_mos.train` run, for the filter on a trained model."""

    data: Path | None = None
    """Folder of RUN's corpus; by default the one that it was trained on."""

    out: Path | None = None
    """JSON file, benchmarks/results/gpu-NAME.json by default. The plot is written beside it."""

    steps: tuple[str, ...] = ("tests", "memcheck", "racecheck", "synccheck", "times", "decode", "filter", "training")
    """Steps to run: all tests on the GPU, some under compute-sanitizer, times and memory, decoding in one pass, the
    filter, profiles of training steps on a text of random words."""

    shapes: tuple[str, ...] = NAMES
    """Shapes to time."""

    dtypes: tuple[str, ...] = ("bfloat16", "tf32")
    """Products to time: bfloat16, float16, tf32, float32."""

    again: bool = False
    """Repeat steps that the file has."""

    commit: str = ""
    """Commit that is measured, if git cannot tell."""

    dry_run: bool = False
    """Exercise the code on a CPU, at tiny shapes."""


# ---------------------------------------------------------------------------------------------------------------- tests


def run_tests(selection: list[str], wrapper: tuple[str, ...] = (), **environment: str) -> dict:
    """Run pytest in a process of its own; return whether it passed, its summary and its failures."""
    command = [*wrapper, sys.executable, "-m", "pytest", *selection]
    result = subprocess.run(command, cwd=HERE.parent, env=os.environ | environment, capture_output=True, text=True)
    lines = (result.stdout + result.stderr).strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "========="))]
    return {"passed": result.returncode == 0, "summary": lines[-1] if lines else "", "failures": failures[:40]}


def tests() -> dict:
    if DRY_RUN:
        return run_tests(["tests/test_gpu.py", "-k", "classes"])
    return run_tests(["tests", "-k", "triton or gpu or test_cuda", "--deselect", "tests/test_triton.py"])


def sanitize(tool: str) -> dict:
    """memcheck without torch's caching allocator, so that the ends of tensors are the ends of allocations; racecheck
    and synccheck of the kernel that has barriers of its own, Triton's being its compiler's."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return {"passed": None, "summary": "compute-sanitizer was not found"}
    decoding = [
        "tests/test_cuda.py",
        "-k",
        "gpu and (log_prob_and_topk or rare or samples) and not 100000 and not 793471",
    ]
    selections = [decoding]
    if tool == "memcheck":
        selections.append(
            [
                "tests/test_functional.py",
                "-k",
                "triton and (without_bias or predict or topk or non_contiguous or filter or float16)",
            ]
        )
    wrapper = (sanitizer, "--tool", tool, "--error-exitcode", "9")
    results = [run_tests(selection, wrapper, PYTORCH_NO_CUDA_MEMORY_CACHING="1") for selection in selections]
    return {
        "passed": all(result["passed"] for result in results),
        "summary": "; ".join(result["summary"] for result in results),
        "failures": [line for result in results for line in result["failures"]],
    }


# ---------------------------------------------------------------------------------------------------------------- times


def our_calls(arguments: list[torch.Tensor]) -> dict[str, tuple[float, Callable[[], object]]]:
    """name -> the products that it needs, and the call."""
    z, a, w, y, b = arguments
    n, k = a.shape
    grad = torch.empty(0)

    def without_grad(function, *args, **options):
        with torch.no_grad():
            return function(*args, backend="triton", **options)

    def log_prob_step():
        nonlocal grad
        log_p = F.mos_log_prob(z, a, w, b, backend="triton")
        if grad.numel() == 0:
            grad = torch.randn_like(log_p)
        clear(arguments)
        log_p.backward(grad)

    def nll(*x, reduction="mean"):
        return F.mos_nll_loss(*x, backend="triton", reduction=reduction).mean()

    return {
        "forward": (1, lambda: without_grad(F.mos_nll_loss, *arguments)),
        "forward + backward": (3 if backend.gradient_in_forward_pays(n, k, w) else 4, lambda: step(nll, arguments)),
        "forward + backward, recomputing": (4, lambda: step(lambda *x: nll(*x, reduction="none"), arguments)),
        "log_prob": (2, lambda: without_grad(F.mos_log_prob, z, a, w, b)),
        "log_prob, forward + backward": (8, log_prob_step),
        "predict": (2, lambda: without_grad(F.mos_predict, z, a, w, b)),
        "topk": (2, lambda: without_grad(F.mos_topk, z, a, w, b, k=5)),
        "sample": (1 / k, lambda: without_grad(F.mos_sample, z, a, w, b)),
    }


def peer_calls(arguments: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """Forward + backward of what a user would write instead."""
    single = arguments[1].shape[1] == 1
    plain = "F.linear + F.cross_entropy" if single else "log-sum-exp"
    losses = (SINGLE if single else MIXTURE) | {f"{plain}, compiled": compiled(plain)}
    return {name: lambda loss=loss: step(loss, arguments) for name, loss in losses.items()}


def products_per_second(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[float, dict[str, list[float]]]:
    """The best median rate of `mm_calls`, as products of this shape a second; and its times in ms (median, min,
    max)."""
    n, k, d, v = shape
    part = min(v, 100_000)
    times = interleaved(mm_calls(n, k, d, part, dtype, DEVICE), ROUNDS, on_gpu=not DRY_RUN)
    rate = part / v / min(statistics.median(values) for values in times.values())
    return rate, {name: spread([1e3 * value for value in values]) for name, values in times.items()}


def time_shape(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict:
    """All contenders in turns; the log-probabilities' backward pass after them, since it needs their gradient
    beside."""
    torch._dynamo.reset()
    rate, mm = products_per_second(shape, dtype)
    arguments = inputs(*shape, dtype, device=DEVICE)
    ours = our_calls(arguments)
    alone = {"log_prob, forward + backward": ours["log_prob, forward + backward"][1]}
    calls = {name: call for name, (_, call) in ours.items() if name not in alone} | peer_calls(arguments)
    rows: dict[str, dict] = {}
    for group in (calls, alone):
        measurable = {}
        for name, call in tqdm(group.items(), desc="warming up", leave=False):
            failure = (unavailable(name, DEVICE) if name not in ours else None) or attempt(call)
            clear(arguments)
            gc.collect()
            if not DRY_RUN:
                torch.cuda.empty_cache()
            rows[name] = {"failed": failure} if failure else memory(call, arguments)
            if failure is None:
                measurable[name] = call
        for name, values in interleaved(measurable, ROUNDS, on_gpu=not DRY_RUN).items():
            rows[name] |= {
                "ms": spread([1e3 * value for value in values]),
                "products": round(statistics.median(values) * rate, 3),
            }
            if name in ours:
                rows[name]["needs products"] = round(ours[name][0], 3)
    return {"shape": shape, "product ms": round(1e3 / rate, 4), "torch.mm ms": mm, "rows": rows}


def filtered(config: Config) -> dict:
    from experiments.gradient_filter import measure_run

    result = measure_run(config.run, config.data, 2 if DRY_RUN else 20, DEVICE, {"bfloat16": torch.bfloat16})
    rate, mm = products_per_second(result["shape"], torch.bfloat16)
    for row in result["rows"].values():
        row["products, exact"], row["products, filtered"] = (
            round(row[f"seconds, {what}"] * rate, 3) for what in ("exact", "filtered")
        )
    return result | {"torch.mm ms": mm}


# ------------------------------------------------------------------------------------------------------------- training


def profile_training(recipe: str, n_words: int, precision: str) -> dict:
    """Where the time of a recipe's training steps goes; the words are random, which steps do not feel."""
    config = dataclasses.replace(RECIPES[recipe](), precision=precision, profile=3 if DRY_RUN else 50, device=DEVICE)
    rows = (config.profile + StepProfile.WARM_UP + 1) * (config.optim.bptt + config.optim.bptt_delta)
    draw = random.Random(0)
    words = [f"w{i}" for i in range(n_words)]
    with tempfile.TemporaryDirectory() as folder:
        text = [*words, *draw.choices(words, k=rows * config.optim.batch_size)]
        for split in ("train", "valid", "test"):
            Path(folder, f"{split}.txt").write_text(" ".join(text if split == "train" else text[:1000]))
        trainer = Trainer(dataclasses.replace(config, data=Path(folder), out=Path(folder, "run")))
        trainer.model.train()
        allow_tf32(trainer.device, precision != "float32")
        while trainer.profile:
            trainer.train_step()
        report = json.loads(Path(folder, "run", "profile.json").read_text())
    peak = None if DRY_RUN else torch.cuda.max_memory_allocated() >> 20
    return report | {"peak MiB": peak}


# ----------------------------------------------------------------------------------------------------------------- main


def about(config: Config) -> dict:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "gpu": f"none ({platform.machine()})" if DRY_RUN else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "date": date.today().isoformat(),
        "commit": config.commit or git.stdout.strip() or "unknown",
        "units": "ms: median, minimum, maximum; products: median time over that of one product at torch.mm's best rate",
    }


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.gpu", description=__doc__)
    if not DRY_RUN and (reason := backend.unsupported(torch.device(DEVICE))):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if config.run and not config.data:
        config.data = Path(json.loads((config.run / "config.json").read_text())["data"])
    if config.data and not config.data.is_dir():
        print(f"error: --run's corpus {config.data} does not exist; --data tells where it is", file=sys.stderr)
        return 2
    facts = about(config)
    name = f"gpu-{facts['gpu'].lower().replace(' ', '-')}.json"
    path = config.out or (Path(tempfile.gettempdir()) / "gpu-dry-run.json" if DRY_RUN else HERE / "results" / name)
    result = (json.loads(path.read_text()) if path.exists() else {}) | facts

    def save() -> None:
        result["goals"] = goals(result)
        write_json(path, result)

    for name in ("tests", "memcheck", "racecheck", "synccheck"):
        if name in config.steps and (config.again or name not in result):
            result[name] = tests() if name == "tests" else sanitize(name)
            print(f"{name}: {result[name]['summary']}", flush=True)
            save()
    for shape in config.shapes if "times" in config.steps else ():
        for dtype_name in config.dtypes:
            times = result.setdefault("times", {})
            key = f"{shape} {dtype_name}"
            if key in times and not config.again:
                continue
            with float32_products(dtype_name) as dtype:
                times[key] = time_shape(SHAPES[shape], dtype)
            for name, row in times[key]["rows"].items():
                figures = (
                    f"{row['ms'][0]:9.3f} ms {row['products']:7.2f} products  {row['peak MiB']} MiB"
                    if "ms" in row
                    else row["failed"]
                )
                print(f"{key:24} {name:32} {figures}", flush=True)
            save()
    has_kernel = fused_mos.backends()["cuda"].startswith("available")
    for name, shape in (
        ({"tiny": (2, 3, 24, 300)} if DRY_RUN else gpu_decode.SHAPES).items() if "decode" in config.steps else ()
    ):
        decoding = result.setdefault("decode", {})
        if config.again or name not in decoding:
            decoding[name] = gpu_decode.time_decoding(
                shape, ("cuda", "triton") if has_kernel else ("triton",), DEVICE, ROUNDS
            )
            for call, row in decoding[name]["rows"].items():
                print(
                    f"{name:24} {call:32} {row['ms'][0]:9.4f} ms {row['over floor']:7.2f} times the floor", flush=True
                )
            save()
    if "filter" in config.steps and config.run and (config.again or "filter" not in result):
        result["filter"] = filtered(config)
    trainings = {"demo": 500} if DRY_RUN else {"ptb": 10_000, "wikitext2": 33_278}
    for recipe, n_words in trainings.items() if "training" in config.steps else ():
        for precision in ("float32",) if DRY_RUN else ("float32", "tf32", "bfloat16"):
            key, profiles = f"{recipe} {precision}", result.setdefault("training", {})
            if config.again or key not in profiles:
                profiles[key] = profile_training(recipe, n_words, precision)
                print(
                    f"{key}: {profiles[key]['step_ms']['median']:.2f} ms a step, "
                    f"{profiles[key]['words_per_second']:,.0f} words/s",
                    flush=True,
                )
                save()
    save()
    for goal in result["goals"]:
        print(f"{'met ' if goal['met'] else 'OPEN'}  {goal['goal']}: {goal['value']} (wanted {goal['wanted']})")
    if result.get("times"):
        plot(result, path.with_suffix(".png"))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
