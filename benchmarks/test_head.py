"""Time the head and its baselines: pytest benchmarks --benchmark-only.

All contenders of a case take turns in one process, so ratios are reliable on a noisy machine. Each row's extra_info has
the ratio to ours, the time over the floor (harness.Floor) and the memory besides the inputs, or the reason why the
contender cannot run. Runs on a GPU if there is one.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch

from fused_mos import functional as F

from . import peers
from .harness import NATIVE, Floor, Shape, attempt, clear, inputs, interleaved, lacking, memory, spread, step
from .tables import OURS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = "training step"
EACH = "training step, loss of each token"
N_ROUNDS = {"cpu": 5, "cuda": 20}[DEVICE]
BUDGET = 5.0
"""Seconds of a case after which no more rounds start, once there are two."""
PATIENCE = 10.0
"""Seconds that a baseline's first call may take even if that is over five times as long as ours. Slower ones are not
timed."""


class Case(NamedTuple):
    figure: str  # the table or plot it belongs to
    name: str
    shape: Shape
    dtype: str = "float32"
    operation: str = STEP

    def __str__(self) -> str:
        return " ".join((self.figure, self.name, self.dtype, *([] if self.operation == STEP else [self.operation])))


SHAPES: dict[str, Shape] = (
    {
        "ptb": (840, 15, 280, 10_000),
        "wikitext2": (1_050, 15, 300, 33_278),
        "lm1b": (2_560, 7, 1_024, 100_000),
        "softmax": (12_600, 1, 280, 10_000),
    }
    if DEVICE == "cuda"
    else {
        "ptb": (210, 15, 280, 10_000),
        "wikitext2": (210, 15, 300, 33_278),
        "lm1b": (128, 7, 512, 100_000),
        "softmax": (3_150, 1, 280, 10_000),
    }
)
"""Shapes of the paper's training steps; on a CPU with a part of the tokens."""
SOME = {"cpu": 1, "cuda": 8}[DEVICE]


def _cases() -> Iterable[Case]:
    for name, shape in SHAPES.items():
        for dtype in ("float32", "bfloat16"):
            yield Case("shapes", name, shape, dtype)
    for operation in ("forward", EACH, "log_prob", "sample"):
        yield Case("operations", "ptb", SHAPES["ptb"], operation=operation)
    n, k, d, v = SHAPES["ptb"]
    for count in (1, 2, 5, 10, 15, 30):
        yield Case("experts", f"K = {count}", (n, count, d, v))
    for words in (10_000, 33_278, 100_000, 793_471):
        yield Case("vocabulary", f"V = {words:,}", (60 * SOME, 7, 256, words))
    for features in (70, 140, 280, 560, 1_120):
        yield Case("features", f"D = {features:,}", (n, k, features, v))
    for tokens in (1, 12, 70, 210, 840):
        yield Case("tokens", f"N = {tokens}", (tokens, k, d, v))


CASES = list(_cases())


def _contenders(case: Case) -> dict[str, Callable[..., torch.Tensor]]:
    if (
        case.operation == EACH
    ):  # ours recomputes the logits: it cannot form gradients before the tokens' weights are known
        return {OURS: lambda *x: F.mos_nll_loss(*x, reduction="none").mean(), "published code": peers.published}
    if case.operation != STEP:
        return {OURS: None, "published code": None}
    found = {OURS: F.mos_nll_loss}
    if case.figure != "shapes":
        return found | {name: peers.MIXTURE[name] for name in ("published code", "five lines, F.linear_cross_entropy")}
    for name, loss in (peers.SINGLE if case.shape[1] == 1 else peers.MIXTURE).items():
        found[name] = loss
        if name in peers.COMPILED:
            found[f"{name}, compiled"] = peers.compiled(name)
    return found


def _without_grad(case: Case, arguments: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """The operations without gradients, ours and as usually written."""
    z, a, w, y, b = (tensor.detach() for tensor in arguments)

    def log_prob() -> torch.Tensor:
        return torch.log(
            (torch.softmax(torch.nn.functional.linear(z, w, b), -1) * torch.softmax(a, -1)[..., None]).sum(1) + 1e-8
        )

    return {
        "forward": {
            OURS: lambda: F.mos_nll_loss(z, a, w, y, b),
            "published code": lambda: peers.published(z, a, w, y, b),
        },
        "log_prob": {OURS: lambda: F.mos_log_prob(z, a, w, b), "published code": log_prob},
        "sample": {
            OURS: lambda: F.mos_sample(z, a, w, b),
            "published code": lambda: torch.multinomial(log_prob().exp(), 1),
        },
    }[case.operation]


def products(case: Case) -> float:
    """Products of N·K rows with the vocabulary that no method can avoid. (A sample needs only one expert's logits.)"""
    return {STEP: 3, EACH: 3, "forward": 1, "log_prob": 1, "sample": 1 / case.shape[1]}[case.operation]


@functools.lru_cache(maxsize=1)
def measure(case: Case) -> tuple[dict[str, dict], dict[str, Callable[[], object]], list[torch.Tensor]]:
    """A row for each contender, the calls of those that can run, and their shared arguments."""
    torch._dynamo.reset()
    n, k, _, v = case.shape
    dtype = getattr(torch, case.dtype)
    arguments = inputs(*case.shape, dtype, device=DEVICE)
    contenders = _contenders(case)
    if case.operation in (STEP, EACH):
        calls = {name: functools.partial(step, loss, arguments) for name, loss in contenders.items()}
    else:
        calls = _without_grad(case, arguments)
    rows, measurable, spent = {}, {}, {}
    gradients = sum(tensor.nbytes for tensor in arguments if tensor.requires_grad)
    for name, call in calls.items():
        slow = peers.too_slow(DEVICE, dtype) if name != OURS or not NATIVE else None
        needed = peers.materialised(name, DEVICE) * n * k * v * dtype.itemsize + gradients
        failure = peers.unavailable(name, DEVICE) or slow or lacking(needed, DEVICE)
        start = time.perf_counter()
        if not failure and name == OURS:
            call()  # an error of ours fails the benchmark
        elif not failure:
            failure = attempt(call)
        spent[name] = time.perf_counter() - start
        if not failure and spent[name] > max(PATIENCE, 5 * spent[OURS]) and not peers.compiles(name, DEVICE):
            failure = f"its first call took {spent[name]:.0f} s, ours {spent[OURS]:.1f} s"
        if failure:
            rows[name] = {"failed": failure}
        else:
            rows[name], measurable[name] = {}, call
        clear(arguments)
    if not measurable:
        return rows, measurable, arguments
    floor = Floor(case.shape, dtype, DEVICE)
    times = interleaved(measurable | floor.calls, N_ROUNDS, DEVICE == "cuda", warm_up=False, budget=BUDGET)
    least = products(case) * floor.seconds_of_product(times)
    for name in measurable:
        rows[name] |= {
            "ms": spread(1e3 * t for t in times[name]),
            "times ours": spread((theirs / ours for theirs, ours in zip(times[name], times[OURS])), 3),
            "over floor": round(statistics.median(times[name]) / least, 3),
            "rounds": len(times[name]),
        }
    return rows, measurable, arguments


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in _contenders(case)], ids=str)
def test_head(benchmark, case, name):
    rows, calls, arguments = measure(case)
    row = rows[name]
    about = {
        "figure": case.figure,
        "case": case.name,
        "operation": case.operation,
        "dtype": case.dtype,
        "shape": case.shape,
        "contender": name,
    }
    benchmark.extra_info |= about | row
    benchmark.group = f"{case}: N, K, D, V = {case.shape}"
    if "failed" in row:
        benchmark.pedantic(lambda: None)  # puts the row, and the reason why it is empty, into the JSON
        return
    benchmark.extra_info |= memory(lambda: benchmark.pedantic(calls[name], rounds=1), arguments)
