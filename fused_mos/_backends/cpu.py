"""Native fused MoS for CPU tensors: the functions of `Kernels` over csrc/cpu, for float32 and bfloat16.

The vocabulary is cut into panels of 128 classes. The logits of a panel and a block of rows stay in the L1 cache
from the product to their sums of exponentials; the backward passes keep them in a workspace of at most 40 MiB. Each sum
is made by one thread in a fixed order, so results do not depend on the number of threads. The instruction set is chosen
at run time (generic, avx2, avx512, avx512_bf16); the environment variable FUSED_MOS_ISA overrides the choice.

bfloat16 operands are multiplied as they are where the processor can (avx512_bf16), else widened; sums are float32.
"""

import torch
from torch import Tensor

# after torch, so that both use the OpenMP runtime that torch loaded
from .. import _cpu  # type: ignore[attr-defined]  # compiled, without stubs
from . import from_rows
from .from_rows import choose_rows  # noqa: F401  (part of `Kernels`)
from .reference import accumulation_dtype
from .tracing import assume_constant_result
from .transform import Transform

DTYPES = (torch.float32, torch.bfloat16)

WORKSPACE_BYTES = 40 * 2**20
"""Bytes of exponentials of all rows for a span of the vocabulary; and half as much for rows in the layout of the
products."""

FORWARD_WORKSPACE_BYTES = 58 * 2**20
"""Where gradients are formed in the forward pass: bytes of a block of tokens and of their exponentials over the whole
vocabulary and, for 16-bit gradients of several blocks, of their float32 sums (V, D)."""

MIN_GRADIENT_ROWS = 96
"""Rows of a block below which gradients are not formed in the forward pass: each block reads and writes the whole
weight gradient, so few rows make it memory-bound."""

PANEL = 128  # kPanel of csrc/cpu/product.h
BLOCK = 48  # the largest kBlock of csrc/cpu/product.h: rows come in blocks, of which the last is filled up


def instruction_set() -> str:
    """The instruction set that the kernels run with; ValueError where FUSED_MOS_ISA names none of this processor's."""
    return _cpu.instruction_set()


def availability() -> str:
    """The entry of this backend in `fused_mos.backends()`."""
    return f"available ({instruction_set()})"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _head(weight: Tensor, bias: Tensor | None) -> tuple[_cpu.Head, Tensor | None]:
    """The operands that all kernels share, and the float32 bias, which must outlive them."""
    bias = None if bias is None else bias.float().contiguous()
    head = _cpu.Head(
        weight=_address(weight),
        bias=_address(bias),
        n_classes=weight.shape[0],
        n_features=weight.shape[1],
        bf16=weight.dtype == torch.bfloat16,
        n_threads=torch.get_num_threads(),
        workspace_bytes=WORKSPACE_BYTES,
    )
    return head, bias


def _statistics(like: Tensor, *shape: int, count: int = 3) -> list[Tensor]:
    return [like.new_empty(shape, dtype=accumulation_dtype(like.dtype)) for _ in range(count)]


def row_statistics(
    rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    head, bias = _head(weight, bias)
    maximum, log_total, target_logit = _statistics(rows, rows.shape[0])
    _cpu.row_statistics(
        head,
        rows=_address(rows),
        n_rows=rows.shape[0],
        target=_address(target),
        maximum=_address(maximum),
        log_total=_address(log_total),
        target_logit=_address(target_logit),
    )
    return maximum, log_total, target_logit


class _Gradients:
    """Gradients of (rows, weight, bias) for the kernels to fill; of no elements where not needed."""

    def __init__(self, rows: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]):
        self.dtype = weight.dtype
        self.rows = torch.zeros_like(rows) if needs[0] else rows.new_empty(0)
        self.weight = torch.zeros_like(weight) if needs[1] else weight.new_empty(0)
        self.bias = weight.new_zeros(weight.shape[0] if needs[2] else 0, dtype=torch.float32)

    def addresses(self) -> _cpu.Gradients:
        return _cpu.Gradients(rows=_address(self.rows), weight=_address(self.weight), bias=_address(self.bias))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.weight, self.bias.to(self.dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    head, bias = _head(weight, bias)
    gradients = _Gradients(rows, weight, needs)
    grad_lse = grad_lse.float().contiguous()
    grad_target = None if grad_target is None else grad_target.float().contiguous()
    _cpu.rows_backward(
        head,
        rows=_address(rows),
        n_rows=rows.shape[0],
        target=_address(target),
        maximum=_address(maximum),
        log_total=_address(log_total),
        grad_lse=_address(grad_lse),
        grad_target=_address(grad_target),
        gradients=gradients.addresses(),
    )
    return gradients.results()


@assume_constant_result
def _exponential_bytes(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 and _cpu.bf16_products() else 4


def _tokens_of_block(n_tokens: int, n_experts: int, weight: Tensor) -> int:
    """Tokens whose exponentials over the whole vocabulary are held at once; 0 where the workspace is too small."""
    n_classes, n_features = weight.shape
    # its exponentials; and itself as operand of the logits and of dE, and the sums of its gradient, float32 at most
    bytes_of_row = _exponential_bytes(weight.dtype) * ((n_classes + PANEL - 1) // PANEL * PANEL) + 3 * 4 * n_features

    def tokens_in(n_bytes: int) -> int:
        rows = max(n_bytes, 0) // bytes_of_row
        return (rows - rows % BLOCK if rows > BLOCK else rows) // n_experts

    held = tokens_in(FORWARD_WORKSPACE_BYTES)
    if held < n_tokens and weight.dtype != torch.float32:
        held = tokens_in(FORWARD_WORKSPACE_BYTES - 4 * n_classes * n_features)
    if held == 0:
        return 0
    blocks = (n_tokens + held - 1) // held
    return (n_tokens + blocks - 1) // blocks  # blocks of about one size


def gradient_in_forward_pays(n_tokens: int, n_experts: int, weight: Tensor, bias: Tensor | None) -> bool:
    if n_tokens == 0:
        return False
    return _tokens_of_block(n_tokens, n_experts, weight) * n_experts >= min(MIN_GRADIENT_ROWS, n_tokens * n_experts)


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
) -> tuple[Tensor, ...]:
    n, k, _ = latent.shape
    head, bias = _head(weight, bias)
    gradients = _Gradients(latent, weight, (needs[0], needs[2], needs[3]))
    maximum, log_total, target_logit = _statistics(latent, n, k)
    nll = maximum.new_empty(n)
    grad_prior = maximum.new_empty((n, k) if needs[1] else (0,))
    log_prior = torch.log_softmax(prior_logits, -1, dtype=torch.float32)
    _cpu.nll_with_gradients(
        head,
        latent=_address(latent),
        log_prior=_address(log_prior),
        target=_address(target),
        valid=_address(valid),
        n_tokens=n,
        n_experts=k,
        tokens_of_block=max(_tokens_of_block(n, k, weight), 1) if n else 1,
        scale=scale.item(),
        filter_eps=filter_eps,
        nll=_address(nll),
        maximum=_address(maximum),
        log_total=_address(log_total),
        target_logit=_address(target_logit),
        grad_prior=_address(grad_prior),
        gradients=gradients.addresses(),
    )
    grad_latent, grad_weight, grad_bias = gradients.results()
    return nll, maximum, log_total, target_logit, grad_latent, grad_prior.to(prior_logits.dtype), grad_weight, grad_bias


def _mixture(latent: Tensor, log_prior: Tensor, maximum: Tensor, log_total: Tensor) -> _cpu.Mixture:
    return _cpu.Mixture(
        latent=_address(latent),
        log_prior=_address(log_prior),
        maximum=_address(maximum),
        log_total=_address(log_total),
        n_tokens=latent.shape[0],
        n_experts=latent.shape[1],
    )


def nll(*inputs):
    return from_rows.nll(row_statistics, *inputs)


def nll_backward(*inputs):
    return from_rows.nll_backward(rows_backward, *inputs)


def nll_with_gradients(*inputs):
    return from_rows.nll_with_gradients(_blocks_with_gradients, *inputs)


def normalisers(*inputs):
    return from_rows.normalisers(row_statistics, *inputs)


def log_prob(
    latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, maximum: Tensor, log_total: Tensor
) -> Tensor:
    head, bias = _head(weight, bias)
    result = maximum.new_empty(latent.shape[0], weight.shape[0])
    _cpu.mixture(head, _mixture(latent, log_prior, maximum, log_total), log_prob=_address(result), best=0)
    # the kernels' exponentials take NaN for a small number
    undefined = (log_prior + maximum + log_total).isnan().any(1)
    return result.masked_fill_(undefined[:, None], torch.nan) if undefined.any() else result


def predict(
    latent: Tensor, log_prior: Tensor, weight: Tensor, bias: Tensor | None, maximum: Tensor, log_total: Tensor
) -> Tensor:
    head, bias = _head(weight, bias)
    result = torch.empty(latent.shape[0], dtype=torch.int64, device=latent.device)
    _cpu.mixture(head, _mixture(latent, log_prior, maximum, log_total), log_prob=0, best=_address(result))
    return result


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
    head, bias = _head(weight, bias)
    gradients = _Gradients(latent, weight, (needs[0], needs[2], needs[3]))
    grad_prior = torch.zeros_like(maximum) if needs[1] else maximum.new_empty(0)
    grad = grad.float().contiguous()
    _cpu.mixture_backward(
        head,
        _mixture(latent, log_prior, maximum, log_total),
        grad=_address(grad),
        grad_prior=_address(grad_prior),
        gradients=gradients.addresses(),
    )
    grad_latent, grad_weight, grad_bias = gradients.results()
    return grad_latent, grad_prior, grad_weight, grad_bias


def sample(rows: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, seed: Tensor) -> Tensor:
    """Inverts each row's cumulative distribution: one uniform number a row, not one for each class."""
    head, bias = _head(weight, bias)
    generator = from_rows.generator_of(seed, "classes")
    uniform = torch.rand(rows.shape[0], dtype=torch.float64, generator=generator, device=rows.device)
    result = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    _cpu.sample(
        head,
        rows=_address(rows),
        n_rows=rows.shape[0],
        inverse_temperature=1 / transform.temperature,
        uniform=_address(uniform),
        sample=_address(result),
    )
    return result
