"""What the benchmarks share: the problem, what a user would write instead of the head, and timing in turns."""

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def inputs(n: int, k: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """latent, prior_logits, weight, target, bias of a freshly initialised head, all requiring grad but the target."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, k, d, generator=generator).tanh_().to(dtype).requires_grad_(),
        torch.randn(n, k, generator=generator).requires_grad_(),
        torch.empty(v, d).uniform_(-0.1, 0.1, generator=generator).to(dtype).requires_grad_(),
        torch.randint(0, v, (n,), generator=generator),
        torch.zeros(v, dtype=dtype, requires_grad=True),
    ]


def eager(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """The mixture as its equations stand: K distributions of V words for every token."""
    log_softmax = torch.log_softmax(torch.nn.functional.linear(z, w, b), -1)
    at_target = log_softmax.gather(2, y[:, None, None].expand(-1, z.shape[1], 1))[..., 0]
    return -torch.logsumexp(torch.log_softmax(a, 1) + at_target, 1).mean()


def five_lines(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """A lean MoS of torch's own parts (torch ≥ 2.13): a fused linear cross-entropy over N·K rows."""
    n, k, d = z.shape
    nll = torch.nn.functional.linear_cross_entropy(z.view(n * k, d), w, y.repeat_interleave(k), linear_bias=b, reduction="none")
    return -torch.logsumexp(torch.log_softmax(a, 1) - nll.view(n, k), 1).mean()


def unavailable(name: str) -> str | None:
    """Why a contender of this name cannot run here; None where it can."""
    if name == "five lines" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 and later do)"
    if name == "cut-cross-entropy" and importlib.util.find_spec("cut_cross_entropy") is None:
        return "not installed (pip install --no-deps cut-cross-entropy)"
    return None


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step(loss: Callable[..., Tensor], arguments: list[Tensor]) -> None:
    """Forward and backward, into fresh gradients."""
    for tensor in arguments:
        tensor.grad = None
    loss(*arguments).backward()


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, all in turns, `rounds` times after a warm-up, so that ratios hold on a noisy machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            elapsed = seconds(call)
            if turn:
                times[name].append(elapsed)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}
