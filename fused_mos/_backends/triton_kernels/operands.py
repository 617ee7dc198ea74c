"""Prepares operands for the kernels and the matrix products: pads rows to multiples of 16 bytes, appends columns for
the bias, scales weights into range, and compacts the rows that survive a filter."""

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..products import cdiv, product
from ..tracing import assume_constant_result
from . import configurations, finish, gradients
from .configurations import Tile, precision
from .launch import launch
from .loss import MixtureConstants
from .parts import plane_of, product_of


def row_length(width: int, like: Tensor | torch.dtype) -> int:
    """`width` rounded up to make rows of `like`'s dtype a multiple of 16 bytes."""
    multiple = 16 // like.itemsize
    return math.ceil(width / multiple) * multiple


def padded_classes(n_classes: int, like: Tensor | torch.dtype) -> int:
    """Columns of dl for the products: a multiple of 16 bytes, or cuBLAS falls back to kernels at a third of the
    speed."""
    return n_classes if row_length(n_classes, like) == n_classes else math.ceil(n_classes / 64) * 64


def aligned(tensor: Tensor) -> Tensor:
    """The tensor with rows padded to a multiple of 16 bytes, from a 16-byte boundary on, as wide loads and products
    need. For TF32 products, float32 is also rounded to TF32: the hardware would truncate, which makes all logits
    slightly smaller."""
    return _aligned(tensor, rounds=_is_tf32(tensor.dtype))


def aligned_weight(weight: Tensor) -> Tensor:
    """`aligned` for the embedding. A large one is not rounded here; the kernels round what they load."""
    return _aligned(weight, rounds=is_rounded_ahead(weight))


def _aligned(tensor: Tensor, rounds: bool) -> Tensor:
    n_rows, width = tensor.shape[0], row_length(max(tensor.shape[1], 1), tensor)
    if not rounds and width == tensor.shape[1] and tensor.storage_offset() * tensor.itemsize % 16 == 0:
        return tensor
    return scaled_rows(tensor, None, tensor.new_empty(n_rows, width), tensor.shape[1], tf32=rounds)


def is_rounded_ahead(weight: Tensor) -> bool:
    """True if the embedding of TF32 products is rounded ahead, in a copy."""
    return _is_tf32(weight.dtype) and weight.nbytes <= configurations.LARGEST_ROUNDED


@assume_constant_result
def _is_tf32(dtype: torch.dtype) -> bool:
    return precision(dtype) == "tf32"


def bytes_of_padded(n_rows: int, weight: Tensor) -> int:
    """Bytes of the copies that `aligned` and `aligned_weight` make; 0 if they make none."""
    n_classes, n_features = weight.shape
    width = row_length(n_features, weight)
    is_padded = width != n_features
    copied = n_rows if is_padded or _is_tf32(weight.dtype) else 0
    if is_padded or is_rounded_ahead(weight):
        copied += n_classes
    return copied * width * weight.itemsize


def described(
    z: Tensor,  # (R, D), aligned
    e: Tensor,  # (V, D), aligned
    tile: Tile,
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """TMA descriptors of the operands, in tiles."""
    return (
        TensorDescriptor.from_tensor(z, [tile.rows, tile.features]),
        TensorDescriptor.from_tensor(e, [tile.classes, tile.features]),
    )


def described_experts(
    latent: Tensor,  # (N, K, D), aligned
    e: Tensor,  # (V, D), aligned
    tile: Tile,
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """TMA descriptors of the operands of a mixture, in tiles of one expert, or None if the tile uses none."""
    if not tile.described:
        return None, None
    z = TensorDescriptor.from_tensor(latent.transpose(0, 1), [1, tile.rows, tile.features])
    return z, TensorDescriptor.from_tensor(e, [tile.classes, tile.features])


def described_result(out: Tensor, tile: Tile) -> TensorDescriptor:  # (R, columns), rows of a multiple of 16 bytes
    return TensorDescriptor.from_tensor(out, [tile.rows, tile.classes])


def add_times_embedding(dl: Tensor, e: Tensor, first_class: int, out: Tensor, accumulate: bool) -> None:
    """out = dl·E or, with `accumulate`, out += dl·E, for a span of classes. dl is (R, ≥ span), 0 beyond the last class.

    Classes that do not fill 16 bytes are multiplied separately, to keep the large product aligned. Both operands may be
    in parts (parts.py); their rows are then multiples of 16 bytes.
    """
    n = min(dl.shape[-1], e.shape[-2] - first_class)
    whole = n if row_length(n, dl) == n else n // 64 * 64
    if whole:
        product_of(dl[..., :whole], e[..., first_class : first_class + whole, :], out, accumulate)
    if whole < n:
        rest = e[first_class + whole : first_class + n]
        filled_up = scaled_rows(rest, None, e.new_empty(64, e.shape[1]), e.shape[1])
        product(dl[:, whole : whole + 64], filled_up, out, accumulate or whole > 0)


def empty_float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def has_columns(like: Tensor) -> bool:
    """True if two extra columns in dE's product compute the bias's gradient. They cost nothing and are accurate enough
    for 16-bit dtypes. float32 may use TF32 products, so it has a separate sum."""
    return like.dtype != torch.float32


def scaled_rows(
    source: Tensor,  # (R, ≥ d)
    factor: Tensor | None,  # (R,), or () for all rows; None for 1
    result: Tensor,  # (≥ R, ≥ d) out
    d: int,
    columns: int = 0,
    tf32: bool = False,
) -> Tensor:
    """Write source·factor to `result`, padded with zeros, and return it. With two `columns`, the factor and its
    rounding error follow the features; their sum keeps the bias's gradient from losing accuracy to 16 bits."""
    n, width = result.shape
    features = min(triton.next_power_of_2(max(width, 1)), 128)
    constants = {
        "STRIDE": source.shape[1],
        "D": d,
        "WIDTH": width,
        "COLUMNS": columns,
        "ROWS": 16,
        "FEATURES": features,
    }
    constants |= {"OF_ALL": factor is not None and factor.dim() == 0, "TF32": tf32}
    launch(finish.scaled_rows_kernel, (cdiv(n, 16),), source, factor, result, source.shape[0], n, **constants)
    return result


def column_sums(a: Tensor, factor: Tensor | None) -> Tensor:
    """Σ factor·a over rows: a (R, C), possibly in parts, factor (R,) -> (C,) float32. A factor of None is 1. A row with
    factor 0 adds nothing, even if it is not finite."""
    n_rows, n_columns = a.shape[-2:]
    sums, columns = empty_float32(a, n_columns), 128 // a.itemsize
    arguments = a, factor, sums, n_rows, n_columns, a.stride(-2), plane_of(a)
    grid = (cdiv(n_columns, columns),)
    launch(finish.column_sums_kernel, grid, *arguments, stages=4, ROWS=64, COLUMNS=columns)  # the stages prefetch
    return sums


def with_column(z: Tensor, d: int) -> Tensor:
    """[z, 1, 0 …], aligned: (R, ≥ D) -> (R, ≥ D + 2)."""
    return scaled_rows(z, None, z.new_empty(z.shape[0], row_length(d + 2, z)), d, columns=2)


def mixture_constants(n_experts: int, width: int = 16) -> MixtureConstants:
    """Sizes of a program over whole tokens. It holds about 1,024 sums and 4,096 elements of rows of `width` at once."""
    experts = triton.next_power_of_2(n_experts)
    tokens = max(32 // experts, 1)
    rows = tokens * experts
    features = min(triton.next_power_of_2(width), max(4096 // rows, 16), 128)
    return MixtureConstants(n_experts, tokens, experts, max(1024 // rows, 1), features)


def in_range(dtype: torch.dtype, steepest: float, *weights: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The weights of dl scaled into the dtype's range, and the factor () that undoes it in the results, or None.

    Only float16 is scaled: the small weights of a mean would underflow it. The largest weight, times the steepest
    derivative of the transform, becomes 2¹⁴.
    """
    if dtype != torch.float16 or weights[0].numel() == 0:
        return list(weights), None
    largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
    unscale = torch.where((largest > 0) & largest.isfinite(), largest, 1) * (2.0**-14 * steepest)
    return [weight / unscale for weight in weights], unscale


def move_up(a: Tensor, survivors: Tensor) -> Tensor:
    """Move the surviving rows of `a` to its front, in place, and return the original index of each."""
    n = survivors.numel()
    order = torch.arange(n, device=a.device)
    source = survivors[survivors >= n]
    hole = torch.ones(n, dtype=torch.bool, device=a.device)
    hole[survivors[survivors < n]] = False
    destination = hole.nonzero().squeeze(1)
    order[destination] = source
    move_rows(a, source, destination)
    return order


def move_rows(
    a: Tensor,  # (R, columns), or a matrix in parts
    source: Tensor,  # (M,) int64
    destination: Tensor,  # (M,) int64
) -> None:
    """a[destination] = a[source], for rows that are not both."""
    grid = source.numel(), cdiv(a.shape[-1], 4096)
    for part in a if a.dim() == 3 else [a]:
        launch(gradients.move_rows_kernel, grid, part, source, destination, a.shape[-1], a.stride(-2), COLUMNS=4096)
