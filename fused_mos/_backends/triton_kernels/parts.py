"""float32 matrices as sums of three bfloat16 ones, and products of them.

x = high + middle + low holds all of float32's 24 bits, so six products of parts, of which the largest dropped one is
2⁻²⁴ of the result, have float32's accuracy. Where tensor cores multiply 16 bits some fifteen times as fast as the other
units do float32, that takes less than half the time of one float32 product.

A matrix in parts is one tensor (3, rows, columns) of bfloat16.
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
"""Multiplications of a matrix product from which on parts pay: the others wait for the host."""

SMALL_TERMS = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1))
"""Parts whose products are added first, since they are small beside that of the high ones."""

LONGEST_SUM = 2048
"""Products of high parts that tensor cores add up: they cut off what a sum cannot hold, always towards 0, so that the
error of a long sum grows with its length. Shorter ones are added as float32 is, rounded to the nearest."""


def multiplies_in_parts(n_rows: int, weight: Tensor) -> bool:
    """Whether products of n_rows rows with the embedding are made of parts."""
    if weight.dtype != torch.float32 or not _has_fast_parts(weight.device):
        return False
    return n_rows * weight.numel() >= LEAST_PRODUCTS


@assume_constant_result
def _has_fast_parts(device: torch.device) -> bool:
    """In full precision, and on some GPUs. (Where torch finds none, tensors on it are fake ones.)"""
    if precision(torch.float32) != "ieee" or device.type == "cuda" and not torch.cuda.is_available():
        return False
    return architecture_of(device).multiplies_parts


def plane_of(matrix: Tensor) -> int | None:
    """Numbers from one part to the next; None for a matrix that is not in parts."""
    return matrix.stride(0) if matrix.dim() == 3 else None


@triton.jit
def store_parts(
    place,  # pointers to high, or to the only one
    value,
    plane,  # numbers from one part to the next; None for a matrix that is not in parts
    mask,
):
    """Store float32 numbers in the dtype of `place`, and in parts what that loses."""
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
    """Write a matrix in parts, filled up with zeros to their rows and their width."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    plane = tl.cast(n_result, tl.int64) * WIDTH
    for first in range(0, WIDTH, FEATURES):
        feature = (first + tl.arange(0, FEATURES))[None, :]
        value = tl.load(source_ptr + row * D + feature, mask=(row < n_rows) & (feature < D), other=0.0)
        store_parts(parts_ptr + row * WIDTH + feature, value, plane, mask=(row < n_result) & (feature < WIDTH))


def in_parts(matrix: Tensor, width: int, n_rows: int = 0) -> Tensor:
    """(R, ≤ width) -> (3, R, width), or with so many rows."""
    n_rows = max(n_rows, matrix.shape[0])
    parts = torch.empty((3, n_rows, width), dtype=torch.bfloat16, device=matrix.device)
    constants = {"D": matrix.shape[1], "WIDTH": width, "ROWS": 16, "FEATURES": min(triton.next_power_of_2(width), 128)}
    launch(split_kernel, (cdiv(n_rows, 16),), matrix, parts, matrix.shape[0], n_rows, **constants)
    return parts


def product_of(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a·b or, with `accumulate`, out += a·b, of two matrices or of two in parts."""
    if a.dim() == 2:
        product(a, b, out, accumulate)
        return
    for i, j in SMALL_TERMS:
        product(a[i], b[j], out, accumulate)
        accumulate = True
    for s in spans(a.shape[-1], LONGEST_SUM):
        product(a[0, :, s], b[0, s], out, accumulate=True)
