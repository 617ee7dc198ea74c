"""The backends that compute the head, and the choice between them.

`reference` is plain differentiable torch and defines every result. Each other backend is a module with the functions of
`Kernels` below: it computes values and gradients and does not use autograd.

(The package is called `_backends` because `fused_mos.backends` is the public function.)
"""

import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import reference, tiled
from .sums import Sum
from .tracing import assume_constant_result, has_memory
from .transform import IDENTITY, Transform

if TYPE_CHECKING:
    from .cuda import Decoder


class Kernels(Protocol):
    """The functions that a fused backend's module defines.

    Shapes: N tokens, K experts, R = N·K rows, D features, V classes. Logits l are transform(z·E + b) everywhere, and
    gradients include the derivative of the transform.

    All tensors are contiguous; latent, weight and bias share one floating dtype. Statistics, nll and log-probabilities
    are returned in `accumulation_dtype`, gradients in the dtype of their input. `needs` says which gradients of
    (latent, prior_logits, weight, bias) are wanted; the others are empty tensors.

    A row's log-sum-exp is kept as two numbers, L = maximum + log_total: rounding a large L to one number would spoil
    exp(l − L).
    """

    def row_statistics(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, transform: Transform = IDENTITY
    ):
        """(R, D), (V, D), (V,), (R,) -> maximum, log_total and target_logit, (R,) each. The last is NaN where the
        target is no class."""

    def row_entropy(self, rows, weight, bias, target, transform: Transform = IDENTITY):
        """The results of `row_statistics` and the entropy −Σ_v p_v log p_v of each row's softmax, (R,); one product."""

    def rows_backward(
        self,
        rows,
        weight,
        bias,
        target,
        maximum,
        log_total,
        grad_lse,
        grad_target,
        needs: tuple[bool, bool, bool],
        transform: Transform = IDENTITY,
    ):
        """Gradients of (rows, weight, bias) for dl = grad_lse·exp(l − L) − grad_target·1[v = target]."""

    def nll(self, latent, prior_logits, weight, bias, target, ignore_index: int, transform: Transform = IDENTITY):
        """nll (N,), 0 where the target is ignored, and maximum, log_total and target_logit (N, K)."""

    def nll_backward(
        self,
        grad,
        latent,
        prior_logits,
        weight,
        bias,
        target,
        maximum,
        log_total,
        target_logit,
        ignore_index,
        filter_eps: float,
        needs,
        transform: Transform = IDENTITY,
    ):
        """Gradients of (latent, prior_logits, weight, bias) for a grad (N,) of nll."""

    def gradient_in_forward_pays(self, n_tokens: int, n_experts: int, weight: Tensor, bias: Tensor | None) -> bool:
        """True if `nll_with_gradients` is cheaper than `nll` and `nll_backward`."""

    def nll_with_gradients(
        self,
        latent,
        prior_logits,
        weight,
        bias,
        target,
        ignore_index: int,
        filter_eps: float,
        mean: bool,
        needs,
        transform: Transform = IDENTITY,
        loss_weights: Tensor | None = None,
    ):
        """The loss (), a divisor (), nll (N,), maximum, log_total and target_logit (N, K), and the gradients of
        divisor·loss.

        The loss is the sum or mean of nll. With `loss_weights` (3, N), it is the sum of
        c·nll + λ Σ_k π_k L_k + ζ Σ_k π_k L_k², where c, λ and ζ are the rows of `loss_weights`: finite numbers of any
        sign, 0 for ignored tokens. `mean` must then be False, and nothing is filtered.
        """

    def scaled(self, gradients, factor: Tensor, divisor: Tensor):
        """The gradients times factor / divisor, or 0 if the divisor is 0. Only for `has_own_small_kernels`."""

    def normalisers(self, latent, prior_logits, weight, bias, transform: Transform = IDENTITY):
        """log π, maximum and log_total, (N, K) each."""

    def log_prob(self, latent, log_prior, weight, bias, maximum, log_total, transform: Transform = IDENTITY) -> Tensor:
        """Log-probabilities of all classes, (N, V)."""

    def log_prob_backward(
        self, grad, latent, log_prior, weight, bias, maximum, log_total, needs, transform: Transform = IDENTITY
    ):
        """Gradients of (latent, prior_logits, weight, bias) for an arbitrary grad (N, V)."""

    def predict(self, latent, log_prior, weight, bias, maximum, log_total, transform: Transform = IDENTITY) -> Tensor:
        """The most probable class (N,) of the mixture, int64."""

    # The next three are optional; the function `one_sweep_pays` below looks for them.

    def one_sweep_pays(self, n_tokens: int, n_experts: int, n_classes: int, n_features: int) -> bool:
        """True if the next two are cheaper than `normalisers` followed by `log_prob` or `predict`."""

    def log_prob_and_normalisers(self, latent, prior_logits, weight, bias, transform: Transform = IDENTITY):
        """Log-probabilities (N, V), and maximum and log_total (N, K), in one product."""

    def predict_in_one_sweep(self, latent, prior_logits, weight, bias, transform: Transform = IDENTITY) -> Tensor:
        """The most probable class (N,) of the mixture, int64, in one product."""

    def mixture_sum(
        self, sum_: Sum, latent, log_prior, weight, bias, maximum, log_total, transform: Transform = IDENTITY
    ):
        """A sum over the classes of `weight`, which may be only a part of all, in one product.

        Returns the sum (N,); the contribution to s (see `Sum`) with q = π exp(l − L) / p, (N, K); and the most probable
        class and its log p, (N,) each.
        """

    def mixture_sum_backward(
        self,
        sum_: Sum,
        grad,
        grad_target,
        target,
        s,
        grad_lse,
        latent,
        log_prior,
        weight,
        bias,
        maximum,
        log_total,
        needs,
        transform: Transform = IDENTITY,
    ):
        """Gradients of (latent, prior_logits, weight, bias), in three products.

        The gradient of log p is G[n,v] = grad[n] ∂sum/∂log p_v + grad_target[n] 1[v = target[n]]. With s = Σ_v G q,
        which is given: dl = G q − (s − grad_lse) exp(l − L) and da = s − π Σ_k s.
        """

    def choose_rows(self, latent, prior_logits, seed: Tensor) -> Tensor:
        """Draw one expert per token from the prior and return its latent vector, (N, D). The seed is (1,) int64."""

    def sample(self, rows, weight, bias, transform: Transform, seed: Tensor) -> Tensor:
        """Draw one class (R,) from each row's softmax(l), int64. The draws are independent of those of `choose_rows`
        with the same seed."""


def _why_missing(module: str, error: ImportError) -> str:
    """The reason why a compiled module is missing: the one that setup.py recorded when it could not build it, or that
    nothing was compiled in this clone."""
    package = Path(__file__).parent.parent
    recorded = package / f"{module}_missing.txt"
    if recorded.exists():
        return recorded.read_text().strip()
    if any(package.glob(f"{module}.*")):
        return f"the native kernels cannot be loaded: {error}"
    return f"{package}, which Python imports, has no compiled {module}; pip install -e . in its clone compiles it there"


NAMES = ("auto", "reference", "tiled", "cpu", "triton", "cuda")


@cache
def _load(name: str) -> str | None:
    """Import a backend's module; return None, or the reason why it cannot be imported. Called at first use, since
    importing Triton takes several times as long as the rest of the package."""
    if name in ("triton", "cuda") and not (torch.version.cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it is for NVIDIA GPUs, but this torch ({torch.__version__}) is built without CUDA"
    if name == "cuda" and (reason := _load("triton")):  # cuda falls back to triton
        return reason
    try:
        importlib.import_module(f".{name}", __name__)
    except ImportError as error:
        if name == "triton":
            return f"triton cannot be loaded: {error} (pip install triton)"
        return _why_missing(f"_{name}", error)
    return None


@assume_constant_result
def why_absent(name: str) -> str | None:
    """None if the backend can be loaded here, else the reason why not. Not for the two backends in plain torch."""
    return _load(name)


def kernels(name: str) -> ModuleType:
    """The module of a backend that can be loaded."""
    # torch.compile would freeze a table of modules as it was before the first use
    if name == "cpu":
        from . import cpu

        return cpu
    if name == "triton":
        from . import triton

        return triton
    if name == "cuda":
        from . import cuda

        return cuda
    return tiled


def backends() -> dict[str, str]:
    """Backends by name, each with "available" or the reason why it is not available on this machine."""
    compiled = {name: why_absent(name) or kernels(name).availability() for name in ("cpu", "triton", "cuda")}
    return {"reference": "available", "tiled": "available"} | compiled


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve "auto" to the fastest backend for `device` and `dtype`, and check any other name.

    Raises ValueError for an unknown name or a device that the backend does not support, TypeError for a dtype that it
    does not support, RuntimeError if it is not available here.
    """
    if name == "auto":
        fastest = "cpu" if device.type == "cpu" else "triton"
        if why_absent(fastest) or dtype not in kernels(fastest).DTYPES:
            return "tiled"
        return "tiled" if fastest == "triton" and kernels(fastest).unsupported(device) else fastest
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name in ("reference", "tiled"):
        return name
    if reason := why_absent(name):
        raise _not_available(name, reason)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' is for tensors on the CPU, but latent is on {device}")
    if name in ("triton", "cuda") and (reason := kernels(name).unsupported(device)):
        if not (told := kernels(name).availability()).startswith("available"):
            raise _not_available(name, told)
        raise ValueError(f"backend {name!r} cannot be used: {reason}")
    if dtype not in kernels(name).DTYPES:
        raise TypeError(f"backend {name!r} computes {', '.join(map(str, kernels(name).DTYPES))}, got {dtype}")
    return name


def _not_available(name: str, reason: str) -> RuntimeError:
    return RuntimeError(f"backend {name!r} is not available: {reason}; fused_mos.backends() lists those that are")


def has_own_small_kernels(name: str) -> bool:
    """True if the backend also fuses the small operations around the products, since its device is faster than the host
    can launch them. `nll_with_gradients` then computes losses without gradients too, and `scaled` scales gradients."""
    return name in ("triton", "cuda")


def one_sweep_pays(name: str, n_tokens: int, n_experts: int, n_classes: int, n_features: int) -> bool:
    """True if the backend can compute the mixture and its normalisers in one product, and does so at these sizes."""
    pays = getattr(kernels(name), "one_sweep_pays", None)
    return pays is not None and pays(n_tokens, n_experts, n_classes, n_features)


def decoder(name: str, latent: Tensor, *others: Tensor | None) -> "Decoder | None":
    """The kernels that compute the mixture of a few tokens in one pass over `weight`. None if the backend has no such
    kernels, a gradient is wanted, or the tensors have no memory whose address they could take."""
    inputs = (latent, *others)
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return getattr(kernels(name), "DECODER", None) if has_memory(latent) and not wanted else None


__all__ = [
    "IDENTITY",
    "NAMES",
    "Kernels",
    "Sum",
    "Transform",
    "backends",
    "decoder",
    "kernels",
    "one_sweep_pays",
    "reference",
    "resolve",
    "why_absent",
]
