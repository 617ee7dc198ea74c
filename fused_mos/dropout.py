"""The dropouts of AWD-LSTM (Merity et al. 2017, section 4), as functions of a tensor."""

from typing import Protocol

import torch
from torch import Tensor, nn

from .ops.direct import is_ordinary


class EmbeddingLike(Protocol):
    """An nn.Embedding, or a module that acts as one, such as a shard of its rows."""

    num_embeddings: int

    def __call__(self, tokens: Tensor, /) -> Tensor: ...


def locked_dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Drop features with one mask for all time steps: x (T, B, …) gets a mask (1, B, …), scaled by 1/(1 − p).

    A tensor with fewer than three dimensions has no time axis, and each row gets its own mask.
    """
    if not training or p == 0:
        return x
    shape = (1, *x.shape[1:]) if x.dim() >= 3 else x.shape
    return x * _mask(x, shape, p)


def embedding_dropout(embedding: EmbeddingLike, tokens: Tensor, p: float, training: bool = True) -> Tensor:
    """Look `tokens` up in an embedding (V, D) with whole words dropped. Returns (*tokens.shape, D).

    Each row of the vocabulary is dropped or scaled by 1/(1 − p), the same for all batch entries and time steps.
    """
    embedded = embedding(tokens)
    if not training or p == 0:
        return embedded
    mask = _mask(embedded, (embedding.num_embeddings, 1), p)
    return embedded * torch.nn.functional.embedding(tokens, mask)


MIN_FAST_NUMBERS = 2**16


def weight_dropout(weight: Tensor, p: float, training: bool = True) -> Tensor:
    """F.dropout of a weight, faster for large weights on a CPU, where bernoulli_ takes as long as a whole LSTM layer.

    There each value gets 16 random bits. The rate is off by 2⁻¹⁶ at most, and the scale is that of the actual rate.
    """
    n = weight.numel()
    if not training or p == 0 or n < MIN_FAST_NUMBERS or weight.device.type != "cpu" or not is_ordinary((weight,)):
        return nn.functional.dropout(weight, p, training)
    dropped = min(round(p * 2**16), 2**16 - 1)  # out of 2¹⁶ random values
    bits = (
        torch.empty((n + 3) // 4, dtype=torch.int64, device=weight.device).random_(-(2**63), None).view(torch.int16)[:n]
    )
    kept = bits.view(weight.shape) >= dropped - 2**15
    return weight * kept.to(weight.dtype).mul_(2**16 / (2**16 - dropped))


def _mask(like: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)


def check_probability(name: str, p: float) -> float:
    """Return `p`. Raises ValueError unless 0 ≤ p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")
    return p


class LockedDropout(nn.Module):
    """`locked_dropout` as a module."""

    def __init__(self, p: float):
        super().__init__()
        self.p = check_probability("p", p)

    def forward(self, x: Tensor) -> Tensor:
        return locked_dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
