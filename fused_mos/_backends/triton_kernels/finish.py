"""Kernels around the products of a gradient: they scale and pad operands and round results.

    scaled_rows_kernel   rows times factors: rounds dz = f·(a·E), and pads operands with zeros
    finish_kernel        dE and db from their float32 sums, and the loss
    column_sums_kernel   db for float32, a sum over rows times factors
    scaled_kernel        all gradients times a factor that is known in the backward pass

Numbers that change from batch to batch are not specialised (see loss.py).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tiles import rounded_to_tf32


class Finished(NamedTuple):
    """The float32 sums of some rows of dE, and the gradients to make from them."""

    sums_ptr: Tensor | None  # (≥ V, SUMS): Σ dE and, with a bias, two columns that add up to Σ db
    grad_weight_ptr: Tensor | None  # (V, D) out
    grad_bias_ptr: Tensor | None  # (V,) out
    unscale_ptr: Tensor | None  # (), multiplies the sums


class Loss(NamedTuple):
    """Each token's loss, and their sum or mean."""

    losses_ptr: Tensor  # (N,)
    target_ptr: Tensor  # (N,) int64
    loss_ptr: Tensor  # () out
    divisor_ptr: Tensor  # () out: the number of counted targets, or 1 for a sum
    ignore_index: int


class Gradients(NamedTuple):
    """One tensor for each gradient, or None."""

    latent_ptr: Tensor | None
    prior_ptr: Tensor | None
    weight_ptr: Tensor | None
    bias_ptr: Tensor | None


class Sizes(NamedTuple):
    """Number of elements of each of `Gradients`, 0 for None."""

    n_latent: int
    n_prior: int
    n_weight: int
    n_bias: int


@triton.jit
def scale_rows(
    z_ptr,  # (R, STRIDE), with D features
    row,  # (ROWS,)
    mask,  # (ROWS,): rows to read; others are 0
    written,  # (ROWS,): rows to write
    factor,  # (ROWS,)
    result_ptr,  # (≥ R, WIDTH) out
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # 2 to append the factor and its rounding error to the features, or 0
    FEATURES: tl.constexpr,
    TF32: tl.constexpr,  # round to TF32
):
    """Write [factor·z, factor, the factor's rounding error, 0 …]. A row with factor 0 is exactly 0, even if its latent
    vector is not finite."""
    dtype: tl.constexpr = result_ptr.dtype.element_ty
    rounded = factor.to(dtype).to(tl.float32)
    for first in range(0, WIDTH, FEATURES):
        feature = (first + tl.arange(0, FEATURES))[None, :]
        place = row.to(tl.int64)[:, None]
        z = tl.load(z_ptr + place * STRIDE + feature, mask=mask[:, None] & (feature < D), other=0.0).to(tl.float32)
        value = tl.where(factor[:, None] != 0, z * factor[:, None], 0.0)
        if COLUMNS > 0:
            value = tl.where(feature == D, rounded[:, None], value)
            value = tl.where(feature == D + 1, (factor - rounded)[:, None], value)
        if TF32:
            value = rounded_to_tf32(value)
        tl.store(result_ptr + place * WIDTH + feature, value.to(dtype), mask=written[:, None] & (feature < WIDTH))


@triton.jit(do_not_specialize=["n_rows", "n_result"])
def scaled_rows_kernel(
    source_ptr,  # (R, STRIDE), with D features
    factor_ptr,  # (R,), or () for all rows; None for 1
    result_ptr,  # (n_result, WIDTH) out
    n_rows,
    n_result,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OF_ALL: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    TF32: tl.constexpr,
):
    """Write rows times their factors in the result's dtype, padded with zeros to its height and width."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < n_rows
    if factor_ptr is None:
        factor = tl.full((ROWS,), 1.0, tl.float32)
    elif OF_ALL:
        factor = tl.zeros((ROWS,), tl.float32) + tl.load(factor_ptr)
    else:
        factor = tl.load(factor_ptr + row, mask=mask, other=0.0)
    written = row < n_result
    scale_rows(source_ptr, row, mask, written, factor, result_ptr, STRIDE, D, WIDTH, COLUMNS, FEATURES, TF32)


@triton.jit(do_not_specialize=["n_classes", "n_blocks", "n_tokens"])
def finish_kernel(
    sums,  # Finished
    loss,  # Loss, or None
    n_classes,
    n_blocks,  # programs over the sums; one more computes the loss
    n_tokens,
    SUMS: tl.constexpr,  # width of the sums
    D: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Write dE and db from their sums. The last program writes the sum of the losses, or their mean over the counted
    targets."""
    block = tl.program_id(0)
    if block < n_blocks:
        if sums.sums_ptr is not None:
            write_sums(sums, block * ROWS, n_classes, SUMS, D, ROWS, FEATURES)
    elif loss is not None:
        token = tl.arange(0, 1024)
        total = tl.zeros((1024,), tl.float32)
        count = tl.zeros((1024,), tl.int32)
        for first in range(0, n_tokens, 1024):
            mask = first + token < n_tokens
            total += tl.load(loss.losses_ptr + first + token, mask=mask, other=0.0)
            target = tl.load(loss.target_ptr + first + token, mask=mask, other=0)
            count += (mask & (target != loss.ignore_index)).to(tl.int32)
        if MEAN:
            divisor = tl.sum(count, 0).to(tl.float32)
        else:
            divisor = 1.0
        tl.store(loss.loss_ptr, tl.sum(total, 0) / divisor)
        tl.store(loss.divisor_ptr, divisor)


@triton.jit
def write_sums(
    sums,  # Finished
    first,
    n_classes,
    SUMS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    row = first + tl.arange(0, ROWS)
    mask = row < n_classes
    place = row.to(tl.int64)
    scale = 1.0
    if sums.unscale_ptr is not None:
        scale = tl.load(sums.unscale_ptr)
    if sums.grad_weight_ptr is not None:
        for first_feature in range(0, D, FEATURES):
            feature = (first_feature + tl.arange(0, FEATURES))[None, :]
            inside = mask[:, None] & (feature < D)
            value = tl.load(sums.sums_ptr + place[:, None] * SUMS + feature, mask=inside, other=0.0).to(tl.float32)
            out = (value * scale).to(sums.grad_weight_ptr.dtype.element_ty)
            tl.store(sums.grad_weight_ptr + place[:, None] * D + feature, out, mask=inside)
    if sums.grad_bias_ptr is not None:
        first_column = tl.load(sums.sums_ptr + place * SUMS + D, mask=mask, other=0.0).to(tl.float32)
        second_column = tl.load(sums.sums_ptr + place * SUMS + D + 1, mask=mask, other=0.0).to(tl.float32)
        out = ((first_column + second_column) * scale).to(sums.grad_bias_ptr.dtype.element_ty)
        tl.store(sums.grad_bias_ptr + row, out, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def column_sums_kernel(
    a_ptr,  # (R, stride), with n_columns
    factor_ptr,  # (R,), or None for 1
    sums_ptr,  # (n_columns,) out
    n_rows,
    n_columns,
    stride,
    plane,  # elements from one part of a to the next (parts.py), or None
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write Σ factor·a over rows, with compensated summation. If most of ten thousand rows have the same target, that
    many numbers of one sign are added, and their rounding errors would add up too."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    excess = tl.zeros((ROWS, COLUMNS), tl.float32)  # rounding error of the total
    for first in range(0, n_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        a = tl.load(a_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if plane is not None:
            a += tl.load(a_ptr + plane + place, mask=mask, other=0.0).to(tl.float32)
            a += tl.load(a_ptr + 2 * plane + place, mask=mask, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + row, mask=row < n_rows, other=0.0)[:, None]
            a = tl.where(factor != 0, a * factor, 0.0)
        term = a - excess
        new_total = total + term
        excess = (new_total - total) - term
        total = new_total
    exact = tl.sum(total.to(tl.float64) - excess.to(tl.float64), 0)
    tl.store(sums_ptr + column, exact.to(tl.float32), mask=column < n_columns)


@triton.jit
def scaled_kernel(
    sources,  # Gradients
    results,  # Gradients, out
    sizes,  # Sizes
    factor_ptr,  # ()
    divisor_ptr,  # ()
    BLOCK: tl.constexpr,
):
    """Write gradients times factor / divisor, or 0 if the divisor is 0 (a mean over no targets)."""
    divisor = tl.load(divisor_ptr)
    factor = tl.where(divisor != 0, tl.load(factor_ptr).to(tl.float32) / divisor, 0.0)
    block = tl.program_id(0)
    block = scale_block(sources.latent_ptr, results.latent_ptr, sizes.n_latent, factor, block, BLOCK)
    block = scale_block(sources.prior_ptr, results.prior_ptr, sizes.n_prior, factor, block, BLOCK)
    block = scale_block(sources.weight_ptr, results.weight_ptr, sizes.n_weight, factor, block, BLOCK)
    scale_block(sources.bias_ptr, results.bias_ptr, sizes.n_bias, factor, block, BLOCK)


@triton.jit
def scale_block(source_ptr, result_ptr, n, factor, block, BLOCK: tl.constexpr):
    """Scale block `block` of a tensor, if the tensor has that many. Return the block's number counted from the end of
    the tensor."""
    if source_ptr is not None:
        if (block >= 0) & (block < tl.cdiv(n, BLOCK)):
            index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(source_ptr + index, mask=index < n, other=0.0).to(tl.float32) * factor
            tl.store(result_ptr + index, value.to(result_ptr.dtype.element_ty), mask=index < n)
        block -= tl.cdiv(n, BLOCK)
    return block
