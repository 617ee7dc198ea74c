"""What the ops share: results without values, for fake kernels, and gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .._backends.reference import accumulation_dtype


def fake_of(op: CustomOpDef) -> Callable[[Callable], Callable]:
    """Registers an op's fake kernel, which torch takes as soon as any of the tensors is on the meta device. It refuses
    others beside them, since its results would be memory that nobody has written."""

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
