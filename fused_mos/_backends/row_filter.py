"""Drops rows of small responsibility from the backward products.

The backward pass of a mixture's NLL is that of a cross-entropy over N·K rows with weights g·r. Rows of negligible
weight do not change the result within the precision of the dtype. Dropping them first makes every backward product
smaller.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def kept_rows(responsibility: Tensor, row_weight: Tensor, filter_eps: float) -> Tensor | None:  # (R,), (R,)
    """Indices of the rows to keep, or None to keep them all.

    Rows of weight 0 (ignored targets, responsibilities that underflow) are dropped, which is exact. So are rows of
    responsibility below `filter_eps`, which changes each token's gradient by at most K·eps of its own scale. Rows with
    a NaN weight are kept, so the NaN shows in the gradient.

    The host must wait to learn how many rows are kept. On devices where that would stall, rows are dropped only if
    `filter_eps` is set, and never during the capture of a CUDA graph, which cannot wait.
    """
    if responsibility.device.type != "cpu" and (filter_eps == 0 or torch.cuda.is_current_stream_capturing()):
        return None
    dropped = (row_weight == 0) | (responsibility < filter_eps)
    kept = torch.nonzero(~dropped).squeeze(1)
    return None if kept.numel() == dropped.numel() else kept


def backward_of_kept(
    rows_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    kept: Tensor,  # (M,)
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    per_row: Sequence[Tensor],  # (R,) each: per-row arguments of `rows_backward`
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows_backward` over the kept rows only. The gradients of the other rows are 0."""
    kept_parts = (part[kept] for part in per_row)
    grad_rows, grad_weight, grad_bias = rows_backward(rows[kept], weight, bias, *kept_parts, needs)
    if needs[0]:
        grad_rows = torch.zeros_like(rows).index_copy_(0, kept, grad_rows)
    return grad_rows, grad_weight, grad_bias
