"""Fused MoS in Triton for CUDA tensors: the functions of `Kernels` for bfloat16, float16 and float32.

Tiles of logits never leave the chip in the forward pass. The backward passes write dl, a span of the vocabulary or a
block of tokens at a time, in the operands' dtype to a bounded workspace, from which two matrix products of the vendor's
library make dz and dE, accumulated in float32. No atomics: equal calls give equal bits.

float32 products follow `torch.set_float32_matmul_precision`: full precision, or TF32.

With TRITON_INTERPRET=1 in the environment before triton is imported, the kernels run on CPU tensors, slowly: for tests.
"""

import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .products import product, spans
from .row_filter import kept_rows
from .tracing import assume_constant_result
from .triton_kernels import configurations, forward, gradients
from .triton_kernels.forward import log_prob, predict, row_statistics, sample  # noqa: F401  (part of `Kernels`)
from .triton_kernels.gradients import Exponentials, LossInputs, LossOutputs, RowGradients, RowStatistics
from .triton_kernels.launch import INTERPRETED, choose_tile, launch
from .triton_kernels.mixture import Mixture, mixture_gradient_kernel
from .triton_kernels.operands import (
    aligned,
    bytes_of_padded,
    empty_float32,
    in_range,
    move_up,
    row_length,
    unwritten_target_logits,
    with_column,
)
from .triton_kernels.tiles import LogitGradients, Logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

WORKSPACE_BYTES = 248 * 2**20
"""Bytes beyond inputs, outputs and gradients, of which the largest part is a block of dl."""

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
    once all its rows are summed. Blocks hold a multiple of `group` rows."""
    n, (n_classes, d) = z.shape[0], weight.shape
    grad_rows = z.new_zeros(z.shape if needs[0] else 0, dtype=torch.float32)
    grad_weight = weight.new_zeros(weight.shape if needs[1] else 0)
    grad_bias = weight.new_zeros(n_classes if needs[2] else 0)
    if n and any(needs):
        augmented = with_column(z, d, None) if needs[2] else z
        height = max(min(n, MAX_ROWS) // group, 1) * group
        n_bytes = (
            WORKSPACE_BYTES - grad_rows.nbytes - (augmented.nbytes if needs[2] else 0) - bytes_of_padded(n, weight)
        )
        bytes_of_column = height * z.itemsize + 4 * augmented.shape[1]  # of dl, and the sums of dE
        columns = max(n_bytes, WORKSPACE_BYTES // 4) // bytes_of_column // 128 * 128
        columns = min(max(columns, MIN_COLUMNS), row_length(n_classes, z))
        dl = z.new_empty(height, columns)
        rounded_once = n <= height and unscale is None
        all_sums = z.new_empty((columns, augmented.shape[1]), dtype=z.dtype if rounded_once else torch.float32)
        for c in spans(n_classes, columns):
            sums = all_sums[: c.stop - c.start]
            for r in spans(n, height):
                block = dl[: r.stop - r.start, : c.stop - c.start]
                write_dl(block, r, c)
                if needs[0]:
                    product(block, e[c], grad_rows[r], accumulate=True)
                if needs[1] or needs[2]:
                    product(block.t(), augmented[r], sums, accumulate=r.start > 0)
            if unscale is not None:
                sums.mul_(unscale)
            if needs[1]:
                grad_weight[c] = sums[:, :d]
            if needs[2]:
                grad_bias[c] = sums[:, d]
    grad_rows = grad_rows if unscale is None else grad_rows.mul_(unscale)
    return (grad_rows[:, :d] if needs[0] else grad_rows).to(z.dtype).contiguous(), grad_weight, grad_bias


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
) -> tuple[Tensor, Tensor, Tensor]:
    z, e = aligned(rows_), aligned(weight)
    grad_target = grad_lse if grad_target is None else grad_target
    (scaled_lse, scaled_target), unscale = in_range(rows_.dtype, grad_lse.float(), grad_target.float())

    def write_dl(dl: Tensor, r: slice, c: slice) -> None:
        tile, constants = choose_tile("gradient", z, dl.shape[0])
        grid = triton.cdiv(dl.shape[0], tile.rows), triton.cdiv(dl.shape[1], tile.classes)
        logits = Logits(z[r], e, bias, dl.shape[0], weight.shape[0])
        block_target = None if target is None else target[r]
        statistics, weights = RowStatistics(maximum[r], log_total[r]), RowGradients(scaled_lse[r], scaled_target[r])
        out = LogitGradients(dl, c.start, dl.shape[1], dl.stride(0))
        constants |= {"D": e.shape[1]}
        launch(gradients.gradient_kernel, grid, logits, block_target, statistics, weights, out, **constants)

    return _recomputed_gradients(write_dl, z, e, weight, needs, 1, unscale)


# ---------------------------------------------------------------------------------------- gradients in the forward pass


def _rows_of_block(n_rows: int, n_experts: int, weight: Tensor) -> int:
    """Rows, of whole tokens, whose exponentials over the whole vocabulary are held at once; 0 where none are."""
    n_classes, n_features = weight.shape
    # beside them two numbers for each tile of at least 64 classes, the rows with their column, their gradient's sums;
    # and once the sums of dE
    bytes_of_row = (weight.itemsize + 8 / 64) * n_classes + (weight.itemsize + 4) * (n_features + 8)
    held = int((WORKSPACE_BYTES - 4 * n_classes * (n_features + 8) - bytes_of_padded(n_rows, weight)) / bytes_of_row)
    if held < n_experts:
        return 0
    blocks = math.ceil(n_rows / held)
    return min(math.ceil(n_rows / blocks / n_experts), held // n_experts) * n_experts  # blocks of about one size


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
    valid: Tensor,  # (N,) bool
    scale: Tensor,  # ()
    filter_eps: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Three products instead of four: see triton_kernels/gradients.py."""
    (n, k, d), n_classes = latent.shape, weight.shape[0]
    z, e = aligned(latent.view(n * k, d)), aligned(weight)
    reference, log_total, responsibility, factor = (empty_float32(latent, n * k) for _ in range(4))
    nll, grad_prior = empty_float32(latent, n), empty_float32(latent, n, k)
    target_logit = unwritten_target_logits(latent, n * k)
    grad_rows = latent.new_empty((n * k, d) if needs[0] else 0)
    height = _rows_of_block(n * k, k, weight) or k
    exponentials = z.new_empty(height, row_length(n_classes, z))
    needs_sums = needs[2] or needs[3]
    sums = empty_float32(z, n_classes if needs_sums else 0, row_length(d + 2, z))
    for r in spans(n * k, height):
        t = slice(r.start // k, r.stop // k)
        a = exponentials[: r.stop - r.start]
        logits = Logits(z[r], e, bias, a.shape[0], n_classes)
        inputs = LossInputs(prior_logits[t], target[t], valid[t], scale)
        outputs = LossOutputs(nll[t], log_total[r], responsibility[r], factor[r], grad_prior[t])
        _write_loss(logits, inputs, reference[r], a, target_logit[r], outputs)
        block, z_block, f_block = a[:, :n_classes], z[r], factor[r]
        kept: slice | Tensor = slice(None)
        survivors = kept_rows(responsibility[r], responsibility[r], filter_eps)
        if survivors is not None:
            kept = move_up(a, survivors)
            block, z_block, f_block = block[: kept.numel()], z_block[kept], f_block[kept]
        if needs[0]:
            if survivors is not None:
                grad_rows[r] = 0
            gradient = product(block, e, empty_float32(a, block.shape[0], e.shape[1]))[:, :d].mul_(f_block[:, None])
            grad_rows[r][kept] = gradient.to(grad_rows.dtype)
        if needs_sums:
            product(block.t(), with_column(z_block, d, f_block), sums, accumulate=r.start > 0)
    grad_weight = sums[:, :d].to(weight.dtype).contiguous() if needs[2] else weight.new_empty(0)
    grad_bias = sums[:, d : d + 2].sum(1).to(weight.dtype) if needs[3] else weight.new_empty(0)
    grad_prior = grad_prior.to(prior_logits.dtype) if needs[1] else prior_logits.new_empty(0)
    statistics = reference.view(n, k), log_total.view(n, k), target_logit.view(n, k)
    return nll, *statistics, grad_rows.view(n, k, d) if needs[0] else grad_rows, grad_prior, grad_weight, grad_bias


def _write_loss(
    logits: Logits,  # of R rows, aligned
    inputs: LossInputs,  # of N tokens
    reference: Tensor,  # (R,) out
    a: Tensor,  # (R, ≥ V) out: dl / factor
    target_logit: Tensor,  # (R,) out
    outputs: LossOutputs,  # out
) -> None:
    n, k = inputs.prior_logits_ptr.shape
    exponentials = _exponentials(logits, inputs.target_ptr, reference, a, target_logit, k)
    sizes = n, logits.n_classes, exponentials.tile_total_ptr.shape[0]
    constants = {"K": k, "TOKENS": 2, "EXPERTS": triton.next_power_of_2(k), "TILES": 32}
    launch(gradients.mix_kernel, (triton.cdiv(n, 2),), reference, exponentials, inputs, outputs, *sizes, **constants)


def _exponentials(
    logits: Logits,  # of R rows, aligned
    target: Tensor,  # (R / n_experts,)
    reference: Tensor,  # (R,) out
    a: Tensor,  # (R, ≥ V) out: exp(l − reference), 0 at the target
    target_logit: Tensor,  # (R,) out
    n_experts: int,
) -> Exponentials:
    z, e, bias, n, n_classes = logits
    tile, constants = choose_tile("gradient", z, n)
    first_classes = min(tile.classes, n_classes)
    first_bias = None if bias is None else bias[:first_classes]
    first_tile = Logits(z, e[:first_classes], first_bias, n, first_classes)
    forward.write_statistics(first_tile, None, reference, torch.empty_like(reference), None)
    n_tiles = triton.cdiv(n_classes, tile.classes)
    out = Exponentials(a, empty_float32(z, n_tiles, n), empty_float32(z, n_tiles, n), target_logit, a.stride(0))
    arguments = logits, target, reference, out
    constants |= {"D": e.shape[1], "EXPERTS": n_experts}
    launch(gradients.exponentials_kernel, (triton.cdiv(n, tile.rows), n_tiles), *arguments, **constants)
    # half the rows and more warps, since it holds more in registers
    rows = max(tile.rows // 2, 16)
    constants |= {"TILE": constants["TILE"]._replace(rows=rows), "warps": 8}
    launch(gradients.recheck_kernel, (triton.cdiv(n, rows),), *arguments, **constants)
    return out


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
        tile, constants = choose_tile("mixture-gradient", z, n_tokens)
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
    tile, constants = choose_tile("mixture-gradient", z, n)
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
