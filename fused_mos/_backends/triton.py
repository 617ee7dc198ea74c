"""Fused MoS in Triton for CUDA tensors: the functions of `Kernels` for bfloat16, float16 and float32.

Tiles of logits never leave the chip in the forward pass. The backward passes write dl, a span of the vocabulary or a
block of tokens at a time, in the operands' dtype to a bounded workspace, from which two matrix products of the vendor's
library make dz and dE, accumulated in float32. No atomics: equal calls give equal bits.

float32 products follow `torch.set_float32_matmul_precision`: full precision, or TF32.

With TRITON_INTERPRET=1 in the environment before triton is imported, the kernels run on CPU tensors, slowly: for tests.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from .products import product, spans
from .row_filter import kept_rows
from .tracing import assume_constant_result
from .triton_kernels import configurations, exponentials, gradients
from .triton_kernels import loss as loss_kernels
from .triton_kernels.exponentials import Exponentials
from .triton_kernels.forward import choose_rows, log_prob, nll, normalisers, predict, row_statistics, sample  # noqa: F401
from .triton_kernels.gradients import RowGradients
from .triton_kernels.launch import INTERPRETED, choose_tile, launch
from .triton_kernels.loss import Finished, Gradients, Loss, RowFactors, Sizes, Statistics, Targets
from .triton_kernels.mixture import Mixture, mixture_gradient_kernel
from .triton_kernels.operands import (
    add_times_embedding,
    aligned,
    bytes_of_padded,
    empty_float32,
    has_columns,
    in_range,
    mixture_constants,
    move_up,
    padded_classes,
    row_length,
    scaled_rows,
    with_column,
)
from .triton_kernels.tiles import LogitGradients, Logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WORKSPACE_BYTES = 288 * 2**20
"""Bytes beyond inputs, outputs and gradients, of which the largest part is a block of dl: enough for the paper's Penn
Treebank in one block."""

WORKSPACE_SHARE = 0.02
"""Share of a GPU's memory that the workspace may be, where that is more."""

MIN_GRADIENT_ROWS = 1024
"""Rows of one token block below which gradients are not formed in the forward pass: each block reads and writes the
whole weight gradient."""

MAX_ROWS = 32_768
"""Rows of dl held at once when it is recomputed: more would leave too few classes for efficient products."""

MIN_COLUMNS = 256
"""Classes of dl held at once at least."""


def availability() -> str:
    """What `fused_mos.backends()` says of this backend: "available …", or why not."""
    if INTERPRETED:
        return "available (interpreted: TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return (
        unsupported(torch.device("cuda", torch.cuda.current_device())) or f"available ({torch.cuda.get_device_name()})"
    )


def unsupported(device: torch.device) -> str | None:
    """Why tensors on this device cannot be computed here; None where they can."""
    if device.type == "cpu" and INTERPRETED:
        return None
    if device.type != "cuda":
        return (
            f"it is for CUDA tensors, but latent is on {device} (TRITON_INTERPRET=1 in the environment interprets "
            "the kernels on the CPU)"
        )
    return _why_too_old(device)


@assume_constant_result
def _why_too_old(device: torch.device) -> str | None:
    """As `too_old`, of a device. Where torch finds none, tensors on it are fake ones, of which nothing is computed."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= configurations.OLDEST:
        return None
    return too_old(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def too_old(gpu: str, capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on a GPU; None where they can."""
    if capability >= configurations.OLDEST:
        return None
    oldest, its = (".".join(map(str, numbers)) for numbers in (configurations.OLDEST, capability))
    return f"it needs a GPU of compute capability {oldest} or newer, and {gpu} has {its}; use backend='tiled'"


def workspace_bytes(device: torch.device) -> int:
    """Bytes beyond inputs, outputs and gradients: WORKSPACE_BYTES, or WORKSPACE_SHARE of a GPU's memory where that is
    more; or what the environment variable FUSED_MOS_WORKSPACE_MIB says."""
    return _workspace_bytes(device.type == "cuda")


@assume_constant_result
def _workspace_bytes(on_gpu: bool) -> int:
    if mib := os.environ.get("FUSED_MOS_WORKSPACE_MIB"):
        if not mib.isdecimal() or int(mib) < 1:
            raise ValueError(f"FUSED_MOS_WORKSPACE_MIB must be a positive number of MiB, got {mib!r}")
        return int(mib) * 2**20
    return max(WORKSPACE_BYTES, int(WORKSPACE_SHARE * _memory_of_gpu())) if on_gpu else WORKSPACE_BYTES


@functools.cache
def _memory_of_gpu() -> int:
    """Bytes of the smallest GPU, so that equal calls are cut into equal blocks on all of them; 0 without any."""
    n_gpus = torch.cuda.device_count()
    return min((torch.cuda.get_device_properties(i).total_memory for i in range(n_gpus)), default=0)


# ------------------------------------------------------------------------------------------------ gradients, recomputed


def _recomputed_gradients(
    write_dl: Callable[[Tensor, slice, slice], None],  # (dl out, its rows, its classes)
    z: Tensor,  # (R, ≥ D), the rows aligned
    e: Tensor,  # (V, ≥ D), the weight aligned
    weight: Tensor,  # (V, D)
    needs: tuple[bool, bool, bool],
    group: int,
    unscale: Tensor | None,  # ()
) -> tuple[Tensor, Tensor, Tensor]:
    """unscale times the gradients of (rows, weight, bias), from spans of the vocabulary of dl: a span's dE is complete
    once all its rows are summed. Blocks hold a multiple of `group` rows. `write_dl` writes 0 beyond the last class."""
    n, (n_classes, d) = z.shape[0], weight.shape
    if n == 0 or not any(needs):
        zeros = (x.new_zeros(x.shape if need else 0) for x, need in zip((z[:, :d], weight, weight[:, 0]), needs))
        return next(zeros), next(zeros), next(zeros)
    needs_rows, needs_weight, needs_bias = needs
    with_columns = needs_bias and has_columns(z)
    operand = with_column(z, d) if with_columns else z
    grad_rows = empty_float32(z, *(z.shape if needs_rows else (0,)))
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    grad_bias = weight.new_empty(n_classes if needs_bias else 0)
    height = max(min(n, MAX_ROWS) // group, 1) * group
    n_bytes = workspace_bytes(z.device) - grad_rows.nbytes - bytes_of_padded(n, weight)
    n_bytes -= operand.nbytes if with_columns else 0
    bytes_of_column = height * z.itemsize + 4 * operand.shape[1]  # of dl, and the sums of dE
    columns = max(n_bytes, WORKSPACE_BYTES // 4) // bytes_of_column // 128 * 128
    padded = padded_classes(n_classes, z)
    columns = min(max(columns, MIN_COLUMNS), padded)
    dl = z.new_empty(height, columns)
    rounded_once = n <= height and unscale is None
    all_sums = z.new_empty((columns, operand.shape[1]), dtype=z.dtype if rounded_once else torch.float32)
    for c in spans(padded, columns):
        classes = slice(c.start, min(c.stop, n_classes))
        sums = all_sums[: c.stop - c.start]
        bias_sums = None
        for r in spans(n, height):
            block = dl[: r.stop - r.start, : c.stop - c.start]
            write_dl(block, r, c)
            if needs_rows:
                add_times_embedding(block, e, c.start, grad_rows[r], accumulate=c.start > 0)
            if needs_weight or with_columns:
                product(block.t(), operand[r], sums, accumulate=r.start > 0)
            if needs_bias and not with_columns:
                summed = block.sum(0)
                bias_sums = summed if bias_sums is None else bias_sums.add_(summed)
        _finish(sums, grad_weight[classes], grad_bias[classes], with_columns, d, unscale)
        if bias_sums is not None:
            grad_bias[classes] = bias_sums[: classes.stop - classes.start]
    if not needs_rows:
        return z.new_empty(0), grad_weight, grad_bias
    return scaled_rows(grad_rows, unscale, z.new_empty(n, d), d), grad_weight, grad_bias


def _finish(
    sums: Tensor | None,  # (≥ V, ≥ D), or with the bias's two columns (≥ V, ≥ D + 2)
    grad_weight: Tensor,  # (V, D) out; empty where not needed
    grad_bias: Tensor,  # (V,) out; empty where not needed
    with_columns: bool,
    d: int,
    unscale: Tensor | None = None,
    loss: Loss | None = None,
    mean: bool = False,
) -> None:
    """Writes gradients of a span from their sums, and the loss."""
    wants_weight, wants_bias = grad_weight.numel() > 0, with_columns and grad_bias.numel() > 0
    sums = sums if wants_weight or wants_bias else None
    n_classes = len(grad_weight) if wants_weight else len(grad_bias)
    n_blocks = 0 if sums is None else triton.cdiv(n_classes, 16)
    finished = Finished(sums, grad_weight if wants_weight else None, grad_bias if wants_bias else None, unscale)
    width = 0 if sums is None else sums.shape[1]
    constants = {"SUMS": width, "D": d, "MEAN": mean, "ROWS": 16, "FEATURES": min(triton.next_power_of_2(d), 256)}
    grid = (n_blocks + (loss is not None),)
    n_tokens = 0 if loss is None else loss.nll_ptr.shape[0]
    launch(loss_kernels.finish_kernel, grid, finished, loss, n_classes, n_blocks, n_tokens, **constants)


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
    n_experts: int = 1,  # rows that share a target, which then is (R / n_experts,)
) -> tuple[Tensor, Tensor, Tensor]:
    z, e = aligned(rows_), aligned(weight)
    grad_target = grad_lse if grad_target is None else grad_target
    (scaled_lse, scaled_target), unscale = in_range(rows_.dtype, grad_lse.float(), grad_target.float())

    def write_dl(dl: Tensor, r: slice, c: slice) -> None:
        tile, constants = choose_tile("gradient", z, dl.shape[0], e)
        grid = triton.cdiv(dl.shape[0], tile.rows), triton.cdiv(dl.shape[1], tile.classes)
        logits = Logits(z[r], e, bias, dl.shape[0], weight.shape[0])
        block_target = None if target is None else target[r.start // n_experts : r.stop // n_experts]
        statistics, weights = Statistics(maximum[r], log_total[r], None), RowGradients(scaled_lse[r], scaled_target[r])
        out = LogitGradients(dl, c.start, dl.shape[1], dl.stride(0))
        constants |= {"D": e.shape[1], "EXPERTS": n_experts}
        launch(gradients.gradient_kernel, grid, logits, block_target, statistics, weights, out, **constants)

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, k, d = latent.shape
    row_weight, responsibility = empty_float32(latent, n * k), empty_float32(latent, n * k)
    grad_prior = torch.empty_like(prior_logits) if needs[1] else prior_logits.new_empty(0)
    statistics, mix = Statistics(maximum, log_total, target_logit), mixture_constants(k)
    arguments = grad, statistics, Targets(prior_logits, target, ignore_index), row_weight, responsibility
    grid = (triton.cdiv(n, mix.tokens),)
    launch(loss_kernels.row_weights_kernel, grid, *arguments, grad_prior if needs[1] else None, n, MIX=mix)

    product_needs = (needs[0], needs[2], needs[3])
    rows_, row_maximum, row_log_total = latent.view(n * k, d), maximum.view(-1), log_total.view(-1)
    kept = kept_rows(responsibility, row_weight, filter_eps)
    if kept is None:
        weights = row_maximum, row_log_total, row_weight, row_weight
        grad_rows, *others = rows_backward(rows_, weight, bias, target, *weights, product_needs, k)
    else:
        weights = row_maximum[kept], row_log_total[kept], row_weight[kept], row_weight[kept]
        row_target = target.repeat_interleave(k)[kept]
        grad_rows, *others = rows_backward(rows_[kept], weight, bias, row_target, *weights, product_needs)
        if needs[0]:
            grad_rows = torch.zeros_like(rows_).index_copy_(0, kept, grad_rows)
    grad_weight, grad_bias = others
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


# ---------------------------------------------------------------------------------------- gradients in the forward pass


def _rows_of_block(n_rows: int, n_experts: int, weight: Tensor) -> int:
    """Rows, of whole tokens, whose exponentials over the whole vocabulary are held at once; 0 where none are."""
    n_classes, n_features = weight.shape
    # beside them a number for each tile of at least 64 classes, the rows with their columns, their gradient's sums;
    # and once the sums of dE
    bytes_of_row = (weight.itemsize + 4 / 64) * n_classes + (weight.itemsize + 4) * (n_features + 8)
    n_bytes = workspace_bytes(weight.device) - bytes_of_padded(n_rows, weight)
    held = int((n_bytes - 4 * n_classes * (n_features + 8)) / bytes_of_row)
    if held < n_experts:
        return 0
    blocks = math.ceil(n_rows / held)
    tokens = min(math.ceil(n_rows / blocks / n_experts), held // n_experts)  # blocks of about one size
    if blocks > 1 and tokens > 16:  # whose parts of vectors are aligned, as the kernels of one block are compiled
        tokens = min(math.ceil(tokens / 16) * 16, held // n_experts // 16 * 16) or tokens
    return tokens * n_experts


def gradient_in_forward_pays(n_tokens: int, n_experts: int, weight: Tensor) -> bool:
    if n_tokens == 0 or weight.dtype == torch.float16:  # float16 has no room for exponentials beside a guessed maximum
        return False
    return _rows_of_block(n_tokens * n_experts, n_experts, weight) >= min(MIN_GRADIENT_ROWS, n_tokens * n_experts)


def nll_with_gradients(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    ignore_index: int,
    filter_eps: float,
    mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of Σ nll, of a mean, too: three products instead of four. See triton_kernels/exponentials.py."""
    loss, divisor = empty_float32(latent), empty_float32(latent)
    if not any(needs):
        losses, *known = nll(latent, prior_logits, weight, bias, target, ignore_index)
        empty = [tensor.new_empty(0) for tensor in (latent, prior_logits, weight, weight)]
        result = Loss(losses, target, loss, divisor, ignore_index)
        _finish(None, weight[:0], weight[:0, 0], False, weight.shape[1], loss=result, mean=mean)
        return loss, divisor, losses, *known, *empty
    (n, k, d), n_classes = latent.shape, weight.shape[0]
    z, e = aligned(latent.view(n * k, d)), aligned(weight)
    reference, log_total, target_logit, responsibility, factor = (empty_float32(latent, n * k) for _ in range(5))
    losses = empty_float32(latent, n)
    grad_rows = latent.new_empty((n * k, d) if needs[0] else 0)
    grad_prior = torch.empty_like(prior_logits) if needs[1] else prior_logits.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if needs[2] else 0)
    grad_bias = weight.new_empty(n_classes if needs[3] else 0)
    with_columns = needs[3] and has_columns(z)
    needs_sums = needs[2] or with_columns
    height = _rows_of_block(n * k, k, weight) or k
    # the sums of dE are its own place where they have its dtype and shape
    padded = padded_classes(n_classes, z)
    in_place = (
        not with_columns
        and (padded, z.shape[1]) == (n_classes, d)
        and (weight.dtype == torch.float32 or n * k <= height)
    )
    width = row_length(d + 2, z) if with_columns else z.shape[1]
    sums = grad_weight if in_place else empty_float32(z, padded if needs_sums else 0, width)
    bias_sums = None
    all_exponentials = z.new_empty(height, math.ceil(padded / 16) * 16)
    for r in spans(n * k, height):
        t = slice(r.start // k, r.stop // k)
        a = all_exponentials[: r.stop - r.start]
        logits = Logits(z[r], e, bias, a.shape[0], n_classes)
        rows_ = z.new_empty(a.shape[0], width) if needs_sums else None
        parts = RowFactors(responsibility[r], factor[r], rows_, grad_prior[t] if needs[1] else None)
        targets = Targets(prior_logits[t], target[t], ignore_index)
        _write_loss(logits, targets, reference[r], a, target_logit[r], losses[t], log_total[r], parts, d, with_columns)
        block, f_block = a[:, :padded], factor[r]
        survivors = kept_rows(responsibility[r], responsibility[r], filter_eps)
        if survivors is not None:
            kept = move_up(a, survivors)
            block, f_block = block[: kept.numel()], f_block[kept]
            rows_ = None if rows_ is None else rows_[kept]
        if needs[0]:
            gradient = empty_float32(a, block.shape[0], e.shape[1])
            add_times_embedding(block, e, 0, gradient, accumulate=False)
            if survivors is None:
                scaled_rows(gradient, f_block, grad_rows[r], d)
            else:
                grad_rows[r] = 0
                grad_rows[r][kept] = scaled_rows(gradient, f_block, grad_rows.new_empty(len(kept), d), d)
        if rows_ is not None:
            product(block.t(), rows_, sums, accumulate=r.start > 0)
        if needs[3] and not with_columns:
            summed = torch.mv(block[:, :n_classes].t(), f_block)
            bias_sums = summed if bias_sums is None else bias_sums.add_(summed)
    grad_bias = grad_bias if bias_sums is None else bias_sums.to(weight.dtype)
    result = Loss(losses, target, loss, divisor, ignore_index)
    finished = weight[:0] if in_place else grad_weight
    _finish(sums, finished, grad_bias, with_columns, d, loss=result, mean=mean)
    statistics = (statistic.view(n, k) for statistic in (reference, log_total, target_logit))
    grad_latent = grad_rows.view(n, k, d) if needs[0] else grad_rows
    return loss, divisor, losses, *statistics, grad_latent, grad_prior, grad_weight, grad_bias


def _write_loss(
    logits: Logits,  # of R rows, aligned
    targets: Targets,  # of N tokens
    reference: Tensor,  # (R,) out
    a: Tensor,  # (R, ≥ V) out: dl / factor
    target_logit: Tensor,  # (R,) out
    losses: Tensor,  # (N,) out
    log_total: Tensor,  # (R,) out
    factors: RowFactors,  # out
    d: int,
    with_columns: bool,
) -> None:
    n, k = targets.prior_logits_ptr.shape
    target = targets.target_ptr
    assert target is not None
    written = _exponentials(logits, target, reference, a, target_logit, k)
    sizes = n, logits.n_classes, written.tile_total_ptr.shape[0]
    width = 0 if factors.rows_ptr is None else factors.rows_ptr.shape[1]
    mix = mixture_constants(k, width)
    constants = {"STRIDE": logits.z_ptr.shape[1], "D": d, "WIDTH": width, "COLUMNS": 2 * with_columns, "MIX": mix}
    arguments = logits.z_ptr, reference, written, targets, losses, log_total, factors
    launch(loss_kernels.mix_kernel, (triton.cdiv(n, mix.tokens),), *arguments, *sizes, **constants)  # type: ignore[arg-type]


def _exponentials(
    logits: Logits,  # of R rows, aligned
    target: Tensor,  # (R / n_experts,)
    reference: Tensor,  # (R,) out
    a: Tensor,  # (R, ≥ V) out: exp(l − reference), 0 at the target and beyond the last class
    target_logit: Tensor,  # (R,) out
    n_experts: int,
) -> Exponentials:
    z, e, _, n, n_classes = logits
    tile, constants = choose_tile("gradient", z, n, e)
    constants |= {"D": e.shape[1]}
    rows_of_grid = triton.cdiv(n, tile.rows)
    launch(exponentials.reference_kernel, (rows_of_grid,), logits, reference, target_logit, **constants)
    n_tiles = triton.cdiv(n_classes, tile.classes)
    out = Exponentials(a, empty_float32(z, n_tiles, n), target_logit, a.shape[1])
    arguments = logits, target, reference, out
    constants |= {"EXPERTS": n_experts}
    launch(exponentials.exponentials_kernel, (rows_of_grid, n_tiles), *arguments, **constants)
    # fewer rows and more warps, since it holds more in registers
    rows = min(tile.rows, 64)
    constants |= {"TILE": constants["TILE"]._replace(rows=rows), "warps": 8}
    launch(exponentials.recheck_kernel, (triton.cdiv(n, rows),), *arguments, **constants)
    return out


def scaled(gradients_: Sequence[Tensor], factor: Tensor, divisor: Tensor) -> list[Tensor]:
    """All of them by one kernel."""
    results = [torch.empty_like(gradient) for gradient in gradients_]
    sizes = Sizes(*(gradient.numel() for gradient in gradients_))
    sources, outs = (
        Gradients(*(tensor if tensor.numel() else None for tensor in tensors)) for tensors in (gradients_, results)
    )
    grid = (sum(triton.cdiv(size, 4096) for size in sizes),)
    launch(loss_kernels.scaled_kernel, grid, sources, outs, sizes, factor, divisor, BLOCK=4096)
    return results


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sweeps of two products, the first for s = Σ_v G q, and the two products with dl."""
    (n, k, d), n_classes = latent.shape, weight.shape[0]
    z, e = aligned(latent.view(n * k, d)), aligned(weight)
    grad = grad.float().contiguous()
    experts = Mixture(log_prior, maximum, log_total)
    s = _sums_of_weighted_posteriors(grad, Logits(z, e, bias, n, n_classes), experts)
    product_needs = (needs[0], needs[2], needs[3])
    (scaled_grad, scaled_s), unscale = in_range(latent.dtype, grad, s)

    def write_dl(dl: Tensor, r: slice, c: slice) -> None:
        t = slice(r.start // k, r.stop // k)
        n_tokens = t.stop - t.start
        tile, constants = choose_tile("mixture-gradient", z, n_tokens, e)
        grid = triton.cdiv(n_tokens, tile.rows), triton.cdiv(dl.shape[1], tile.classes)
        logits = Logits(z[r], e, bias, n_tokens, n_classes)
        experts = Mixture(log_prior[t], maximum[t], log_total[t])
        out = LogitGradients(dl, c.start, dl.shape[1], dl.stride(0))
        constants |= {"K": k, "D": z.shape[1], "SECOND_SWEEP": True}
        launch(mixture_gradient_kernel, grid, logits, experts, scaled_grad[t], scaled_s[t], out, **constants)

    grad_rows, grad_weight, grad_bias = _recomputed_gradients(write_dl, z, e, weight, product_needs, k, unscale)
    grad_prior = s - log_prior.exp() * s.sum(-1, keepdim=True) if needs[1] else s.new_empty(0)
    return grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


def _sums_of_weighted_posteriors(
    grad: Tensor,  # (N, V)
    logits: Logits,  # of N rows of K experts
    experts: Mixture,
) -> Tensor:  # (N, K)
    """s = Σ_v G q, from spans of the vocabulary whose tiles' terms fit into a small part of the workspace."""
    (n, k), n_classes, z = experts.log_prior_ptr.shape, logits.n_classes, logits.z_ptr
    s = empty_float32(z, n, k).zero_()
    tile, constants = choose_tile("mixture-gradient", z, n, logits.e_ptr)
    tiles = max(WORKSPACE_BYTES // 16 // max(s.nbytes, 1), 1)
    partial = empty_float32(z, min(tiles, triton.cdiv(n_classes, tile.classes)), n, k)
    constants |= {"K": k, "D": z.shape[1], "SECOND_SWEEP": False}
    for c in spans(n_classes, tiles * tile.classes):
        span = LogitGradients(None, c.start, c.stop - c.start, 0)
        terms = partial[: triton.cdiv(span.n_columns, tile.classes)]
        grid = triton.cdiv(n, tile.rows), terms.shape[0]
        launch(mixture_gradient_kernel, grid, logits, experts, grad, terms, span, **constants)
        s += terms.sum(0)
    return s
