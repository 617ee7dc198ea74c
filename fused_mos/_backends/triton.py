"""The Triton backend for CUDA tensors: the functions of `Kernels` for bfloat16, float16 and float32.

In the forward pass, tiles of logits never leave the chip. The backward passes write dl to a bounded workspace in the
operands' dtype, one span of the vocabulary or one block of tokens at a time. Two cuBLAS products then form dz and dE,
accumulated in float32. There are no atomics, so equal calls give equal bits.

float32 products run in full precision or TF32 as torch is set, by `torch.backends.cuda.matmul.fp32_precision` or its
older names.

For tests, set TRITON_INTERPRET=1 before triton is imported to run the kernels on CPU tensors, slowly.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .products import cdiv, spans
from .row_filter import kept_rows
from .tiled import row_entropy  # noqa: F401  (this and the next are in plain torch here, too)
from .tiled_mixture import mixture_sum, mixture_sum_backward  # noqa: F401
from .tracing import assume_constant_result
from .transform import IDENTITY, Transform
from .triton_kernels import configurations, exponentials
from .triton_kernels import finish as finish_kernels
from .triton_kernels import loss as loss_kernels
from .triton_kernels.backward import finish, log_prob_backward, nll_backward, rows_backward  # noqa: F401
from .triton_kernels.described import persistent_exponentials_kernel
from .triton_kernels.exponentials import Exponentials
from .triton_kernels.finish import Gradients, Loss, Sizes
from .triton_kernels.forward import choose_rows, log_prob, nll, normalisers, predict, row_statistics, sample  # noqa: F401
from .triton_kernels.launch import INTERPRETED, architecture_of, choose_tile, launch
from .triton_kernels.loss import RowFactors, Targets, WeightedLosses
from .triton_kernels.operands import (
    add_times_embedding,
    aligned,
    aligned_weight,
    bytes_of_padded,
    column_sums,
    described,
    described_result,
    empty_float32,
    has_columns,
    mixture_constants,
    move_up,
    padded_classes,
    row_length,
    scaled_rows,
)
from .triton_kernels.parts import in_parts, multiplies_in_parts, plane_of, product_of
from .triton_kernels.tiles import Logits, Scales, scales
from .triton_kernels.workspace import workspace_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MIN_GRADIENT_ROWS = 1024
"""Fewest rows of a block of tokens to form gradients in the forward pass: each block reads and writes the whole weight
gradient."""


def availability() -> str:
    """This backend's entry in `fused_mos.backends()`: "available …", or the reason why not."""
    if INTERPRETED:
        return "available (interpreted: TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return (
        unsupported(torch.device("cuda", torch.cuda.current_device())) or f"available ({torch.cuda.get_device_name()})"
    )


def unsupported(device: torch.device) -> str | None:
    """None if this backend can compute on the device, else the reason why not."""
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
    """`too_old` for a device. If torch finds no GPU, CUDA tensors are fake, and nothing will be computed with them."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= configurations.OLDEST:
        return None
    return too_old(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def too_old(gpu: str, capability: tuple[int, int]) -> str | None:
    """None if the kernels can run on the GPU, else the reason why not."""
    if capability >= configurations.OLDEST:
        return None
    oldest, its = (".".join(map(str, numbers)) for numbers in (configurations.OLDEST, capability))
    return f"it needs a GPU of compute capability {oldest} or newer, but {gpu} has {its}; use backend='tiled'"


# ---------------------------------------------------------------------------------------- gradients in the forward pass


def _sums_in_place(weight: Tensor, parts: bool, with_columns: bool, one_block: bool) -> bool:
    """True if dE can be summed directly in its result, without a float32 copy: the result needs no padding or
    extra columns, and either it is float32 or a single block computes all of it."""
    n_classes, n_features = weight.shape
    dtype = torch.bfloat16 if parts else weight.dtype
    unpadded = (padded_classes(n_classes, dtype), row_length(n_features, dtype)) == (n_classes, n_features)
    return unpadded and not with_columns and (weight.dtype == torch.float32 or one_block)


def _bias_in_columns(n_rows: int, weight: Tensor) -> bool:
    """True if the product that forms dE also forms the bias's gradient, in extra columns. False if the separate sums
    this needs would fill most of the workspace and one more pass over the exponentials reads less."""
    sums_are_large = 8 * weight.numel() > workspace_bytes(weight.device) and n_rows < 4 * weight.shape[1]
    return has_columns(weight) and not sums_are_large


def _rows_of_block(n_rows: int, n_experts: int, weight: Tensor, bias: Tensor | None) -> int:
    """Number of rows, of whole tokens, whose exponentials over the whole vocabulary fit in the workspace; 0 if none."""
    (n_classes, n_features), parts = weight.shape, multiplies_in_parts(n_rows, weight)
    itemsize = 6 if parts else weight.itemsize
    # besides its exponentials, a row has a number per tile of at least 64 classes, a copy of itself with extra columns,
    # and the sums of its gradient; the sums of dE are there once
    bytes_of_row = (itemsize + 4 / 64) * n_classes + (itemsize + (8 if parts else 4)) * (n_features + 8)
    n_bytes = workspace_bytes(weight.device) - bytes_of_padded(n_rows, weight)
    if parts:
        n_bytes -= 6 * n_classes * (n_features + 8)
    with_columns = bias is not None and _bias_in_columns(n_rows, weight)
    if _sums_in_place(weight, parts, with_columns, one_block=True) and n_rows * bytes_of_row <= n_bytes:
        return n_rows
    if not _sums_in_place(weight, parts, with_columns, one_block=False):
        n_bytes -= 4 * n_classes * (n_features + 8)
    held = int(n_bytes / bytes_of_row)
    if held < n_experts:
        return 0
    blocks = math.ceil(n_rows / held)
    tokens = min(math.ceil(n_rows / blocks / n_experts), held // n_experts)  # blocks of about equal size
    if blocks > 1 and tokens > 16:  # align each block's part of a vector, as the kernels compiled for one block expect
        tokens = min(math.ceil(tokens / 16) * 16, held // n_experts // 16 * 16) or tokens
    return tokens * n_experts


def gradient_in_forward_pays(n_tokens: int, n_experts: int, weight: Tensor, bias: Tensor | None) -> bool:
    if n_tokens == 0 or weight.dtype == torch.float16:  # exponentials relative to a guessed maximum overflow float16
        return False
    n_rows = n_tokens * n_experts
    return _rows_of_block(n_rows, n_experts, weight, bias) >= min(MIN_GRADIENT_ROWS, n_rows)


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
    transform: Transform = IDENTITY,
    loss_weights: Tensor | None = None,  # (3, N)
) -> tuple[Tensor, ...]:
    """Loss and gradients in three products instead of four (see triton_kernels/exponentials.py). The gradients are
    those of the losses' sum even for a mean; the divisor accounts for it.

    With weights, dl = A p − B 1[v = target] has an error of up to 2⁻²⁰ |B| p where A and B nearly cancel (loss.py).
    """
    loss, divisor, weighted = empty_float32(latent), empty_float32(latent), None
    if loss_weights is not None:
        weighted = WeightedLosses(*loss_weights.unbind(), empty_float32(latent, len(target)))  # type: ignore[call-arg]
    if not any(needs):
        losses, *known = nll(latent, prior_logits, weight, bias, target, ignore_index, transform, weighted)
        empty = [tensor.new_empty(0) for tensor in (latent, prior_logits, weight, weight)]
        result = Loss(losses if weighted is None else weighted.losses_ptr, target, loss, divisor, ignore_index)
        finish(None, weight[:0], weight[:0, 0], False, weight.shape[1], loss=result, mean=mean)
        return loss, divisor, losses, *known, *empty
    (n, k, d), n_classes = latent.shape, weight.shape[0]
    z, e = aligned(latent.view(n * k, d)), aligned_weight(weight)
    reference, log_total, target_logit, responsibility, factor = (empty_float32(latent, n * k) for _ in range(5))
    losses = empty_float32(latent, n)
    grad_rows = latent.new_empty((n * k, d) if needs[0] else 0)
    grad_prior = torch.empty_like(prior_logits) if needs[1] else prior_logits.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if needs[2] else 0)
    grad_bias = weight.new_empty(n_classes if needs[3] else 0)
    with_columns = needs[3] and _bias_in_columns(n * k, weight)
    needs_sums = needs[2] or with_columns
    height = _rows_of_block(n * k, k, weight, bias) or k
    parts = multiplies_in_parts(n * k, weight)
    dtype = torch.bfloat16 if parts else z.dtype
    padded = padded_classes(n_classes, dtype)
    in_place = _sums_in_place(weight, parts, with_columns, one_block=n * k <= height)
    width = row_length(d + 2 if with_columns else d, dtype)
    multiplied = in_parts(e, width, padded) if parts and needs[0] else e
    sums = grad_weight if in_place else empty_float32(z, padded if needs_sums else 0, width)
    bias_sums = None
    planes = (3,) if parts else ()
    all_exponentials = z.new_empty(*planes, height, math.ceil(padded / 16) * 16, dtype=dtype)
    for r in spans(n * k, height):
        t = slice(r.start // k, r.stop // k)
        a = all_exponentials[..., : r.stop - r.start, :]
        logits = Logits(z[r], e, bias, r.stop - r.start, n_classes, *scales(transform))
        rows_ = z.new_empty(logits.n_rows, width) if needs_sums else None
        written = _exponentials(logits, target[t], reference[r], a, target_logit[r], k)
        factors = RowFactors(responsibility[r], factor[r], rows_, grad_prior[t] if needs[1] else None)
        targets = Targets(prior_logits[t], target[t], ignore_index)
        of_block = None if weighted is None else WeightedLosses(*(part[t] for part in weighted))
        _mix(logits, written, targets, reference[r], losses[t], log_total[r], factors, of_block, d, with_columns)
        block, f_block = a[..., :padded], factor[r]
        survivors = None if weighted is not None else kept_rows(responsibility[r], responsibility[r], filter_eps)
        if survivors is not None:
            kept = move_up(a, survivors)
            block, f_block = block[..., : kept.numel(), :], f_block[kept]
            rows_ = None if rows_ is None else rows_[kept]
        if needs[0]:
            gradient = empty_float32(a, block.shape[-2], multiplied.shape[-1])
            add_times_embedding(block, multiplied, 0, gradient, accumulate=False)
            if survivors is None:
                scaled_rows(gradient, f_block, grad_rows[r], d)
            else:
                grad_rows[r] = 0
                grad_rows[r][kept] = scaled_rows(gradient, f_block, grad_rows.new_empty(len(kept), d), d)
        if rows_ is not None:
            product_of(block.mT, in_parts(rows_, width) if parts else rows_, sums, accumulate=r.start > 0)
        if needs[3] and not with_columns:
            summed = column_sums(block, f_block)[:n_classes]
            bias_sums = summed if bias_sums is None else bias_sums.add_(summed)
    grad_bias = grad_bias if bias_sums is None else bias_sums.to(weight.dtype)
    result = Loss(losses if weighted is None else weighted.losses_ptr, target, loss, divisor, ignore_index)
    finished = weight[:0] if in_place else grad_weight
    finish(sums, finished, grad_bias, with_columns, d, loss=result, mean=mean)
    statistics = (statistic.view(n, k) for statistic in (reference, log_total, target_logit))
    grad_latent = grad_rows.view(n, k, d) if needs[0] else grad_rows
    return loss, divisor, losses, *statistics, grad_latent, grad_prior, grad_weight, grad_bias


def _mix(
    logits: Logits,  # of R rows, aligned
    written: Exponentials,  # output at the targets' entries
    targets: Targets,  # of N tokens
    reference: Tensor,  # (R,)
    losses: Tensor,  # (N,) out
    log_total: Tensor,  # (R,) out
    factors: RowFactors,  # out
    weighted: WeightedLosses | None,  # out
    d: int,
    with_columns: bool,
) -> None:
    n, k = targets.prior_logits_ptr.shape
    width = 0 if factors.rows_ptr is None else factors.rows_ptr.shape[1]
    mix = mixture_constants(k, width)
    scales_ = Scales(logits.inverse_softcap, logits.scale)
    arguments = logits.z_ptr, reference, written, targets, losses, log_total, factors, scales_, weighted
    sizes = n, logits.n_classes, written.tile_total_ptr.shape[0]
    constants: dict[str, Any] = {"STRIDE": logits.z_ptr.shape[1], "D": d, "WIDTH": width, "COLUMNS": 2 * with_columns}
    launch(loss_kernels.mix_kernel, (cdiv(n, mix.tokens),), *arguments, *sizes, **constants, MIX=mix)


def _exponentials(
    logits: Logits,  # of R rows, aligned
    target: Tensor,  # (R / n_experts,)
    reference: Tensor,  # (R,) out
    a: Tensor,  # (R, ≥ V), output: exp(l − reference)·d, 0 at the target and beyond the last class
    target_logit: Tensor,  # (R,) out
    n_experts: int,
) -> Exponentials:
    z, e, n = logits.z_ptr, logits.e_ptr, logits.n_rows
    tile, constants = choose_tile("gradient", z, n, e)
    constants |= {"D": e.shape[1]}
    rows_of_grid = cdiv(n, tile.rows)
    launch(exponentials.reference_kernel, (rows_of_grid,), logits, reference, target_logit, **constants)
    n_tiles = cdiv(a.shape[-1], tile.classes)  # includes the zeros beyond the last class
    out = Exponentials(a, empty_float32(z, n_tiles, n), target_logit, a.shape[-1], plane_of(a))
    arguments = logits, target, reference, out
    constants |= {"EXPERTS": n_experts}
    if tile.described and a.dim() == 2:
        tiles = *described(z, e, tile), described_result(a, tile)
        programs = min(architecture_of(z.device).multiprocessors, rows_of_grid * n_tiles)
        launch(persistent_exponentials_kernel, (programs,), *tiles, *arguments, **constants)
    else:
        launch(exponentials.exponentials_kernel, (rows_of_grid, n_tiles), *arguments, **constants)
    # this kernel holds more in registers, so it gets fewer rows and more warps
    rows = min(tile.rows, 64)
    constants |= {"TILE": constants["TILE"]._replace(rows=rows), "warps": 8}
    launch(exponentials.recheck_kernel, (cdiv(n, rows),), *arguments, **constants)
    return out


def scaled(gradients_: Sequence[Tensor], factor: Tensor, divisor: Tensor) -> list[Tensor]:
    """Scale all gradients in one kernel."""
    results = [torch.empty_like(gradient) for gradient in gradients_]
    sizes = Sizes(*(gradient.numel() for gradient in gradients_))
    sources, outs = (
        Gradients(*(tensor if tensor.numel() else None for tensor in tensors)) for tensors in (gradients_, results)
    )
    grid = (sum(cdiv(size, 4096) for size in sizes),)
    launch(finish_kernels.scaled_kernel, grid, sources, outs, sizes, factor, divisor, BLOCK=4096)
    return results
