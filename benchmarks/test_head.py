"""The head, forward + backward, against what a user would write instead: pytest benchmarks --benchmark-only.

Every contender runs in one process, in turns, so that ratios hold on a noisy machine. Each row's extra_info has
the ratio to `reference` and the time over the floor: three products at the best rate that torch.mm reaches here.
"""

import pytest
import torch
from harness import five_lines, inputs, interleaved, medians, seconds, step, unavailable

from fused_mos import functional as F

SHAPES = {"ptb": (210, 15, 280, 10_000), "softmax": (3150, 1, 280, 10_000)}  # N, K, D, V
ROUNDS = 5
CONTENDERS = {
    "reference": lambda *args: F.mos_nll_loss(*args, backend="reference"),
    "auto": F.mos_nll_loss,
    "tiled": lambda *args: F.mos_nll_loss(*args, backend="tiled"),
    "tiled, recomputing": lambda *args: F.mos_nll_loss(*args, backend="tiled", reduction="none").mean(),
    "five lines": five_lines,
}


def _floor(n, k, d, v) -> float:
    """Seconds of z·Eᵀ, P·E and Pᵀ·z at the best of their measured rates."""
    z, e, p = torch.randn(n * k, d), torch.randn(v, d), torch.randn(n * k, v)
    return 3 * min(seconds(call) for call in (lambda: torch.mm(z, e.t()), lambda: torch.mm(p, e), lambda: torch.mm(p.t(), z)) for _ in range(3))


@pytest.fixture(scope="module")
def median_seconds():
    """Median seconds by shape and contender, measured once: all contenders in turns, ROUNDS times after a warm-up."""
    result = {}
    for shape, sizes in SHAPES.items():
        arguments = inputs(*sizes)
        calls = {name: lambda call=call: step(call, arguments) for name, call in CONTENDERS.items() if unavailable(name) is None}
        result[shape] = medians(interleaved(calls, ROUNDS)) | {"floor": _floor(*sizes)}
    return result


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward(benchmark, median_seconds, shape, name):
    if reason := unavailable(name):
        pytest.skip(reason)
    median = median_seconds[shape]
    benchmark.group = f"{shape}: N, K, D, V = {SHAPES[shape]}, float32, forward + backward"
    benchmark.extra_info |= {
        "speed over reference": round(median["reference"] / median[name], 2),
        "time over floor": round(median[name] / median["floor"], 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(f"\n{shape:8} {name:22} {median['reference'] / median[name]:5.2f} x reference's speed, {median[name] / median['floor']:5.2f} x floor")
    benchmark.pedantic(step, (CONTENDERS[name], inputs(*SHAPES[shape])), rounds=ROUNDS, warmup_rounds=1)
