"""Operands as the kernels want them: rows of whole 16-byte pieces, a column beside the features, weights in range,
survivors moved up."""

import math

import torch
import triton
from torch import Tensor

from . import gradients
from .launch import launch


def row_length(width: int, like: Tensor) -> int:
    """`width` rounded up so that rows of `like`'s dtype are a multiple of 16 bytes."""
    multiple = 16 // like.itemsize
    return math.ceil(width / multiple) * multiple


def aligned(tensor: Tensor) -> Tensor:
    """Rows of a multiple of 16 bytes, from a 16-byte boundary on, filled up with zeros: what vector loads need."""
    width = row_length(max(tensor.shape[-1], 1), tensor)
    if width != tensor.shape[-1]:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.storage_offset() * tensor.itemsize % 16 == 0 else tensor.clone()


def bytes_of_padded(n_rows: int, weight: Tensor) -> int:
    """Bytes of what `aligned` makes of the rows and the weight; 0 where D needs no padding."""
    n_classes, n_features = weight.shape
    width = row_length(n_features, weight)
    return 0 if width == n_features else (n_rows + n_classes) * width * weight.itemsize


def empty_float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def unwritten_target_logits(like: Tensor, n_rows: int) -> Tensor:
    """NaN (n_rows,): what stays where the target is no class."""
    return like.new_full((n_rows,), math.nan, dtype=torch.float32)


def with_column(z: Tensor, d: int, factor: Tensor | None) -> Tensor:
    """[factor·z, factor], aligned; 1 stands for a factor of None. (R, ≥ D), (R,) -> (R, ≥ D + 2); the factor has two
    columns, to be added, so that rounding it to 16 bits costs the bias's gradient nothing."""
    width = row_length(d + 2, z)
    result = z.new_empty(z.shape[0], width)
    if factor is None:
        factor = z.new_ones(z.shape[0], dtype=torch.float32)
    features = min(triton.next_power_of_2(width), 128)
    grid = triton.cdiv(z.shape[0], 16), triton.cdiv(width, features)
    constants = {"STRIDE": z.shape[1], "D": d, "WIDTH": width, "ROWS": 16, "FEATURES": features}
    launch(gradients.scaled_rows_kernel, grid, z, factor, result, z.shape[0], **constants)
    return result


def in_range(dtype: torch.dtype, *weights: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The weights of dl, and the factor () that results then need, or None. float16 has a small range, of which the
    weights of a mean would lose most: there the largest becomes 2¹⁴."""
    if dtype != torch.float16 or weights[0].numel() == 0:
        return list(weights), None
    largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
    unscale = torch.where((largest > 0) & largest.isfinite(), largest, 1) * 2.0**-14
    return [weight / unscale for weight in weights], unscale


def move_up(a: Tensor, survivors: Tensor) -> Tensor:
    """Moves rows of `a` so that the survivors are the first ones; returns the original index of each."""
    n = survivors.numel()
    order = torch.arange(n, device=a.device)
    source = survivors[survivors >= n]
    hole = torch.ones(n, dtype=torch.bool, device=a.device)
    hole[survivors[survivors < n]] = False
    destination = hole.nonzero().squeeze(1)
    order[destination] = source
    grid = source.numel(), triton.cdiv(a.shape[1], 4096)
    launch(gradients.move_rows_kernel, grid, a, source, destination, a.shape[1], a.stride(0), COLUMNS=4096)
    return order
