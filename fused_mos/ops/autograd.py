"""What the ops share: results without values, for fake kernels, and gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backends.reference import accumulation_dtype


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised contiguous gradients, of no elements where not needed: what the ops promise their callers."""
    like = next(tensor for tensor in inputs if tensor is not None)
    tensors = (like if tensor is None else tensor for tensor in inputs)
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(tensors, needs))


def empty_statistics(latent: Tensor, count: int) -> list[Tensor]:
    """Uninitialised (N, K) tensors of the accumulation dtype."""
    return [latent.new_empty(latent.shape[:2], dtype=accumulation_dtype(latent.dtype)) for _ in range(count)]


def as_gradients(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs))


def refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused MoS ops cannot be differentiated twice (create_graph=True); use backend='reference' for that"
        )
