"""Operands as the kernels and the products want them: rows of whole 16-byte pieces, a column beside the features,
weights in range, survivors moved up."""

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
    """`width` rounded up so that rows of `like`'s dtype are a multiple of 16 bytes."""
    multiple = 16 // like.itemsize
    return math.ceil(width / multiple) * multiple


def padded_classes(n_classes: int, like: Tensor | torch.dtype) -> int:
    """Columns of dl as the products take it: whole 16-byte pieces, without which cuBLAS falls back to kernels of a
    third of the speed."""
    return n_classes if row_length(n_classes, like) == n_classes else math.ceil(n_classes / 64) * 64


def aligned(tensor: Tensor) -> Tensor:
    """Rows of a multiple of 16 bytes, from a 16-byte boundary on, filled up with zeros: what wide loads and products
    need. In float32 with TF32 products, rounded to TF32: hardware would truncate, which makes all logits a little
    smaller."""
    return _aligned(tensor, rounds=_is_tf32(tensor.dtype))


def aligned_weight(weight: Tensor) -> Tensor:
    """The embedding, likewise, but that a large one is not rounded: its kernels round what they load."""
    return _aligned(weight, rounds=is_rounded_ahead(weight))


def _aligned(tensor: Tensor, rounds: bool) -> Tensor:
    n_rows, width = tensor.shape[0], row_length(max(tensor.shape[1], 1), tensor)
    if not rounds and width == tensor.shape[1] and tensor.storage_offset() * tensor.itemsize % 16 == 0:
        return tensor
    return scaled_rows(tensor, None, tensor.new_empty(n_rows, width), tensor.shape[1], tf32=rounds)


def is_rounded_ahead(weight: Tensor) -> bool:
    """Whether the embedding of TF32 products is rounded in a copy of its own."""
    return _is_tf32(weight.dtype) and weight.nbytes <= configurations.LARGEST_ROUNDED


@assume_constant_result
def _is_tf32(dtype: torch.dtype) -> bool:
    return precision(dtype) == "tf32"


def bytes_of_padded(n_rows: int, weight: Tensor) -> int:
    """Bytes of the copies that `aligned` and `aligned_weight` make; 0 where they make none."""
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
    """Descriptors of the operands, in tiles."""
    return (
        TensorDescriptor.from_tensor(z, [tile.rows, tile.features]),
        TensorDescriptor.from_tensor(e, [tile.classes, tile.features]),
    )


def described_experts(
    latent: Tensor,  # (N, K, D), aligned
    e: Tensor,  # (V, D), aligned
    tile: Tile,
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Descriptors of the operands of a mixture, in tiles of one expert; none where the tile has none."""
    if not tile.described:
        return None, None
    z = TensorDescriptor.from_tensor(latent.transpose(0, 1), [1, tile.rows, tile.features])
    return z, TensorDescriptor.from_tensor(e, [tile.classes, tile.features])


def described_result(out: Tensor, tile: Tile) -> TensorDescriptor:  # (R, columns), rows of a multiple of 16 bytes
    return TensorDescriptor.from_tensor(out, [tile.rows, tile.classes])


def add_times_embedding(dl: Tensor, e: Tensor, first_class: int, out: Tensor, accumulate: bool) -> None:
    """out += dl·E, or without `accumulate` out = dl·E, for a span of classes; dl (R, ≥ span) is 0 beyond the last one.
    Classes that are no whole piece are a small product of their own, so that the large one is aligned. Both may be in
    parts, and have whole pieces then."""
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
    """Whether the bias's gradient is made by two columns of dE's product, which cost nothing and are exact enough for
    16-bit formats; for float32, whose products may be TF32's, it is a sum of its own."""
    return like.dtype != torch.float32


def scaled_rows(
    source: Tensor,  # (R, ≥ d)
    factor: Tensor | None,  # (R,), or () for all rows; None for 1
    result: Tensor,  # (≥ R, ≥ d) out
    d: int,
    columns: int = 0,
    tf32: bool = False,
) -> Tensor:
    """Writes source·factor to `result`, which is returned, filled up with zeros. With two `columns`, the factor and
    what its rounding loses stand behind the features, to be added: so rounding to 16 bits costs the bias's gradient
    nothing."""
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
    """Σ factor·a over rows: (R, C), which may be in parts, (R,) -> (C,), float32; a row of factor 0 adds nothing, and
    None is 1."""
    n_rows, n_columns = a.shape[-2:]
    sums, columns = empty_float32(a, n_columns), 128 // a.itemsize
    arguments = a, factor, sums, n_rows, n_columns, a.stride(-2), plane_of(a)
    grid = (cdiv(n_columns, columns),)
    launch(finish.column_sums_kernel, grid, *arguments, stages=4, ROWS=64, COLUMNS=columns)  # which loads ahead
    return sums


def with_column(z: Tensor, d: int) -> Tensor:
    """[z, 1, 0 …], aligned: (R, ≥ D) -> (R, ≥ D + 2)."""
    return scaled_rows(z, None, z.new_empty(z.shape[0], row_length(d + 2, z)), d, columns=2)


def mixture_constants(n_experts: int, width: int = 16) -> MixtureConstants:
    """Sizes of a program over whole tokens: it holds some 1,024 sums at once, and 4,096 numbers of rows of `width`."""
    experts = triton.next_power_of_2(n_experts)
    tokens = max(32 // experts, 1)
    rows = tokens * experts
    features = min(triton.next_power_of_2(width), max(4096 // rows, 16), 128)
    return MixtureConstants(n_experts, tokens, experts, max(1024 // rows, 1), features)


def in_range(dtype: torch.dtype, steepest: float, *weights: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The weights of dl, and the factor () that results then need, or None. float16 has a small range, of which the
    weights of a mean would lose most: there the largest becomes 2¹⁴, times the steepest derivative of a transform."""
    if dtype != torch.float16 or weights[0].numel() == 0:
        return list(weights), None
    largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
    unscale = torch.where((largest > 0) & largest.isfinite(), largest, 1) * (2.0**-14 * steepest)
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
    move_rows(a, source, destination)
    return order


def move_rows(
    a: Tensor,  # (R, columns), or a matrix in parts
    source: Tensor,  # (M,) int64
    destination: Tensor,  # (M,) int64
) -> None:
    """a[destination] = a[source], where no row is both."""
    grid = source.numel(), cdiv(a.shape[-1], 4096)
    for part in a if a.dim() == 3 else [a]:
        launch(gradients.move_rows_kernel, grid, part, source, destination, a.shape[-1], a.stride(-2), COLUMNS=4096)
