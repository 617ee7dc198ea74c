"""Shared parts of the loops over tiles: logits in a workspace of fixed size, and the products that form gradients."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .products import product, spans
from .reference import accumulation_dtype
from .transform import Transform

WORKSPACE_BYTES = {"cpu": 32 * 2**20, "default": 256 * 2**20}
"""Bytes of the tile and its scratch copies, by device type. This bounds the extra memory of the backend."""

MAX_ROWS = 4096
"""Most rows of a tile: more would leave too few columns for efficient products."""

LOG2E = math.log2(math.e)


class Workspace:
    """One allocation per call that all tiles share: a new allocation per tile would cost page faults."""

    def __init__(self, like: Tensor, copies: int = 1):
        self.accumulation = accumulation_dtype(like.dtype)
        limit = WORKSPACE_BYTES.get(like.device.type, WORKSPACE_BYTES["default"])
        # besides the tile, 16-bit products need a float32 result or a 16-bit operand
        item = self.accumulation.itemsize * (1 if like.dtype == self.accumulation else 2)
        self.elements = max(limit // (item * copies), 1)
        self.like = like
        self._buffer: Tensor | None = None

    def rows(self, n_rows: int, group: int = 1) -> int:
        """Rows of a tile: a multiple of `group`, and at least one group."""
        return max(min(n_rows, MAX_ROWS) // group, 1) * group

    def columns(self, n_rows: int, n_classes: int) -> int:
        """Columns of a tile with `n_rows`, a multiple of 64 if possible."""
        columns = self.elements // max(n_rows, 1)
        return min(max(columns // 64 * 64, 64), n_classes)

    def tile(self, n_rows: int, n_columns: int) -> Tensor:
        if self._buffer is None or self._buffer.numel() < n_rows * n_columns:
            self._buffer = self.like.new_empty(n_rows * n_columns, dtype=self.accumulation)
        return self._buffer[: n_rows * n_columns].view(n_rows, n_columns)


def widened(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype to multiply in. On a CPU, 16-bit operands become float32.

    A GPU multiplies 16-bit operands into float32. A CPU would round each product to 16 bits, only some CPUs would gain
    speed, and most multiply float16 slowly.
    """
    if rows.is_cuda:
        return rows, weight, bias
    dtype = accumulation_dtype(rows.dtype)
    return rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def logits_(
    rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, transform: Transform, slopes: bool = False
) -> tuple[Tensor, Tensor | float]:
    """Compute the transformed logits in `out`. With `slopes` also return the derivative of the transform."""
    softcap, temperature = transform
    product(rows, weight.t(), out)
    if bias is not None:
        out.add_(bias)
    derivative: Tensor | float = 1 / temperature
    if softcap:
        out.div_(softcap).tanh_()
        if slopes:
            derivative = out.square().neg_().add_(1).div_(temperature)
    scale = (softcap or 1) / temperature
    return out if scale == 1 else out.mul_(scale), derivative


def times_slope_(dl: Tensor, slope: Tensor | float) -> None:
    if isinstance(slope, Tensor) or slope != 1:
        dl.mul_(slope)


def tiles(workspace: Workspace, n_rows: int, n_classes: int, group: int = 1) -> Iterator[tuple[slice, slice]]:
    """All tiles as (rows, columns), with the vocabulary as the inner loop."""
    height = workspace.rows(n_rows, group)
    width = workspace.columns(height, n_classes)
    for rows in spans(n_rows, height):
        for columns in spans(n_classes, width):
            yield rows, columns


def local_target(target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """The target's column in the tile, (R, 1), and a mask of the rows whose target is in the tile, (R, 1)."""
    local = target[:, None] - columns.start
    width = columns.stop - columns.start
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def exp_(tile: Tensor, maximum: Tensor, log_total: Tensor | None = None) -> Tensor:
    """exp((tile − maximum) − log_total) in place. They are subtracted one by one: the sum of a large maximum and a
    small log_total would lose the digits of log_total."""
    tile.sub_(maximum)
    if log_total is not None:
        tile.sub_(log_total)
    return tile.mul_(LOG2E).exp2_()


def zero_gradients(
    rows: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    def zeros(shape: torch.Size, needed: bool) -> Tensor:
        return rows.new_zeros(shape if needed else (0,), dtype=dtype)

    return zeros(rows.shape, needs[0]), zeros(weight.shape, needs[1]), zeros(weight.shape[:1], needs[2])


def add_gradients(
    tile: Tensor, rows: Tensor, weight: Tensor, columns: slice, gradients, needs: tuple[bool, bool, bool]
) -> None:
    """Add the contribution of one tile of dl to (dz of these rows, dE, db)."""
    grad_rows, grad_weight, grad_bias = gradients
    if needs[0]:
        product(tile.to(weight.dtype), weight[columns], grad_rows, accumulate=True)
    if needs[1]:
        product(tile.t().to(rows.dtype), rows, grad_weight[columns], accumulate=True)
    if needs[2]:
        grad_bias[columns] += tile.sum(0)


def cast_gradients(gradients: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows, grad_weight, grad_bias = gradients
    return grad_rows.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype)
