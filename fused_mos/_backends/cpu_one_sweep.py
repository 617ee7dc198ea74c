"""Calls to the native CPU kernel that computes the mixture and its normalisers in one product instead of two."""

import torch
from torch import Tensor

# import it after torch, so that both use the OpenMP runtime that torch loaded
from .. import _cpu  # type: ignore[attr-defined]  # compiled, without stubs
from . import cpu_operands
from .cpu_operands import BLOCK, address, empty_statistics, equal_blocks, head_of, padded_classes
from .reference import log_softmax_prior
from .transform import IDENTITY, Transform

MIN_ROWS = 40
"""Fewest rows of a block for a single sweep: each block reads the whole weight, so fewer rows are memory-bound."""


def _tokens_of_block(n_tokens: int, n_experts: int, n_classes: int, n_features: int) -> int:
    """Number of tokens whose exponentials over the whole vocabulary fit in the workspace; 0 if it is too small."""
    bytes_of_row = 4 * (padded_classes(n_classes) + n_features)
    rows = cpu_operands.WORKSPACE_BYTES // bytes_of_row
    if rows > BLOCK:
        rows -= rows % BLOCK
    return equal_blocks(n_tokens, rows // n_experts)


def one_sweep_pays(n_tokens: int, n_experts: int, n_classes: int, n_features: int) -> bool:
    if n_tokens == 0:
        return False
    held = _tokens_of_block(n_tokens, n_experts, n_classes, n_features)
    return held * n_experts >= min(MIN_ROWS, n_tokens * n_experts)


def log_prob_and_normalisers(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, V), (N, K), (N, K)
    log_p = latent.new_empty(latent.shape[0], weight.shape[0], dtype=torch.float32)
    return log_p, *_in_one_sweep(latent, prior_logits, weight, bias, transform, log_prob=log_p)


def predict_in_one_sweep(
    latent: Tensor,  # (N, K, D)
    prior_logits: Tensor,  # (N, K)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    transform: Transform = IDENTITY,
) -> Tensor:  # (N,)
    best = torch.empty(latent.shape[0], dtype=torch.int64, device=latent.device)
    _in_one_sweep(latent, prior_logits, weight, bias, transform, best=best)
    return best


def _in_one_sweep(
    latent: Tensor,
    prior_logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    log_prob: Tensor | None = None,
    best: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill `log_prob` (N, V) or `best` (N,), and return maximum and log_total, (N, K) each."""
    n, k, _ = latent.shape
    head, bias = head_of(weight, bias, transform)
    log_prior = log_softmax_prior(prior_logits).float()
    maximum, log_total = empty_statistics(latent, n, k, count=2)
    _cpu.mixture_in_one_sweep(
        head,
        latent=address(latent),
        log_prior=address(log_prior),
        n_tokens=n,
        n_experts=k,
        tokens_of_block=max(_tokens_of_block(n, k, *weight.shape), 1),
        maximum=address(maximum),
        log_total=address(log_total),
        log_prob=address(log_prob),
        best=address(best),
    )
    return maximum, log_total
