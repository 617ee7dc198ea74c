"""Time the LSTM layers of the paper's models on a CPU, in a minute:

    python -m benchmarks.cpu_lstm

For each layer, our kernels with float32 and bfloat16 products and torch.lstm run on the same weights, in turns. Times
are for the whole layer, including the products over all steps, without dropped weights. Shows milliseconds and speedups
over torch.lstm, each as median (minimum–maximum), and the fraction of the float32 multiply-add peak that our float32
forward pass reaches.
"""

import statistics
import time
from collections.abc import Callable

import torch
import tyro

from fused_mos import _cpu  # type: ignore[attr-defined]  # compiled, without stubs
from fused_mos.lm import cpu_recurrent

from .gpu_lstm import LAYERS, STEPS

Calls = dict[tuple[str, str], Callable[[], object]]


def main() -> None:
    tyro.cli(measure, prog="python -m benchmarks.cpu_lstm", description=__doc__)


def measure(rounds: int = 7) -> None:
    """Print the times.

    Args:
        rounds: How often to measure each call.
    """
    n_threads = torch.get_num_threads()
    peak = statistics.median(_cpu.peak_gflops(n_threads, False) for _ in range(rounds))
    print(f"{_cpu.instruction_set()}, {n_threads} threads, {peak:.0f} GFLOP/s of float32 multiply-adds")
    for model, (columns, sizes) in LAYERS.items():
        for n_features, width in zip(sizes, sizes[1:]):
            times = _in_turns(_calls(columns, n_features, width), rounds)
            gflop = 2 * STEPS * columns * 4 * width * (n_features + width) / 1e9
            share = gflop / statistics.median(times["float32", "forward"]) / peak
            print(f"{model} {n_features} -> {width}: {share:.0%} of the peak in the forward pass")
            for (name, which), seconds in times.items():
                ratios = [peer / ours for peer, ours in zip(times["torch.lstm", which], seconds)]
                print(f"  {name:10}  {which:20}  {_spread([1e3 * s for s in seconds], 1)} ms  {_spread(ratios, 2)} ×")


def _calls(columns: int, n_features: int, width: int) -> Calls:
    layer = torch.nn.LSTM(n_features, width)
    x = torch.randn(STEPS, columns, n_features, requires_grad=True)
    hidden = torch.zeros(1, columns, width), torch.zeros(1, columns, width)
    weights = list(layer.parameters())
    grad = torch.randn(STEPS, columns, width)
    layers: dict[str, Callable[[], torch.Tensor]] = {
        "torch.lstm": lambda: layer(x, hidden)[0],
        "float32": lambda: cpu_recurrent.lstm(x, hidden, *weights, None)[0],
        "bfloat16": lambda: cpu_recurrent.lstm(x, hidden, *weights, torch.bfloat16)[0],
    }

    def both(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), [x, *weights], grad)

    calls: Calls = {}
    for name, forward in layers.items():
        calls[name, "forward"] = forward
        calls[name, "forward and backward"] = both(forward)
    return calls


def _in_turns(calls: Calls, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call in each round, after one to warm up."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):6.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    main()
