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

import triton
import triton.language as tl

from .rows import combined
from .tiles import LOG2E, LOWEST, logits_tile, row_targets

MARGIN = tl.constexpr(60.0)
"""By how much the largest logit may pass the reference: e⁶⁰ and its sums are far from float32's and bfloat16's
limits."""


@triton.jit
def gradient_kernel(
    z_ptr,  # (R, D)
    e_ptr,  # (V, D)
    bias_ptr,  # (V,)
    target_ptr,  # (R,) int64
    maximum_ptr,  # (R,)
    log_total_ptr,  # (R,)
    grad_lse_ptr,  # (R,)
    grad_target_ptr,  # (R,)
    dl_ptr,  # (R, stride) out: of the classes from first_class on
    n_rows,
    n_classes,
    first_class,
    span,
    stride,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dl = grad_lse·exp(l − L) − grad_target·1[v = target]."""
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * CLASSES
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    mask = row < n_rows
    first_class += first_column
    tile = logits_tile(
        z_ptr,
        e_ptr,
        bias_ptr,
        n_rows,
        n_classes,
        first_row,
        first_class,
        D,
        D,
        HAS_BIAS,
        ROWS,
        CLASSES,
        FEATURES,
        PRECISION,
        False,
    )
    grad_lse = tl.load(grad_lse_ptr + row, mask=mask, other=0.0)
    # a row of weight 0 is exactly 0, whatever its statistics are
    shift = tl.where(grad_lse != 0, tl.load(log_total_ptr + row, mask=mask, other=0.0) * LOG2E, float("inf"))
    maximum = tl.load(maximum_ptr + row, mask=mask, other=0.0)
    dl = tl.exp2((tile - maximum[:, None]) * LOG2E - shift[:, None]) * grad_lse[:, None]
    if HAS_TARGET:
        target = row_targets(target_ptr, first_row, n_rows, first_class, 1, ROWS)
        if tl.max(((target >= 0) & (target < CLASSES)).to(tl.int32), 0) > 0:
            grad_target = tl.load(grad_target_ptr + row, mask=mask, other=0.0)
            dl = tl.where(column[None, :] == target[:, None], dl - grad_target[:, None], dl)
    dl_tile = (
        dl_ptr
        + tl.cast(first_row, tl.int64) * stride
        + first_column
        + (tl.arange(0, ROWS)[:, None] * stride + column[None, :])
    )
    tl.store(dl_tile, dl.to(dl_ptr.dtype.element_ty), mask=mask[:, None] & (first_column + column < span)[None, :])


@triton.jit
def exponentials_tile(
    z_ptr,
    e_ptr,
    bias_ptr,
    target_ptr,
    reference,  # (ROWS,)
    a_ptr,
    tile_maximum_ptr,
    tile_total_ptr,
    target_logit_ptr,
    n_rows,
    n_classes,
    stride,
    first_row,
    tile_index,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, CLASSES)
    mask = row < n_rows
    first_class = tile_index * CLASSES
    tile = logits_tile(
        z_ptr,
        e_ptr,
        bias_ptr,
        n_rows,
        n_classes,
        first_row,
        first_class,
        D,
        D,
        HAS_BIAS,
        ROWS,
        CLASSES,
        FEATURES,
        PRECISION,
        False,
    )
    target = row_targets(target_ptr, first_row, n_rows, first_class, EXPERTS, ROWS)
    here = (target >= 0) & (target < CLASSES)
    target_logit = tl.full((ROWS,), LOWEST, tl.float32)
    if tl.max(here.to(tl.int32), 0) > 0:
        hit = column[None, :] == target[:, None]
        target_logit = tl.where(here, tl.sum(tl.where(hit, tile, 0.0), 1), LOWEST)
        tl.store(target_logit_ptr + row, target_logit, mask=here & mask)
        tile = tl.where(hit, float("-inf"), tile)
    partial = tl.cast(tile_index, tl.int64) * n_rows + row
    tl.store(tile_maximum_ptr + partial, tl.maximum(tl.max(tile, 1), target_logit), mask=mask)
    # beyond the margin any number will do, as long as it is finite: the row is recomputed
    a = tl.exp(tl.minimum(tile - reference[:, None], MARGIN + 1))
    tl.store(tile_total_ptr + partial, tl.sum(a, 1), mask=mask)
    a_tile = (
        a_ptr
        + tl.cast(first_row, tl.int64) * stride
        + first_class
        + (tl.arange(0, ROWS)[:, None] * stride + column[None, :])
    )
    tl.store(a_tile, a.to(a_ptr.dtype.element_ty), mask=mask[:, None] & (first_class + column < n_classes)[None, :])


@triton.jit
def exponentials_kernel(
    z_ptr,  # (R, D)
    e_ptr,  # (V, D)
    bias_ptr,  # (V,)
    target_ptr,  # (R / EXPERTS,) int64
    reference_ptr,  # (R,)
    a_ptr,  # (R, stride) out: exp(l − reference), 0 at the target
    tile_maximum_ptr,  # (tiles, R) out
    tile_total_ptr,  # (tiles, R) out: Σ a
    target_logit_ptr,  # (R,) out, only where the target is a class
    n_rows,
    n_classes,
    stride,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    reference = tl.load(reference_ptr + row, mask=row < n_rows, other=0.0)
    exponentials_tile(
        z_ptr,
        e_ptr,
        bias_ptr,
        target_ptr,
        reference,
        a_ptr,
        tile_maximum_ptr,
        tile_total_ptr,
        target_logit_ptr,
        n_rows,
        n_classes,
        stride,
        first_row,
        tl.program_id(1),
        D,
        EXPERTS,
        HAS_BIAS,
        ROWS,
        CLASSES,
        FEATURES,
        PRECISION,
    )


@triton.jit
def recheck_kernel(
    z_ptr,
    e_ptr,
    bias_ptr,
    target_ptr,
    reference_ptr,  # (R,) in and out
    a_ptr,
    tile_maximum_ptr,
    tile_total_ptr,
    target_logit_ptr,
    n_rows,
    n_classes,
    stride,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`exponentials_kernel` again, with the maximum as reference, for blocks with a row beyond the margin."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    mask = row < n_rows
    reference = tl.load(reference_ptr + row, mask=mask, other=0.0)
    n_tiles = tl.cdiv(n_classes, CLASSES)
    maximum = tl.full((ROWS,), LOWEST, tl.float32)
    for tile_index in range(0, n_tiles):
        tile_maximum = tl.load(tile_maximum_ptr + tl.cast(tile_index, tl.int64) * n_rows + row, mask=mask, other=LOWEST)
        maximum = tl.maximum(maximum, tile_maximum)
    beyond = mask & (maximum - reference > MARGIN)
    if tl.max(beyond.to(tl.int32), 0) > 0:
        reference = tl.where(beyond, maximum, reference)
        tl.store(reference_ptr + row, reference, mask=mask)
        for tile_index in range(0, n_tiles):
            exponentials_tile(
                z_ptr,
                e_ptr,
                bias_ptr,
                target_ptr,
                reference,
                a_ptr,
                tile_maximum_ptr,
                tile_total_ptr,
                target_logit_ptr,
                n_rows,
                n_classes,
                stride,
                first_row,
                tile_index,
                D,
                EXPERTS,
                HAS_BIAS,
                ROWS,
                CLASSES,
                FEATURES,
                PRECISION,
            )


@triton.jit
def mix_kernel(
    reference_ptr,  # (R,)
    tile_total_ptr,  # (tiles, R): Σ a
    target_logit_ptr,  # (R,), NaN where the target is no class
    prior_logits_ptr,  # (N, K)
    target_ptr,  # (N,) int64
    valid_ptr,  # (N,) bool
    scale_ptr,  # ()
    nll_ptr,  # (N,) out
    log_total_ptr,  # (R,) out
    responsibility_ptr,  # (R,) out, 0 where not valid
    factor_ptr,  # (R,) out
    grad_prior_ptr,  # (N, K) out
    a_ptr,  # (R, stride): the targets' entries are written
    n_tokens,
    n_classes,
    n_tiles,
    stride,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,  # K, rounded up to a power of two
    TILES: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    mask = (token < n_tokens)[:, None] & (expert < K)[None, :]
    row = token[:, None] * K + expert[None, :]
    flat_row = tl.reshape(row, (TOKENS * EXPERTS,))
    flat_mask = tl.reshape(mask, (TOKENS * EXPERTS,))
    n_rows = n_tokens * K
    _, others = combined(
        reference_ptr, tile_total_ptr, flat_row, flat_mask, n_tiles, 0, n_rows, TOKENS * EXPERTS, TILES
    )
    others = tl.reshape(others, (TOKENS, EXPERTS))  # Σ exp(l − reference), but for the target's
    reference = tl.load(reference_ptr + row, mask=mask, other=0.0)
    target_logit = tl.load(target_logit_ptr + row, mask=mask, other=0.0)
    at_target = tl.exp(target_logit - reference)
    total = others + at_target
    log_total = tl.log(total)

    prior_logits = tl.load(prior_logits_ptr + row, mask=mask, other=float("-inf")).to(tl.float32)
    centred = prior_logits - tl.max(prior_logits, 1)[:, None]
    log_prior = centred - tl.log(tl.sum(tl.exp(centred), 1))[:, None]
    joint = tl.where(mask, log_prior + ((target_logit - reference) - log_total), float("-inf"))
    peak = tl.maximum(tl.max(joint, 1), LOWEST)  # where every expert gives probability 0, nobody is responsible
    likelihood = tl.exp(joint - peak[:, None])
    likelihoods = tl.sum(likelihood, 1)
    tl.store(nll_ptr + token, -(peak + tl.log(likelihoods)), mask=token < n_tokens)

    valid = tl.load(valid_ptr + token, mask=token < n_tokens, other=0).to(tl.int1)[:, None]
    responsibility = tl.where(valid & (likelihoods != 0)[:, None], likelihood / likelihoods[:, None], 0.0)
    scale = tl.load(scale_ptr)
    weight = tl.where(
        responsibility != 0, responsibility * scale, 0.0
    )  # 0 although the scale is infinite: no valid target
    tl.store(log_total_ptr + row, log_total, mask=mask)
    tl.store(responsibility_ptr + row, responsibility, mask=mask)
    tl.store(factor_ptr + row, tl.where(weight != 0, weight / total, 0.0), mask=mask)
    tl.store(grad_prior_ptr + row, tl.where(valid, tl.exp(log_prior) - responsibility, 0.0) * scale, mask=mask)
    target = tl.load(target_ptr + token, mask=token < n_tokens, other=-1)[:, None]
    entry = a_ptr + row.to(tl.int64) * stride + target
    tl.store(entry, (-others).to(a_ptr.dtype.element_ty), mask=mask & (target >= 0) & (target < n_classes))


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
