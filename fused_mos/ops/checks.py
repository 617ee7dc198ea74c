"""Checks of the ops' arguments before a kernel takes their addresses: shapes, dtypes, devices and memory.

`functional` has checked all of this and more. But the ops can be called directly, and a wrong shape would read or write
foreign memory.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backends
from .._backends.reference import accumulation_dtype
from .._backends.transform import Transform
from .._inputs import check_shapes, check_target_shape, check_temperature


def operands(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor | None,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check the operands and return them contiguous. `prior_logits` is None for ops without a prior.

    Raises TypeError or ValueError for bad operands or a backend that cannot compute them, RuntimeError if the backend
    is not available or a tensor's storage was freed.
    """
    named = check_shapes(latent, prior_logits, weight, bias)
    # meta tensors have no addresses; the audit of the kernels runs the host's part with them
    if latent.device.type != "meta" and _backends.resolve(backend, latent.device, latent.dtype) != backend:
        raise ValueError(f"an op's backend must be named, got {backend!r}")
    for name, tensor in named.items():
        check_memory(name, tensor)
    given = latent, prior_logits, weight, bias
    return tuple(None if tensor is None else tensor.contiguous() for tensor in given)  # type: ignore[return-value]


def given_normalisers(
    latent: Tensor,
    log_prior: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    maximum: Tensor,
    log_total: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """`operands` with the normalisers that `Kernels.log_prob` takes."""
    latent, _, weight, bias = operands(latent, None, weight, bias, backend)
    statistics = {"log_prior": log_prior, "maximum": maximum, "log_total": log_total}
    log_prior, maximum, log_total = numbers(latent, latent.shape[:2], **statistics)
    return latent, log_prior, weight, bias, maximum, log_total


def transform(softcap: float, temperature: float = 1.0) -> Transform:
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or 0 for none, got {softcap}")
    return Transform(softcap, check_temperature(temperature))


def count(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    return k


def targets(target: Tensor, latent: Tensor) -> Tensor:  # (N,) int64
    check_target_shape(target, latent)
    check_memory("target", target)
    return target.contiguous()


def indices(index: Tensor, latent: Tensor) -> Tensor:  # (N, M) int64
    if index.dtype != torch.int64 or index.dim() != 2 or index.shape[0] != latent.shape[0]:
        wanted = f"(N, M) of torch.int64 with N = {latent.shape[0]}"
        raise ValueError(f"index must be {wanted}, got {tuple(index.shape)} of {index.dtype}")
    if index.device != latent.device:
        raise ValueError(f"index is on {index.device} but latent is on {latent.device}")
    check_memory("index", index)
    return index.contiguous()


def numbers(like: Tensor, shape: tuple[int, ...], **tensors: Tensor) -> list[Tensor]:
    """Check that tensors have `shape`, the device of `like` and the accumulation dtype, and return them contiguous."""
    dtype = accumulation_dtype(like.dtype)
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device} but the operands are on {like.device}")
        check_memory(name, tensor)
    return [tensor.contiguous() for tensor in tensors.values()]


def seeds(seed: Tensor, like: Tensor) -> Tensor:  # (1,) int64
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != like.device:
        found = f"{tuple(seed.shape)} of {seed.dtype} on {seed.device}"
        raise ValueError(f"seed must be (1,) of torch.int64 on {like.device}, got {found}")
    check_memory("seed", seed)
    return seed


def needed(needs: Sequence[bool], count: int, bias: Tensor | None) -> tuple[bool, ...]:
    """Check `needs`, whose last entry is that of the bias, and return it as a tuple."""
    if len(needs) != count:
        raise ValueError(f"needs must have {count} entries, got {len(needs)}")
    if needs[-1] and bias is None:
        raise ValueError("needs asks for the gradient of bias, which is None")
    return tuple(needs)


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise RuntimeError if a tensor is longer than its storage, as after `untyped_storage().resize_(0)`."""
    if tensor.numel() == 0:
        return
    last = tensor.storage_offset() + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    if (last + 1) * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise RuntimeError(f"{name} has no memory: its storage was freed")
