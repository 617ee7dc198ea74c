"""What the benchmarks share: the problem, what a user would write instead of the head, and timing in turns."""

import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def inputs(n: int, k: int, d: int, v: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """latent, prior_logits, weight, target, bias of a freshly initialised head, all requiring grad but the target."""
    options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    return [
        torch.randn(n, k, d, **options).tanh_().to(dtype).requires_grad_(),
        torch.randn(n, k, **options).requires_grad_(),
        torch.rand(v, d, **options).mul_(0.2).sub_(0.1).to(dtype).requires_grad_(),
        torch.randint(0, v, (n,), **options),
        torch.zeros(v, dtype=dtype, device=device, requires_grad=True),
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


def softmax_cross_entropy(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """K = 1 as it is usually written."""
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(z[:, 0], w, b), y)


def cut_cross_entropy(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """Cut cross-entropy over N·K rows. It has no bias: less work than ours."""
    from cut_cross_entropy import linear_cross_entropy

    n, k, d = z.shape
    options = {"impl": "cce" if z.is_cuda else "torch_compile"}
    if k == 1:
        return linear_cross_entropy(z[:, 0], w, y, **options)
    nll = linear_cross_entropy(z.view(n * k, d), w, y.repeat_interleave(k), reduction="none", **options)
    return -torch.logsumexp(torch.log_softmax(a, 1) - nll.view(n, k), 1).mean()


def liger(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy: for K > 1 the mean over N·K rows, which is not a mixture, since it forms its
    gradients before a weight of the rows could be known."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    n, k, d = z.shape
    return LigerFusedLinearCrossEntropyLoss()(w, z.view(n * k, d), y.repeat_interleave(k), b)


def unavailable(name: str) -> str | None:
    """Why a contender of this name cannot run here; None where it can."""
    if name == "five lines" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 and later do)"
    if name == "cut-cross-entropy" and importlib.util.find_spec("cut_cross_entropy") is None:
        return "not installed (pip install --no-deps cut-cross-entropy)"
    if name == "Liger" and importlib.util.find_spec("liger_kernel") is None:
        return "not installed (pip install --no-deps liger-kernel)"
    return None


def seconds(call: Callable[[], object], on_gpu: bool = False, before: Callable[[], object] | None = None) -> float:
    """On a GPU from when its first kernel could start until its last has ended, the host's time to get there included; unless `before`
    keeps the device busy for longer."""
    if before:
        before()
    if on_gpu:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step(loss: Callable[..., Tensor], arguments: list[Tensor]) -> None:
    """Forward and backward, into fresh gradients."""
    for tensor in arguments:
        tensor.grad = None
    loss(*arguments).backward()


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, on_gpu: bool = False, before: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, all in turns, `rounds` times after a warm-up, so that ratios hold on a noisy machine."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            elapsed = seconds(call, on_gpu, before)
            if turn:
                times[name].append(elapsed)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}
