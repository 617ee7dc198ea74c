"""The CUDA backend: the Triton backend with native kernels (csrc/cuda) for decoding, which is inference for few tokens.

Decoding time is the time to read the embedding. The kernels read it once: the logits stay on the chip until their
normalisers are known. A single launch computes log-probabilities, the best k of them, or samples, for 16-bit inputs
with N·K ≤ 128 rows.
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
    """The kernels that decode in one pass over the embedding."""

    def plan(self, mode: str, latent: Tensor, weight: Tensor, bias: Tensor | None, k: int = 0) -> Any:
        """The launch plan for these inputs, with contiguous latent (N, K, D). None if only the Triton backend can
        decode them."""
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
        except ValueError:  # not supported: for example, an odd D, or latent vectors that exceed shared memory
            return None

    def log_prob(self, latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Log-probabilities (N, V) from latent (N, K, D) and log_prior (N, K) float32, or None if not supported."""
        if (decode := self.plan("LogProb", latent, weight, bias)) is None:
            return None
        result = log_prior.new_empty(latent.shape[0], weight.shape[0])
        self._launch(decode.log_prob, decode, log_prior, result)
        return result

    def topk(
        self, latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor] | None:
        """The k largest log-probabilities (N, k), descending, and their classes, or None if not supported."""
        if (decode := self.plan("TopK", latent, weight, bias, k)) is None:
            return None
        values = log_prior.new_empty(latent.shape[0], k)
        indices = torch.empty(values.shape, dtype=torch.int64, device=latent.device)
        self._launch(decode.topk, decode, log_prior, values, indices)
        return values, indices

    def sample(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, seed: Tensor
    ) -> Tensor | None:
        """Draw one class (R,) from each row's softmax(l / temperature), or return None if not supported. The random
        numbers depend only on the seed (1,) int64, the row and the class."""
        latent = rows.contiguous()[:, None]
        if (decode := self.plan("Sample", latent, weight, bias)) is None:
            return None
        result = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        self._launch(decode.sample, decode, 1 / temperature, seed, result)
        return result

    def _launch(self, function: Callable[..., None], decode: Any, *arguments: Tensor | float) -> None:
        """Launch with a workspace. It may be freed once the kernel is queued: the next user of its memory is queued
        behind the kernel."""
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        workspace = torch.empty(decode.workspace_bytes, dtype=torch.uint8, device=device)
        with self.on(device) as stream:
            function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in (*arguments, workspace)), stream)


def sample(rows: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, seed: Tensor) -> Tensor:
    """Sample with the decode kernel, or with the Triton backend if that is not supported or there is a soft cap."""
    drawn = None if transform.softcap else DECODER.sample(rows, weight, bias, transform.temperature, seed)
    return triton.sample(rows, weight, bias, transform, seed) if drawn is None else drawn


def availability() -> str:
    """This backend's entry in `fused_mos.backends()`: "available …", or the reason why not."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return (
        unsupported(torch.device("cuda", torch.cuda.current_device()))
        or "available; auto does not choose it, since no recorded run shows it to be correct and faster"
    )


def unsupported(device: torch.device) -> str | None:
    """None if this backend can compute on the device, else the reason why not."""
    if device.type != "cuda":
        return f"it is for CUDA tensors, but latent is on {device}"
    return triton.unsupported(device) or (_TOO_NEW if torch.cuda.is_available() else None)


DECODER = Decoder(_cuda, limits, on)
_TOO_NEW = too_new(*_cuda.versions())  # asked once, since a traced graph cannot ask
