"""csrc/cuda: decoding, that is inference for a few tokens, in one pass over the embedding. All else is the Triton
backend's.

At generation time the work is to read the embedding, once if the logits stay on the chip until their normalisers are
known. A kernel of one launch does that for 16-bit inputs with N·K ≤ 128 rows; what it writes is the log-probabilities,
or the best k of them, or samples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _cuda  # type: ignore[attr-defined]  # compiled, without stubs
from . import triton
from .launching import NativeKernels, limits, on, too_new
from .transform import Transform
from .triton import (  # noqa: F401  (what this backend shares with that one)
    DTYPES,
    choose_rows,
    gradient_in_forward_pays,
    log_prob,
    log_prob_backward,
    mixture_sum,
    mixture_sum_backward,
    nll,
    nll_backward,
    nll_with_gradients,
    normalisers,
    predict,
    row_entropy,
    row_statistics,
    rows_backward,
    scaled,
)


class Decoder(NativeKernels):
    """The decode kernels."""

    def plan(self, mode: str, latent: Tensor, weight: Tensor, bias: Tensor | None, k: int = 0) -> Any:
        """How these inputs, latent (N, K, D) and contiguous, would be decoded; None where only the Triton backend
        can."""
        n, n_experts, d = latent.shape
        if not 1 <= n * n_experts <= self.native.MAX_ROWS or latent.dtype not in (torch.bfloat16, torch.float16):
            return None
        bias_address = 0 if bias is None else bias.data_ptr()
        try:
            return self.native.Decode(
                getattr(self.native.DecodeMode, mode),
                latent.dtype == torch.bfloat16,
                n,
                n_experts,
                d,
                weight.shape[0],
                latent.data_ptr(),
                weight.data_ptr(),
                bias_address,
                *self.limits(latent.device),
                k,
            )
        except ValueError:  # of what it cannot do, such as an odd D, or a latent that fills the shared memory
            return None

    def log_prob(self, latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """(N, K, D), (N, K) float32, … -> log-probabilities (N, V), or None."""
        if (decode := self.plan("LogProb", latent, weight, bias)) is None:
            return None
        result = log_prior.new_empty(latent.shape[0], weight.shape[0])
        self._launch(decode.log_prob, decode, log_prior, result)
        return result

    def topk(
        self, latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor] | None:
        """The k largest log-probabilities (N, k), descending, and their classes, or None."""
        if (decode := self.plan("TopK", latent, weight, bias, k)) is None:
            return None
        values = log_prior.new_empty(latent.shape[0], k)
        indices = torch.empty(values.shape, dtype=torch.int64, device=latent.device)
        self._launch(decode.topk, decode, log_prior, values, indices)
        return values, indices

    def sample(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, seed: Tensor
    ) -> Tensor | None:
        """One class (R,) from each row's softmax(l / temperature), which depends on the seed (1,), int64, the row and
        the class alone; or None."""
        latent = rows.contiguous()[:, None]
        if (decode := self.plan("Sample", latent, weight, bias)) is None:
            return None
        result = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        self._launch(decode.sample, decode, 1 / temperature, seed, result)
        return result

    def _launch(self, function: Callable[..., None], decode: Any, *arguments: Tensor | float) -> None:
        """With a workspace, which may be freed as soon as the kernel is queued: what takes its memory next is queued
        behind it."""
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        workspace = torch.empty(decode.workspace_bytes, dtype=torch.uint8, device=device)
        with self.on(device) as stream:
            function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in (*arguments, workspace)), stream)


def sample(rows: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, seed: Tensor) -> Tensor:
    """As in the Triton backend, by the decode kernel where that can: it knows no soft cap."""
    drawn = None if transform.softcap else DECODER.sample(rows, weight, bias, transform.temperature, seed)
    return triton.sample(rows, weight, bias, transform, seed) if drawn is None else drawn


def availability() -> str:
    """What `fused_mos.backends()` says of this backend: "available …", or why not."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return (
        unsupported(torch.device("cuda", torch.cuda.current_device()))
        or "available; auto does not choose it, for no recorded run shows it right and faster"
    )


def unsupported(device: torch.device) -> str | None:
    """Why tensors on this device cannot be computed here; None where they can."""
    if device.type != "cuda":
        return f"it is for CUDA tensors, but latent is on {device}"
    return triton.unsupported(device) or (_TOO_NEW if torch.cuda.is_available() else None)


DECODER = Decoder(_cuda, limits, on)
_TOO_NEW = too_new(*_cuda.versions())  # asked once: a graph that is traced cannot ask
