"""Baselines: losses that a user would write instead of the head. Each takes latent (N, K, D), prior_logits (N, K),
weight (V, D), target (N,) and bias (V,)."""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, nll_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def published(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """The paper's published code: K distributions of V words for every token, their mean, and its logarithm."""
    return nll_loss(torch.log(published_probabilities(z, a, w, b) + 1e-8), y)


def published_probabilities(z: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """(N, V), by the same code."""
    return (torch.softmax(linear(z, w, b), -1) * torch.softmax(a, -1).to(z.dtype)[..., None]).sum(1)


def log_sum_exp(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """The paper's equations in logarithms. The mixture is formed only for the target."""
    log_softmax = torch.log_softmax(linear(z, w, b), -1)
    at_target = log_softmax.gather(2, y[:, None, None].expand(-1, z.shape[1], 1))[..., 0]
    return -torch.logsumexp(torch.log_softmax(a, 1) + at_target, 1).mean()


def _five_lines(rows_nll: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """A lean MoS on top of any fused linear cross-entropy that returns the loss of each of N·K rows."""

    def loss(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
        n, k, d = z.shape
        nll = rows_nll(z.view(n * k, d), w, y.repeat_interleave(k), b)
        return -torch.logsumexp(torch.log_softmax(a, 1) - nll.view(n, k).float(), 1).mean()

    return loss


def _torch(rows: Tensor, w: Tensor, y: Tensor, b: Tensor, chunked: bool, reduction: str) -> Tensor:
    """PyTorch's own function. By default it forms all logits at once; `chunked` forms those of some rows at a time."""
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return torch.nn.functional.linear_cross_entropy(rows, w, y, linear_bias=b, reduction=reduction, options=options)


@_five_lines
def five_lines_cce(rows: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """Cut cross-entropy. It has no bias, which is less work than ours."""
    return _cce(rows, w, y, reduction="none")


@_five_lines
def five_lines_liger(rows: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """Liger's fused scaled cross-entropy, which on Hopper pads D to a multiple of 64. No bias: less work than ours."""
    return _liger("LigerFusedLinearScaledCrossEntropyFunction").apply(rows, w, y)


def liger_per_row(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """K = 1 by Liger's fused scaled cross-entropy, without the bias."""
    return _liger("LigerFusedLinearScaledCrossEntropyFunction").apply(z[:, 0], w, y).mean()


def liger(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """K = 1 by Liger's fused linear cross-entropy. (It forms its gradients before the weights of rows are known, so it
    cannot be part of a mixture.)"""
    return _liger("LigerFusedLinearCrossEntropyFunction").apply(z[:, 0], w, y, b)[0]


def _liger(name: str) -> type[torch.autograd.Function]:
    """A class of liger_kernel.ops. liger_kernel.transformers, which wraps it in a module, has failed on a GPU by
    circular imports."""
    return getattr(importlib.import_module("liger_kernel.ops"), name)


def quack(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """K = 1 by quack's chunked linear cross-entropy, without the bias."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if w.shape[0] % 128:
        raise ValueError(f"it is for vocabularies that are a multiple of 128, not {w.shape[0]:,}")
    return chunked_linear_cross_entropy(z[:, 0], w, y)


def plain(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """K = 1, as usually written."""
    return cross_entropy(linear(z[:, 0], w, b), y)


def linear_cross_entropy(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor, chunked: bool = False) -> Tensor:
    """K = 1 by PyTorch's F.linear_cross_entropy."""
    return _torch(z[:, 0], w, y, b, chunked, "mean")


def cut_cross_entropy(z: Tensor, a: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """K = 1 by cut cross-entropy, without the bias."""
    return _cce(z[:, 0], w, y)


def _cce(rows: Tensor, w: Tensor, y: Tensor, **options) -> Tensor:
    """Cut cross-entropy with exact gradients, like ours: no filtering."""
    from cut_cross_entropy import linear_cross_entropy as function

    return function(rows, w, y, impl="cce" if rows.is_cuda else "torch_compile", filter_eps=None, **options)


MIXTURE: dict[str, Loss] = {
    "published code": published,
    "log-sum-exp": log_sum_exp,
    "five lines, F.linear_cross_entropy": _five_lines(functools.partial(_torch, chunked=False, reduction="none")),
    "five lines, F.linear_cross_entropy, chunked": _five_lines(
        functools.partial(_torch, chunked=True, reduction="none")
    ),
    "five lines, cut-cross-entropy": five_lines_cce,
    "five lines, Liger": five_lines_liger,
}
SINGLE: dict[str, Loss] = {
    "F.linear + F.cross_entropy": plain,
    "F.linear_cross_entropy": linear_cross_entropy,
    "F.linear_cross_entropy, chunked": functools.partial(linear_cross_entropy, chunked=True),
    "cut-cross-entropy": cut_cross_entropy,
    "Liger": liger,
    "Liger, per row": liger_per_row,
    "quack": quack,
}
"""Peers at K = 1."""
COMPILED = {"published code": published, "log-sum-exp": log_sum_exp, "F.linear + F.cross_entropy": plain}
"""Peers that torch.compile may improve."""
PACKAGES = {
    "cut-cross-entropy": ("cut_cross_entropy", "pip install --no-deps cut-cross-entropy"),
    "Liger": ("liger_kernel", "pip install 'liger-kernel[cutedsl]'"),
    "quack": ("quack", "pip install quack-kernels"),
}
"""Part of a baseline's name -> the module that it imports, and how to install it."""


def compiled(name: str) -> Loss:
    return torch.compile(COMPILED[name], dynamic=False)


def compiles(name: str, device_type: str) -> bool:
    """True if the first call takes long because it runs torch.compile."""
    return name.endswith(", compiled") or "cut-cross-entropy" in name and device_type == "cpu"


def materialised(name: str, device_type: str) -> int:
    """Numbers that a baseline holds at once per token, expert and word, forward and backward."""
    name = name.removesuffix(", compiled").removeprefix("five lines, ")
    of_cce = 0 if device_type == "cuda" else 1
    return {
        "published code": 4,
        "log-sum-exp": 3,
        "F.linear + F.cross_entropy": 3,
        "F.linear_cross_entropy": 3,
        "cut-cross-entropy": of_cce,
    }.get(name, 0)


def unavailable(name: str, device_type: str) -> str | None:
    """None if the baseline can run here, else the reason why not."""
    if "linear_cross_entropy" in name and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 and later do)"
    if "chunked" in name and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no LinearCrossEntropyOptions (2.13 and later do)"
    for part, (module, command) in PACKAGES.items():
        if part in name:
            if importlib.util.find_spec(module) is None:
                return f"not installed ({command})"
            if device_type == "cpu" and part != "cut-cross-entropy":
                return "its kernels need a GPU"
    return None


def too_slow(device_type: str, dtype: torch.dtype) -> str | None:
    """None if baselines finish in reasonable time with this dtype, else the reason why not."""
    if device_type == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "torch multiplies bfloat16 without oneDNN on this processor, many times slower than float32"
    return None
