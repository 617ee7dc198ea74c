"""Kernels for the gradient of the NLL, whose dl = w·(exp(l − L) − 1[v = target]) with the row weights w = g·r.

Recomputed (`gradient_kernel`): L and w are known, a span of the vocabulary's dl is written in the operands' dtype, and
two matrix products turn it into dz and dE.

In the forward pass (the others): L and w are not known when the logits are. So the tiles hold a = exp(l − reference),
with the target's entry −Σ of the others; the reference is the row's largest logit among the first tile's classes, which
any float16-free format can stand in for the maximum, and dl = f·a with one factor f = w·exp(reference − L) for each
row. The factor goes to the other operand (dE = aᵀ·(f z)) or to the result (dz = f·(a·E)), so that both products take
`a` as it is.

    exponentials_kernel    a and, for each tile, Σ exp and the maximum
    recheck_kernel         the same once more for rows whose reference turns out too small: it normally returns at once
    mix_kernel             L, the NLL, responsibilities, f, da, and the targets' entries of a
    scaled_rows_kernel     [f z, f]: a last column makes db a column of dE's product
    move_rows_kernel       puts surviving rows in the place of filtered ones
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .rows import combined
from .tiles import LOG2E, LOWEST, logits_tile, row_targets

MARGIN = tl.constexpr(60.0)
"""By how much the largest logit may pass the reference: e⁶⁰ and its sums are far from float32's and bfloat16's
limits."""


class RowStatistics(NamedTuple):
    """Each row's log-sum-exp L = maximum + log_total."""

    maximum_ptr: Tensor  # (R,)
    log_total_ptr: Tensor  # (R,)


class RowGradients(NamedTuple):
    """The gradients of each row's log-sum-exp and, with the other sign, of its target's logit."""

    grad_lse_ptr: Tensor  # (R,)
    grad_target_ptr: Tensor  # (R,)


class Exponentials(NamedTuple):
    """What the forward pass keeps of a block of tokens: a = exp(l − reference), and its sums."""

    a_ptr: Tensor  # (R, stride): 0 at the target, until mix_kernel writes it
    tile_maximum_ptr: Tensor  # (tiles, R)
    tile_total_ptr: Tensor  # (tiles, R): Σ a
    target_logit_ptr: Tensor  # (R,), written only where the target is a class
    stride: int


class LossInputs(NamedTuple):
    """What the loss takes beside the exponentials of the logits."""

    prior_logits_ptr: Tensor  # (N, K)
    target_ptr: Tensor  # (N,) int64
    valid_ptr: Tensor  # (N,) bool
    scale_ptr: Tensor  # (): of the loss


class LossOutputs(NamedTuple):
    """The loss, and each row's part in its gradient."""

    nll_ptr: Tensor  # (N,)
    log_total_ptr: Tensor  # (R,)
    responsibility_ptr: Tensor  # (R,), 0 where not valid
    factor_ptr: Tensor  # (R,)
    grad_prior_ptr: Tensor  # (N, K)


@triton.jit
def gradient_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R,) int64, or None
    statistics,  # RowStatistics
    weights,  # RowGradients
    out,  # LogitGradients
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """dl = grad_lse·exp(l − L) − grad_target·1[v = target]."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * CLASSES
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    mask = row < logits.n_rows
    first_class = out.first_class + first_column
    tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=False)
    grad_lse = tl.load(weights.grad_lse_ptr + row, mask=mask, other=0.0)
    # a row of weight 0 is exactly 0, whatever its statistics are
    shift = tl.where(grad_lse != 0, tl.load(statistics.log_total_ptr + row, mask=mask, other=0.0) * LOG2E, float("inf"))
    maximum = tl.load(statistics.maximum_ptr + row, mask=mask, other=0.0)
    dl = tl.exp2((tile - maximum[:, None]) * LOG2E - shift[:, None]) * grad_lse[:, None]
    if target_ptr is not None:
        target = row_targets(target_ptr, first_row, logits.n_rows, first_class, EXPERTS=1, ROWS=ROWS)
        if tl.max(((target >= 0) & (target < CLASSES)).to(tl.int32), 0) > 0:
            grad_target = tl.load(weights.grad_target_ptr + row, mask=mask, other=0.0)
            dl = tl.where(column[None, :] == target[:, None], dl - grad_target[:, None], dl)
    dl_row = out.dl_ptr + tl.cast(first_row, tl.int64) * out.stride + first_column
    dl_tile = dl_row + (tl.arange(0, ROWS)[:, None] * out.stride + column[None, :])
    inside = mask[:, None] & (first_column + column < out.n_columns)[None, :]
    tl.store(dl_tile, dl.to(out.dl_ptr.dtype.element_ty), mask=inside)


@triton.jit
def exponentials_tile(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference,  # (ROWS,)
    out,  # Exponentials
    first_row,
    tile_index,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write one tile of a, (ROWS, CLASSES), its rows' maxima and sums, and the target logits that it has."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    mask = row < logits.n_rows
    first_class = tile_index * CLASSES
    tile = logits_tile(logits, first_row, first_class, 0, K=1, D=D, TILE=TILE, RESIDENT=False)
    target = row_targets(target_ptr, first_row, logits.n_rows, first_class, EXPERTS=EXPERTS, ROWS=ROWS)
    here = (target >= 0) & (target < CLASSES)
    target_logit = tl.full((ROWS,), LOWEST, tl.float32)
    if tl.max(here.to(tl.int32), 0) > 0:
        hit = column[None, :] == target[:, None]
        target_logit = tl.where(here, tl.sum(tl.where(hit, tile, 0.0), 1), LOWEST)
        tl.store(out.target_logit_ptr + row, target_logit, mask=here & mask)
        tile = tl.where(hit, float("-inf"), tile)
    partial = tl.cast(tile_index, tl.int64) * logits.n_rows + row
    tl.store(out.tile_maximum_ptr + partial, tl.maximum(tl.max(tile, 1), target_logit), mask=mask)
    # beyond the margin any number will do, as long as it is finite: the row is recomputed
    a = tl.exp(tl.minimum(tile - reference[:, None], MARGIN + 1))
    tl.store(out.tile_total_ptr + partial, tl.sum(a, 1), mask=mask)
    a_row = out.a_ptr + tl.cast(first_row, tl.int64) * out.stride + first_class
    a_tile = a_row + (tl.arange(0, ROWS)[:, None] * out.stride + column[None, :])
    inside = mask[:, None] & (first_class + column < logits.n_classes)[None, :]
    tl.store(a_tile, a.to(out.a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def exponentials_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference_ptr,  # (R,)
    out,  # Exponentials
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write a = exp(l − reference), and each tile's maxima and sums."""
    first_row = tl.program_id(0) * TILE.rows
    row = first_row + tl.arange(0, TILE.rows)
    reference = tl.load(reference_ptr + row, mask=row < logits.n_rows, other=0.0)
    tile_index = tl.program_id(1)
    exponentials_tile(logits, target_ptr, reference, out, first_row, tile_index, D=D, EXPERTS=EXPERTS, TILE=TILE)


@triton.jit
def recheck_kernel(
    logits,  # Logits of R rows
    target_ptr,  # (R / EXPERTS,) int64
    reference_ptr,  # (R,) in and out
    out,  # Exponentials
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`exponentials_kernel` again, with the maximum as reference, for blocks with a row beyond the margin."""
    ROWS: tl.constexpr = TILE.rows
    CLASSES: tl.constexpr = TILE.classes
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    mask = row < logits.n_rows
    reference = tl.load(reference_ptr + row, mask=mask, other=0.0)
    n_tiles = tl.cdiv(logits.n_classes, CLASSES)
    maximum = tl.full((ROWS,), LOWEST, tl.float32)
    for tile_index in range(0, n_tiles):
        partial = tl.cast(tile_index, tl.int64) * logits.n_rows + row
        tile_maximum = tl.load(out.tile_maximum_ptr + partial, mask=mask, other=LOWEST)
        maximum = tl.maximum(maximum, tile_maximum)
    beyond = mask & (maximum - reference > MARGIN)
    if tl.max(beyond.to(tl.int32), 0) > 0:
        reference = tl.where(beyond, maximum, reference)
        tl.store(reference_ptr + row, reference, mask=mask)
        for tile_index in range(0, n_tiles):
            exponentials_tile(
                logits, target_ptr, reference, out, first_row, tile_index, D=D, EXPERTS=EXPERTS, TILE=TILE
            )


@triton.jit
def mix_kernel(
    reference_ptr,  # (R,)
    exponentials,  # Exponentials: the targets' entries of a are written; target logits are NaN where there is no class
    inputs,  # LossInputs
    out,  # LossOutputs
    n_tokens,
    n_classes,
    n_tiles,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,  # K, rounded up to a power of two
    TILES: tl.constexpr,
):
    """Write the loss, the responsibilities and what a needs to become dl, from the exponentials of a block of
    tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    mask = (token < n_tokens)[:, None] & (expert < K)[None, :]
    row = token[:, None] * K + expert[None, :]
    flat_row = tl.reshape(row, (TOKENS * EXPERTS,))
    flat_mask = tl.reshape(mask, (TOKENS * EXPERTS,))
    n_rows = n_tokens * K
    total_ptr = exponentials.tile_total_ptr
    _, others = combined(
        reference_ptr, total_ptr, flat_row, flat_mask, n_tiles, 0, n_rows, BLOCK=TOKENS * EXPERTS, SPLITS=TILES
    )
    others = tl.reshape(others, (TOKENS, EXPERTS))  # Σ exp(l − reference), but for the target's
    reference = tl.load(reference_ptr + row, mask=mask, other=0.0)
    target_logit = tl.load(exponentials.target_logit_ptr + row, mask=mask, other=0.0)
    at_target = tl.exp(target_logit - reference)
    total = others + at_target
    log_total = tl.log(total)

    prior_logits = tl.load(inputs.prior_logits_ptr + row, mask=mask, other=float("-inf")).to(tl.float32)
    centred = prior_logits - tl.max(prior_logits, 1)[:, None]
    log_prior = centred - tl.log(tl.sum(tl.exp(centred), 1))[:, None]
    joint = tl.where(mask, log_prior + ((target_logit - reference) - log_total), float("-inf"))
    peak = tl.maximum(tl.max(joint, 1), LOWEST)  # where every expert gives probability 0, nobody is responsible
    likelihood = tl.exp(joint - peak[:, None])
    likelihoods = tl.sum(likelihood, 1)
    tl.store(out.nll_ptr + token, -(peak + tl.log(likelihoods)), mask=token < n_tokens)

    valid = tl.load(inputs.valid_ptr + token, mask=token < n_tokens, other=0).to(tl.int1)[:, None]
    responsibility = tl.where(valid & (likelihoods != 0)[:, None], likelihood / likelihoods[:, None], 0.0)
    scale = tl.load(inputs.scale_ptr)
    # 0 although the scale is infinite: no valid target
    weight = tl.where(responsibility != 0, responsibility * scale, 0.0)
    tl.store(out.log_total_ptr + row, log_total, mask=mask)
    tl.store(out.responsibility_ptr + row, responsibility, mask=mask)
    tl.store(out.factor_ptr + row, tl.where(weight != 0, weight / total, 0.0), mask=mask)
    tl.store(out.grad_prior_ptr + row, tl.where(valid, tl.exp(log_prior) - responsibility, 0.0) * scale, mask=mask)
    target = tl.load(inputs.target_ptr + token, mask=token < n_tokens, other=-1)[:, None]
    entry = exponentials.a_ptr + row.to(tl.int64) * exponentials.stride + target
    tl.store(entry, (-others).to(exponentials.a_ptr.dtype.element_ty), mask=mask & (target >= 0) & (target < n_classes))


@triton.jit
def scaled_rows_kernel(
    z_ptr,  # (R, STRIDE), of which D features
    factor_ptr,  # (R,)
    result_ptr,  # (R, WIDTH) out: [factor·z, factor, what rounding takes from the factor, 0 …]
    n_rows,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    row = tl.minimum(tl.arange(0, ROWS), n_rows - 1 - first_row)[:, None]
    feature = (tl.program_id(1) * FEATURES + tl.arange(0, FEATURES))[None, :]
    factor = tl.load(factor_ptr + first_row + row)
    z = tl.load(
        z_ptr + tl.cast(first_row, tl.int64) * STRIDE + (row * STRIDE + feature), mask=feature < D, other=0.0
    ).to(tl.float32)
    rounded = factor.to(result_ptr.dtype.element_ty).to(tl.float32)
    value = tl.where(feature == D, rounded, tl.where(feature == D + 1, factor - rounded, z * factor))
    # a row of factor 0 is exactly 0, also where its latent vector is not finite
    value = tl.where(factor == 0, 0.0, value)
    out = result_ptr + tl.cast(first_row, tl.int64) * WIDTH + (row * WIDTH + feature)
    tl.store(out, value.to(result_ptr.dtype.element_ty), mask=feature < WIDTH)


@triton.jit
def move_rows_kernel(
    a_ptr,  # (R, stride)
    source_ptr,  # (M,) int64
    destination_ptr,  # (M,) int64
    n_columns,
    stride,
    COLUMNS: tl.constexpr,
):
    """a[destination] = a[source], where no row is both."""
    move = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(a_ptr + tl.load(source_ptr + move) * stride + column, mask=column < n_columns)
    tl.store(a_ptr + tl.load(destination_ptr + move) * stride + column, value, mask=column < n_columns)
