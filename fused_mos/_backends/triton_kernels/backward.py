"""Gradients from recomputed logits: dl for one span of the vocabulary at a time, followed by two products."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
from torch import Tensor

from ..products import cdiv, spans
from ..row_filter import backward_of_kept, kept_rows
from ..transform import IDENTITY, Transform
from . import finish as finish_kernels
from . import gradients, workspace
from . import loss as loss_kernels
from .described import persistent_gradient_kernel
from .finish import Finished, Loss
from .gradients import RowGradients
from .launch import architecture_of, choose_tile, launch
from .loss import Statistics, Targets
from .mixture import Mixture, mixture_gradient_kernel
from .operands import (
    add_times_embedding,
    aligned,
    aligned_weight,
    bytes_of_padded,
    column_sums,
    described,
    described_experts,
    described_result,
    empty_float32,
    has_columns,
    in_range,
    mixture_constants,
    padded_classes,
    row_length,
    scaled_rows,
    with_column,
)
from .parts import in_parts, multiplies_in_parts, plane_of, product_of
from .tiles import LogitGradients, Logits, scales

MAX_ROWS = 32_768
"""Most rows of dl to hold at once: more would leave too few classes for efficient products."""

MIN_COLUMNS = 256
"""Fewest classes of dl to hold at once."""


def _recomputed_gradients(
    write_dl: Callable[[Tensor, slice, slice], None],  # (dl out, its rows, its classes)
    z: Tensor,  # (R, ≥ D), the rows aligned
    e: Tensor,  # (V, ≥ D), the weight aligned
    weight: Tensor,  # (V, D)
    needs: tuple[bool, bool, bool],
    group: int,
    unscale: Tensor | None,  # ()
) -> tuple[Tensor, Tensor, Tensor]:
    """`unscale` times the gradients of (rows, weight, bias), from one span of classes of dl at a time.

    Blocks hold a multiple of `group` rows, and a span's dE is complete once all blocks are summed. `write_dl` writes 0
    beyond the last class.
    """
    n, (n_classes, d) = z.shape[0], weight.shape
    if n == 0 or not any(needs):
        zeros = (x.new_zeros(x.shape if need else 0) for x, need in zip((z[:, :d], weight, weight[:, 0]), needs))
        return next(zeros), next(zeros), next(zeros)
    needs_rows, needs_weight, needs_bias = needs
    with_columns = needs_bias and has_columns(z)
    operand = with_column(z, d) if with_columns else z
    parts = multiplies_in_parts(n, weight)
    if parts:
        width = row_length(d, torch.bfloat16)
        operand, e = in_parts(z, width), in_parts(e, width, padded_classes(n_classes, torch.bfloat16))
    grad_rows = empty_float32(z, *((n, e.shape[-1]) if needs_rows else (0,)))
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    grad_bias = weight.new_empty(n_classes if needs_bias else 0)
    height = max(min(n, MAX_ROWS) // group, 1) * group
    n_bytes = workspace.workspace_bytes(z.device) - grad_rows.nbytes - bytes_of_padded(n, weight)
    if with_columns or parts:
        n_bytes -= operand.nbytes + (e.nbytes if parts else 0)
    bytes_of_column = height * (6 if parts else z.itemsize) + 4 * operand.shape[-1]  # dl and the sums of dE
    columns = max(n_bytes, workspace.WORKSPACE_BYTES // 4) // bytes_of_column // 128 * 128
    padded = padded_classes(n_classes, operand)
    columns = min(max(columns, MIN_COLUMNS), padded)
    # Triton stores 16 bytes at a time only if the stride of dl is a multiple of 16
    dl = operand.new_empty(*operand.shape[:-2], height, triton.cdiv(columns, 16) * 16)
    rounded_once = n <= height and unscale is None
    all_sums = z.new_empty((columns, operand.shape[-1]), dtype=z.dtype if rounded_once else torch.float32)
    for c in spans(padded, columns):
        classes = slice(c.start, min(c.stop, n_classes))
        sums = all_sums[: c.stop - c.start]
        bias_sums = None
        for r in spans(n, height):
            block = dl[..., : r.stop - r.start, : triton.cdiv(c.stop - c.start, 16) * 16]
            write_dl(block, r, c)
            block = block[..., : c.stop - c.start]
            if needs_rows:
                add_times_embedding(block, e, c.start, grad_rows[r], accumulate=c.start > 0)
            if needs_weight or with_columns:
                product_of(block.mT, operand[..., r, :], sums, accumulate=r.start > 0)
            if needs_bias and not with_columns:
                summed = column_sums(block, None)
                bias_sums = summed if bias_sums is None else bias_sums.add_(summed)
        finish(sums, grad_weight[classes], grad_bias[classes], with_columns, d, unscale)
        if bias_sums is not None:
            grad_bias[classes] = bias_sums[: classes.stop - classes.start]
    if not needs_rows:
        return z.new_empty(0), grad_weight, grad_bias
    return scaled_rows(grad_rows, unscale, z.new_empty(n, d), d), grad_weight, grad_bias


def finish(
    sums: Tensor | None,  # (≥ V, ≥ D), or with the bias's two columns (≥ V, ≥ D + 2)
    grad_weight: Tensor,  # (V, D) out; empty if not needed
    grad_bias: Tensor,  # (V,) out; empty if not needed
    with_columns: bool,
    d: int,
    unscale: Tensor | None = None,
    loss: Loss | None = None,
    mean: bool = False,
) -> None:
    """Write the gradients of a span from their sums, and the loss."""
    wants_weight, wants_bias = grad_weight.numel() > 0, with_columns and grad_bias.numel() > 0
    sums = sums if wants_weight or wants_bias else None
    n_classes = len(grad_weight) if wants_weight else len(grad_bias)
    n_blocks = 0 if sums is None else cdiv(n_classes, 16)
    finished = Finished(sums, grad_weight if wants_weight else None, grad_bias if wants_bias else None, unscale)
    width = 0 if sums is None else sums.shape[1]
    constants = {"SUMS": width, "D": d, "MEAN": mean, "ROWS": 16, "FEATURES": min(triton.next_power_of_2(d), 256)}
    grid = (n_blocks + (loss is not None),)
    n_tokens = 0 if loss is None else loss.losses_ptr.shape[0]
    launch(finish_kernels.finish_kernel, grid, finished, loss, n_classes, n_blocks, n_tokens, **constants)


def rows_backward(
    rows_: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    maximum: Tensor,  # (R,)
    log_total: Tensor,  # (R,)
    grad_lse: Tensor,  # (R,)
    grad_target: Tensor | None,  # (R,)
    needs: tuple[bool, bool, bool],
    transform: Transform = IDENTITY,
    n_experts: int = 1,  # rows that share a target; target is (R / n_experts,)
) -> tuple[Tensor, Tensor, Tensor]:
    z, e = aligned(rows_), aligned_weight(weight)
    grad_target = grad_lse if grad_target is None else grad_target
    (scaled_lse, scaled_target), unscale = in_range(
        rows_.dtype, 1 / transform.temperature, grad_lse.float(), grad_target.float()
    )

    def write_dl(dl: Tensor, r: slice, c: slice) -> None:
        n_rows, n_columns = dl.shape[-2:]
        tile, constants = choose_tile("gradient", z, n_rows, e)
        grid = cdiv(n_rows, tile.rows), cdiv(n_columns, tile.classes)
        logits = Logits(z[r], e, bias, n_rows, weight.shape[0], *scales(transform))
        block_target = None if target is None else target[r.start // n_experts : r.stop // n_experts]
        statistics, weights = Statistics(maximum[r], log_total[r], None), RowGradients(scaled_lse[r], scaled_target[r])
        out = LogitGradients(dl, c.start, n_columns, dl.stride(-2), plane_of(dl))
        constants |= {"D": e.shape[1], "EXPERTS": n_experts}
        arguments = logits, block_target, statistics, weights, out
        if tile.described and dl.dim() == 2:
            tiles = *described(logits.z_ptr, e, tile), described_result(dl, tile)
            programs = min(architecture_of(z.device).multiprocessors, math.prod(grid))
            launch(persistent_gradient_kernel, (programs,), *tiles, *arguments, **constants)
        else:
            launch(gradients.gradient_kernel, grid, *arguments, **constants)

    return _recomputed_gradients(write_dl, z, e, weight, needs, n_experts, unscale)


def nll_backward(
    grad: Tensor,  # (N,)
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    target_logit: Tensor,  # (N, K)
    ignore_index: int,
    filter_eps: float,
    needs: Sequence[bool],
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k, d = latent.shape
    row_weight, responsibility = empty_float32(latent, n * k), empty_float32(latent, n * k)
    grad_prior = torch.empty_like(prior_logits) if needs[1] else prior_logits.new_empty(0)
    statistics, mix = Statistics(maximum, log_total, target_logit), mixture_constants(k)
    arguments = grad, statistics, Targets(prior_logits, target, ignore_index), row_weight, responsibility
    grid = (cdiv(n, mix.tokens),)
    launch(loss_kernels.row_weights_kernel, grid, *arguments, grad_prior if needs[1] else None, n, MIX=mix)

    product_needs = (needs[0], needs[2], needs[3])
    rows_, per_row = latent.view(n * k, d), (maximum.view(-1), log_total.view(-1), row_weight, row_weight)
    kept = kept_rows(responsibility, row_weight, filter_eps)
    if kept is None:
        grad_rows, *others = rows_backward(rows_, weight, bias, target, *per_row, product_needs, transform, n_experts=k)
    else:
        all_parts = (target.repeat_interleave(k), *per_row)
        of_rows = partial(rows_backward, transform=transform)
        grad_rows, *others = backward_of_kept(of_rows, kept, rows_, weight, bias, all_parts, product_needs)
    grad_weight, grad_bias = others
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


# ---------------------------------------------------------------------------------------------------------- the mixture


def log_prob_backward(
    grad: Tensor,  # (N, V)
    latent: Tensor,  # (N, K, D)
    log_prior: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    maximum: Tensor,  # (N, K)
    log_total: Tensor,  # (N, K)
    needs: tuple[bool, bool, bool, bool],
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in two sweeps of two products each, the first for s = Σ_v G q, and two more products with dl."""
    (n, k, d), n_classes = latent.shape, weight.shape[0]
    z, e = aligned(latent.view(n * k, d)), aligned_weight(weight)
    grad = grad.float().contiguous()
    experts = Mixture(log_prior, maximum, log_total)
    s = _sums_of_weighted_posteriors(grad, Logits(z, e, bias, n, n_classes, *scales(transform)), experts)
    product_needs = (needs[0], needs[2], needs[3])
    (scaled_grad, scaled_s), unscale = in_range(latent.dtype, 1 / transform.temperature, grad, s)

    def write_dl(dl: Tensor, r: slice, c: slice) -> None:
        t = slice(r.start // k, r.stop // k)
        n_tokens = t.stop - t.start
        tile, constants = choose_tile("mixture-gradient", z, n_tokens, e)
        grid = cdiv(n_tokens, tile.rows), cdiv(dl.shape[-1], tile.classes)
        logits = Logits(z[r], e, bias, n_tokens, n_classes, *scales(transform))
        experts = Mixture(log_prior[t], maximum[t], log_total[t])
        out = LogitGradients(dl, c.start, dl.shape[-1], dl.stride(-2), plane_of(dl))
        constants |= {"K": k, "D": z.shape[1], "SECOND_SWEEP": True}
        tiles = described_experts(z[r].view(n_tokens, k, z.shape[1]), e, tile)
        launch(mixture_gradient_kernel, grid, *tiles, logits, experts, scaled_grad[t], scaled_s[t], out, **constants)

    grad_rows, grad_weight, grad_bias = _recomputed_gradients(write_dl, z, e, weight, product_needs, k, unscale)
    grad_prior = s - log_prior.exp() * s.sum(-1, keepdim=True) if needs[1] else s.new_empty(0)
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


def _sums_of_weighted_posteriors(
    grad: Tensor,  # (N, V)
    logits: Logits,  # of N rows of K experts
    experts: Mixture,
) -> Tensor:  # (N, K)
    """s = Σ_v G q, in spans of the vocabulary whose partial sums fit into a small part of the workspace."""
    (n, k), n_classes, z = experts.log_prior_ptr.shape, logits.n_classes, logits.z_ptr
    s = empty_float32(z, n, k).zero_()
    tile, constants = choose_tile("mixture-gradient", z, n, logits.e_ptr)
    tiles = max(workspace.WORKSPACE_BYTES // 16 // max(s.nbytes, 1), 1)
    partial = empty_float32(z, min(tiles, cdiv(n_classes, tile.classes)), n, k)
    constants |= {"K": k, "D": z.shape[1], "SECOND_SWEEP": False}
    for c in spans(n_classes, tiles * tile.classes):
        span = LogitGradients(None, c.start, c.stop - c.start, 0)
        terms = partial[: cdiv(span.n_columns, tile.classes)]
        grid = cdiv(n, tile.rows), terms.shape[0]
        operands = described_experts(z.view(n, k, z.shape[1]), logits.e_ptr, tile)
        launch(mixture_gradient_kernel, grid, *operands, logits, experts, grad, terms, span, **constants)
        s += terms.sum(0)
    return s
