"""Defines losses of transformed logits, and checks a backend's functions against them."""

import torch
from problem import INPUTS, Problem, assert_meets_criterion
from torch import Tensor

from fused_mos._backends import Transform, reference

ALL = (True,) * 4
"""`needs` for all gradients."""


def logits(p: Problem, transform: Transform) -> Tensor:  # (N, K, V)
    """The logits by definition, in the problem's dtype."""
    found = reference.logits(p.latent, p.weight, p.bias)
    if transform.softcap:
        found = transform.softcap * torch.tanh(found / transform.softcap)
    return found / transform.temperature


def log_joint(p: Problem, transform: Transform) -> Tensor:  # (N, K, V)
    log_prior = reference.log_softmax_prior(p.prior_logits)
    return log_prior[..., None] + torch.log_softmax(logits(p, transform), -1)


def log_prob(p: Problem, transform: Transform) -> Tensor:  # (N, V)
    return torch.logsumexp(log_joint(p, transform), 1)


def nll(p: Problem, transform: Transform) -> Tensor:  # (N,)
    return torch.nn.functional.nll_loss(log_prob(p, transform), p.target, ignore_index=-100, reduction="none")


def check(
    case: Problem, dtype: torch.dtype, ours: tuple[Tensor, ...], compute, grad: Tensor, slack: float = 0.0
) -> None:
    """Check an output, and the gradients of (latent, prior_logits, weight, bias) for its gradient `grad`, against
    `compute` of the problem in float64 and in `dtype`. `slack` is relative to the largest number. Empty gradients are
    skipped."""
    results = []
    for of_dtype in (dtype, torch.float64):
        p = case.to(of_dtype)
        output = compute(p)
        output.backward(grad.to(output.dtype))
        results.append((output.detach(), *(None if x is None else x.grad for x in p.inputs())))
    unfused, oracle = results
    for name, found, same_dtype, exact in zip(("forward", *INPUTS), ours, unfused, oracle, strict=True):
        if found.numel():
            factor, more = 2 if name == "forward" else 3, slack * exact.abs().max().item()
            assert_meets_criterion(found, same_dtype, exact, factor, dtype, name, more)


def unpacked(results: tuple[Tensor, ...]) -> tuple:
    """The results of `nll_with_gradients` with the gradients as one tuple."""
    return *results[:-4], results[-4:]
