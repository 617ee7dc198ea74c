"""The head, forward + backward, against what a user would write instead: pytest benchmarks --benchmark-only.

Every contender runs in one process, in turns, so that ratios hold on a noisy machine. Each row's extra_info has
the ratio to `reference` and the time over the floor: three products at the best rate that torch.mm reaches here.
"""

import statistics
import time

import pytest
import torch

from fused_mos import functional as F

SHAPES = {"ptb": (210, 15, 280, 10_000), "softmax": (3150, 1, 280, 10_000)}  # N, K, D, V
ROUNDS = 5


def _five_lines(z, a, w, y, b):
    """A lean MoS of torch's own parts (torch ≥ 2.13): a fused linear cross-entropy over N·K rows."""
    n, k, d = z.shape
    nll = torch.nn.functional.linear_cross_entropy(z.view(n * k, d), w, y.repeat_interleave(k), linear_bias=b, reduction="none")
    return -torch.logsumexp(torch.log_softmax(a, 1) - nll.view(n, k), 1).mean()


CONTENDERS = {
    "reference": lambda *args: F.mos_nll_loss(*args, backend="reference"),
    "tiled": lambda *args: F.mos_nll_loss(*args, backend="tiled"),
    "tiled, recomputing": lambda *args: F.mos_nll_loss(*args, backend="tiled", reduction="none").mean(),
    "linear_cross_entropy": _five_lines,
}


def _inputs(n, k, d, v):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, k, d, generator=generator).tanh_().requires_grad_(),
        torch.randn(n, k, generator=generator).requires_grad_(),
        torch.empty(v, d).uniform_(-0.1, 0.1, generator=generator).requires_grad_(),
        torch.randint(0, v, (n,), generator=generator),
        torch.zeros(v, requires_grad=True),
    ]


def _floor(n, k, d, v) -> float:
    """Seconds of z·Eᵀ, P·E and Pᵀ·z at the best of their measured rates."""
    z, e, p = torch.randn(n * k, d), torch.randn(v, d), torch.randn(n * k, v)
    return 3 * min(_seconds(call) for call in (lambda: torch.mm(z, e.t()), lambda: torch.mm(p, e), lambda: torch.mm(p.t(), z)) for _ in range(3))


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _step(call, inputs) -> None:
    for tensor in inputs:
        tensor.grad = None
    call(*inputs).backward()


@pytest.fixture(scope="module")
def interleaved():
    """Median seconds by shape and contender, measured once: all contenders in turns, ROUNDS times after a warm-up."""
    medians = {}
    for shape in SHAPES:
        inputs = _inputs(*SHAPES[shape])
        runnable = {name: call for name, call in CONTENDERS.items() if _unavailable(name) is None}
        times = {name: [] for name in runnable}
        for turn in range(ROUNDS + 1):
            for name, call in runnable.items():
                seconds = _seconds(lambda: _step(call, inputs))
                if turn:
                    times[name].append(seconds)
        medians[shape] = {name: statistics.median(values) for name, values in times.items()} | {"floor": _floor(*SHAPES[shape])}
    return medians


def _unavailable(name: str) -> str | None:
    if name == "linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 and later do)"
    return None


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward(benchmark, interleaved, shape, name):
    if reason := _unavailable(name):
        pytest.skip(reason)
    medians = interleaved[shape]
    benchmark.group = f"{shape}: N, K, D, V = {SHAPES[shape]}, float32, forward + backward"
    benchmark.extra_info |= {
        "speed over reference": round(medians["reference"] / medians[name], 2),
        "time over floor": round(medians[name] / medians["floor"], 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(f"\n{shape:8} {name:22} {medians['reference'] / medians[name]:5.2f} x reference's speed, {medians[name] / medians['floor']:5.2f} x floor")
    inputs = _inputs(*SHAPES[shape])
    benchmark.pedantic(_step, (CONTENDERS[name], inputs), rounds=ROUNDS, warmup_rounds=1)
