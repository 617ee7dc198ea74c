"""Logits of a few classes per token, and their gradients. Rows of the embedding are gathered for one block of tokens at
a time, so no (N, M, D) tensor exists.

Gradients of repeated classes are summed in a fixed order, whatever the number of threads. On a GPU, accumulating
index_put_ sorts the rows; on a CPU, the backward pass of an embedding distributes rows, not entries, over the threads.
"""

import torch
from torch import Tensor

from .products import spans
from .reference import accumulation_dtype, transformed
from .transform import Transform

BYTES = 32 * 2**20
"""Bytes of the rows gathered for a block of tokens, in float32."""


def _blocks(index: Tensor, n_features: int):
    bytes_of_token = max(4 * index.shape[1] * n_features, 1)
    return spans(index.shape[0], max(BYTES // bytes_of_token, 1))


def inside(index: Tensor, weight: Tensor) -> Tensor:
    """A mask of the entries that are classes."""
    return (index >= 0) & (index < weight.shape[0])


def gathered_logits(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (N, M) int64
    transform: Transform,
) -> Tensor:  # (N, K, M)
    """The transformed logits of each token's classes under each expert, NaN for entries that are no class."""
    dtype, is_class = accumulation_dtype(latent.dtype), inside(index, weight)
    rows = torch.where(is_class, index, 0)
    result = latent.new_empty(*latent.shape[:2], index.shape[1], dtype=dtype)
    for t in _blocks(index, latent.shape[2]):
        logits = latent[t].to(dtype) @ weight[rows[t]].to(dtype).transpose(1, 2)
        if bias is not None:
            logits += bias[rows[t]].to(dtype)[:, None]
        result[t] = torch.where(is_class[t][:, None], transformed(logits, transform), torch.nan)
    return result


def add_gathered_gradients(
    grad: Tensor,  # (N, K, M), gradient of the transformed logits
    logits: Tensor,  # (N, K, M): the transformed logits
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V, D)
    index: Tensor,  # (N, M) int64
    gradients: tuple[Tensor, Tensor, Tensor],  # (N, K, D), (V, D) and (V,), in grad's dtype, or empty
    needs: tuple[bool, bool, bool],
    transform: Transform,
) -> None:
    """Add the part that comes through the gathered logits to the gradients of (latent, weight, bias)."""
    softcap, temperature = transform
    is_class = inside(index, weight)
    rows = torch.where(is_class, index, 0)
    slope = (1 - (logits * (temperature / softcap)).square() if softcap else 1) / temperature
    grad = torch.where(is_class[:, None] & (grad != 0), grad * slope, 0)
    grad_latent, grad_weight, grad_bias = gradients
    for t in _blocks(index, latent.shape[2]):
        if needs[0]:
            grad_latent[t] += grad[t] @ weight[rows[t]].to(grad.dtype)
        if needs[1]:
            _add_rows(grad_weight, rows[t], grad[t].transpose(1, 2) @ latent[t].to(grad.dtype))
        if needs[2]:
            _add_rows(grad_bias[:, None], rows[t], grad[t].sum(1)[..., None])


def _add_rows(result: Tensor, rows: Tensor, values: Tensor) -> None:  # (V, D), (n, M), (n, M, D)
    """result[rows] += values."""
    if result.device.type == "cpu":
        result += torch.ops.aten.embedding_dense_backward(values.contiguous(), rows, result.shape[0], -1, False)
    else:
        result.index_put_((rows,), values, accumulate=True)
