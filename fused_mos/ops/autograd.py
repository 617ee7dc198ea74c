"""Shared by the ops: registration of fake kernels, and empty results and gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .._backends.reference import accumulation_dtype


def fake_of(op: CustomOpDef) -> Callable[[Callable], Callable]:
    """Register an op's fake kernel. torch calls it as soon as any tensor is on the meta device, so it raises ValueError
    if others are not: its results would be uninitialised memory."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def checked(*arguments: Any, **named: Any) -> Any:
            flat = (t for a in (*arguments, *named.values()) for t in (a if isinstance(a, list | tuple) else [a]))
            kinds = {t.device.type for t in flat if isinstance(t, Tensor)}
            if "meta" in kinds and len(kinds) > 1:
                raise ValueError(f"tensors must be on one device, got {', '.join(sorted(kinds))}")
            return function(*arguments, **named)

        return op.register_fake(checked)

    return register


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised contiguous gradients, as all ops return them: those that are not needed have no elements."""
    like = next(tensor for tensor in inputs if tensor is not None)
    tensors = (like if tensor is None else tensor for tensor in inputs)
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(tensors, needs))


def empty_statistics(latent: Tensor, count: int) -> list[Tensor]:
    """`count` uninitialised (N, K) tensors in the accumulation dtype."""
    return [latent.new_empty(latent.shape[:2], dtype=accumulation_dtype(latent.dtype)) for _ in range(count)]


def as_gradients(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if need else None for gradient, need in zip(gradients, needs))


def refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused MoS ops cannot be differentiated twice (create_graph=True); use backend='reference' for that"
        )
