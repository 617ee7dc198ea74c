"""float32 matrices split into sums of three bfloat16 matrices, and their products.

x = high + middle + low keeps all 24 bits of float32. Six of the nine products of parts give float32's accuracy; the
largest of the others is 2⁻²⁴ of the result. On GPUs whose tensor cores multiply 16 bits about fifteen times as fast as
other units multiply float32, this takes less than half the time of one float32 product.

A matrix in parts is one bfloat16 tensor (3, rows, columns).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..products import cdiv, product, spans
from ..tracing import assume_constant_result
from .configurations import precision
from .launch import architecture_of, launch

LEAST_PRODUCTS = 2**32
"""Fewest multiplications of a matrix product for which parts pay: smaller ones wait for the host."""

SMALL_TERMS = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1))
"""Parts whose products are added first, since they are much smaller than that of the high parts."""

LONGEST_SUM = 2048
"""Longest sum of products of high parts on tensor cores. They truncate towards 0, so the error grows with the length of
the sum. Partial sums of this length are added in float32, rounded to nearest."""


def multiplies_in_parts(n_rows: int, weight: Tensor) -> bool:
    """True if products of n_rows rows with the embedding are computed in parts."""
    if weight.dtype != torch.float32 or not _has_fast_parts(weight.device):
        return False
    return n_rows * weight.numel() >= LEAST_PRODUCTS


@assume_constant_result
def _has_fast_parts(device: torch.device) -> bool:
    """True for full float32 precision on GPUs where parts are faster. (If torch finds no GPU, its tensors are fake.)"""
    if precision(torch.float32) != "ieee" or device.type == "cuda" and not torch.cuda.is_available():
        return False
    return architecture_of(device).multiplies_parts


def plane_of(matrix: Tensor) -> int | None:
    """Elements from one part to the next; None for a matrix that is not in parts."""
    return matrix.stride(0) if matrix.dim() == 3 else None


@triton.jit
def store_parts(
    place,  # pointers to the high part, or to the only one
    value,
    plane,  # elements from one part to the next; None for a matrix that is not in parts
    mask,
):
    """Store float32 values in the dtype of `place`. In parts, the rounding errors are stored too."""
    high = value.to(place.dtype.element_ty)
    tl.store(place, high, mask=mask)
    if plane is not None:
        rest = value - high.to(tl.float32)
        middle = rest.to(place.dtype.element_ty)
        tl.store(place + plane, middle, mask=mask)
        tl.store(place + 2 * plane, (rest - middle.to(tl.float32)).to(place.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_result"])
def split_kernel(
    source_ptr,  # (n_rows, D)
    parts_ptr,  # (3, n_result, WIDTH) out
    n_rows,
    n_result,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Write a matrix in parts, padded with zeros to (n_result, WIDTH)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    plane = tl.cast(n_result, tl.int64) * WIDTH
    for first in range(0, WIDTH, FEATURES):
        feature = (first + tl.arange(0, FEATURES))[None, :]
        value = tl.load(source_ptr + row * D + feature, mask=(row < n_rows) & (feature < D), other=0.0)
        store_parts(parts_ptr + row * WIDTH + feature, value, plane, mask=(row < n_result) & (feature < WIDTH))


def in_parts(matrix: Tensor, width: int, n_rows: int = 0) -> Tensor:
    """(R, ≤ width) -> (3, R, width), or with `n_rows` rows if that is more."""
    n_rows = max(n_rows, matrix.shape[0])
    parts = torch.empty((3, n_rows, width), dtype=torch.bfloat16, device=matrix.device)
    constants = {"D": matrix.shape[1], "WIDTH": width, "ROWS": 16, "FEATURES": min(triton.next_power_of_2(width), 128)}
    launch(split_kernel, (cdiv(n_rows, 16),), matrix, parts, matrix.shape[0], n_rows, **constants)
    return parts


def product_of(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a·b or, with `accumulate`, out += a·b, for two matrices or two matrices in parts."""
    if a.dim() == 2:
        product(a, b, out, accumulate)
        return
    for i, j in SMALL_TERMS:
        product(a[i], b[j], out, accumulate)
        accumulate = True
    for s in spans(a.shape[-1], LONGEST_SUM):
        product(a[0, :, s], b[0, s], out, accumulate=True)
