"""The native CPU backend: the functions of `Kernels` on top of csrc/cpu, for float32 and bfloat16.

The vocabulary is cut into panels of 128 classes. In the forward pass, the logits of a panel and a block of rows stay in
the L1 cache until their exponentials are summed. The backward passes and log-probabilities keep them in a workspace of
at most 40 MiB. One thread computes each sum in a fixed order, so results do not depend on the number of threads.

The instruction set is chosen at run time: the fastest of generic, avx2, avx512, avx512_bf16 and amx_bf16 that the
processor has. (On Intel avx512_bf16 is slower than avx512.) The environment variable FUSED_MOS_ISA overrides the
choice. bfloat16 operands are multiplied directly with amx_bf16 and avx512_bf16, and widened first otherwise. Sums are
float32.
"""

import torch
from torch import Tensor

# import it after torch, so that both use the OpenMP runtime that torch loaded
from .. import _cpu  # type: ignore[attr-defined]  # compiled, without stubs
from . import from_rows
from .cpu_mixture import log_prob, log_prob_backward, mixture_sum, mixture_sum_backward, predict, score  # noqa: F401
from .cpu_one_sweep import log_prob_and_normalisers, one_sweep_pays, predict_in_one_sweep  # noqa: F401
from .cpu_operands import BLOCK, PANEL, Gradients, address, empty_statistics, equal_blocks, head_of, padded_classes
from .from_rows import choose_rows  # noqa: F401  (these are part of `Kernels`)
from .random_numbers import generator_of
from .tracing import assume_constant_result
from .transform import IDENTITY, Transform

DTYPES = (torch.float32, torch.bfloat16)

FORWARD_WORKSPACE_BYTES = 80 * 2**20
"""Bytes of workspace to form gradients in the forward pass. It holds a block of tokens, their exponentials over the
whole vocabulary and, for 16-bit gradients of several blocks, their float32 sums (V, D)."""

MAX_FORWARD_WORKSPACE_BYTES = 192 * 2**20
"""Bytes to which the workspace grows for a large decoder, with 4·V·D."""

MIN_GRADIENT_ROWS = 96
"""Fewest rows of a block to form gradients in the forward pass: each block reads and writes the whole weight gradient,
so fewer rows are memory-bound."""

MIN_GRADIENT_ROWS_WITH_AMX = 1024
"""The same with AMX, which makes the saved product cheaper."""

MIN_CLASSES_HELD = 1 / 16
"""Smallest part of the vocabulary whose exponentials are worth holding for all tokens if no block of tokens fits."""


def instruction_set() -> str:
    """The instruction set that the kernels use. Raises ValueError if FUSED_MOS_ISA names one that is not here."""
    return _cpu.instruction_set()


def availability() -> str:
    """The entry of this backend in `fused_mos.backends()`."""
    return f"available ({instruction_set()}{'' if _cpu.threaded else ', single-threaded: built without OpenMP'})"


def row_statistics(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:
    return _statistics_of_rows(rows, weight, bias, target, transform, with_entropy=False)  # type: ignore[return-value]


def row_entropy(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _statistics_of_rows(rows, weight, bias, target, transform, with_entropy=True)  # type: ignore[return-value]


def _statistics_of_rows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, transform: Transform, with_entropy: bool
) -> tuple[Tensor, ...]:
    head, bias = head_of(weight, bias, transform)
    maximum, log_total, target_logit, *entropy = found = empty_statistics(rows, rows.shape[0], count=3 + with_entropy)
    _cpu.row_statistics(
        head,
        rows=address(rows),
        n_rows=rows.shape[0],
        target=address(target),
        maximum=address(maximum),
        log_total=address(log_total),
        target_logit=address(target_logit),
        entropy=address(entropy[0]) if with_entropy else 0,
    )
    return tuple(found)


def rows_backward(
    rows: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor | None,  # (R,)
    maximum: Tensor,  # (R,)
    log_total: Tensor,  # (R,)
    grad_lse: Tensor,  # (R,)
    grad_target: Tensor | None,  # (R,)
    needs: tuple[bool, bool, bool],
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:
    head, bias = head_of(weight, bias, transform)
    gradients = Gradients(rows, weight, needs)
    grad_lse = grad_lse.float().contiguous()
    grad_target = None if grad_target is None else grad_target.float().contiguous()
    _cpu.rows_backward(
        head,
        rows=address(rows),
        n_rows=rows.shape[0],
        target=address(target),
        maximum=address(maximum),
        log_total=address(log_total),
        grad_lse=address(grad_lse),
        grad_target=address(grad_target),
        gradients=gradients.addresses(),
    )
    return gradients.results()


@assume_constant_result
def _exponential_bytes(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 and _cpu.bf16_products() else 4


@assume_constant_result
def _uses_amx(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and instruction_set() == "amx_bf16"


def _held_exponentials(n_tokens: int, n_experts: int, weight: Tensor) -> tuple[int, int]:
    """Returns the tokens of a block and the classes whose exponentials the workspace holds for it.

    If enough tokens fit, these are all classes and as few blocks as possible. Otherwise one block has all tokens and
    holds some of the classes; the logits of the others are computed twice. Returns (0, 0) if neither pays.
    """
    n_classes, n_features = weight.shape
    n_rows, n_panels = n_tokens * n_experts, padded_classes(n_classes) // PANEL
    if n_rows == 0:
        return 0, 0
    float32_bytes = 4 * n_classes * n_features
    workspace = max(FORWARD_WORKSPACE_BYTES, min(MAX_FORWARD_WORKSPACE_BYTES, float32_bytes))
    with_amx = _uses_amx(weight.dtype)
    block = BLOCK if with_amx else BLOCK // 2  # a multiple of kBlock
    # a row packed twice (for the logits and for dE) and its gradient, all at most float32; two statistics per panel
    bytes_of_row = 3 * 4 * n_features + 2 * 4 * n_panels
    bytes_of_panel = _exponential_bytes(weight.dtype) * PANEL

    def tokens_in(n_bytes: int) -> int:
        rows = max(n_bytes, 0) // (n_panels * bytes_of_panel + bytes_of_row)
        return (rows - rows % (BLOCK if rows > BLOCK else block)) // n_experts

    tokens = tokens_in(workspace)
    if tokens < n_tokens and weight.dtype != torch.float32:
        tokens = tokens_in(workspace - float32_bytes)
    tokens = equal_blocks(n_tokens, tokens)
    min_rows = MIN_GRADIENT_ROWS_WITH_AMX if with_amx else MIN_GRADIENT_ROWS
    if tokens * n_experts >= min(min_rows, n_rows):
        return tokens, n_classes
    lanes = (n_rows + block - 1) // block * block
    panels = max(workspace - lanes * bytes_of_row, 0) // (lanes * bytes_of_panel)
    pays = panels >= max(MIN_CLASSES_HELD * n_panels, 1) and not with_amx
    return (n_tokens, min(panels * PANEL, n_classes)) if pays else (0, 0)


def gradient_in_forward_pays(n_tokens: int, n_experts: int, weight: Tensor, bias: Tensor | None) -> bool:
    return n_tokens > 0 and _held_exponentials(n_tokens, n_experts, weight)[0] > 0


def _blocks_with_gradients(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    valid: Tensor,  # (N,) bool
    scale: Tensor,  # ()
    filter_eps: float,
    needs: tuple[bool, bool, bool, bool],
    transform: Transform = IDENTITY,
    loss_weights: Tensor | None = None,  # (3, N) float32, 0 for invalid tokens
) -> tuple[Tensor, ...]:
    n, k, _ = latent.shape
    head, bias = head_of(weight, bias, transform)
    gradients = Gradients(latent, weight, (needs[0], needs[2], needs[3]))
    maximum, log_total, target_logit = empty_statistics(latent, n, k)
    nll = maximum.new_empty(n)
    grad_prior = maximum.new_empty((n, k) if needs[1] else (0,))
    log_prior = torch.log_softmax(prior_logits, -1, dtype=torch.float32)
    tokens_of_block, classes_held = _held_exponentials(n, k, weight)
    _cpu.nll_with_gradients(
        head,
        latent=address(latent),
        log_prior=address(log_prior),
        target=address(target),
        valid=address(valid),
        n_tokens=n,
        n_experts=k,
        tokens_of_block=max(tokens_of_block, 1),
        classes_held=classes_held or weight.shape[0],
        scale=scale.item(),
        loss_weights=address(loss_weights),
        filter_eps=filter_eps,
        nll=address(nll),
        maximum=address(maximum),
        log_total=address(log_total),
        target_logit=address(target_logit),
        grad_prior=address(grad_prior),
        gradients=gradients.addresses(),
    )
    grad_latent, grad_weight, grad_bias = gradients.results()
    return nll, maximum, log_total, target_logit, grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


def nll(*inputs):
    return from_rows.nll(row_statistics, *inputs)


def nll_backward(*inputs):
    return from_rows.nll_backward(rows_backward, *inputs)


def nll_with_gradients(*inputs):
    return from_rows.nll_with_gradients(_blocks_with_gradients, *inputs)


def normalisers(*inputs):
    return from_rows.normalisers(row_statistics, *inputs)


def sample(rows: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, seed: Tensor) -> Tensor:
    """Draw by inverting each row's cumulative distribution. It needs one random number per row, not per class."""
    head, bias = head_of(weight, bias, transform)
    generator = generator_of(seed, "classes")
    uniform = torch.rand(rows.shape[0], dtype=torch.float64, generator=generator, device=rows.device)
    result = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    _cpu.sample(head, rows=address(rows), n_rows=rows.shape[0], uniform=address(uniform), sample=address(result))
    return result
