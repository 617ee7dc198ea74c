"""Dropping rows from the backward products by responsibility.

The backward of a mixture's NLL is a cross-entropy over N·K rows with the weight g·r. Rows of negligible
weight change nothing that the dtype can show, so they are dropped before any product, and all backward
products shrink together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def kept_rows(responsibility: Tensor, row_weight: Tensor, filter_eps: float) -> Tensor | None:  # (R,), (R,)
    """Indices of the rows to keep, or None where that is all of them.

    Dropped are rows of weight 0 (ignored targets, responsibilities that underflow), which is exact, and rows
    of responsibility below `filter_eps`, which changes each token's gradient by at most K·eps of its own
    scale. A NaN weight is kept, so that it is seen in the gradient.

    How many rows are kept is a number that the host must wait for. Where waiting would stall a device, nothing is
    dropped unless `filter_eps` asks for it, nor while a CUDA graph is captured, which cannot wait.
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
    per_row: Sequence[Tensor],  # (R,) each: what `rows_backward` takes of each row
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows_backward` over the kept rows alone; the gradients of the others are 0."""
    kept_parts = (part[kept] for part in per_row)
    grad_rows, grad_weight, grad_bias = rows_backward(rows[kept], weight, bias, *kept_parts, needs)
    if needs[0]:
        grad_rows = torch.zeros_like(rows).index_copy_(0, kept, grad_rows)
    return grad_rows, grad_weight, grad_bias
