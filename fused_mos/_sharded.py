"""Autograd functions over the ranks of a process group, each with a span of the classes. `vocab_parallel.VocabShard`
uses them. All ranks share the latent vectors, so each backward pass sums the gradients of `latent` over the ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from ._backends import Sum
from ._backends.reference import log_softmax_prior, mix_target
from ._losses import NONE
from .ops.sums import at_top

IGNORED, ELSEWHERE = -100, NONE
"""Special targets of a shard: an ignored one, and one that is not among its classes but may be on another rank. Its own
classes count from 0."""


def combined_statistics(
    latent: Tensor,  # (N, K, D)
    weight: Tensor,  # (V of this rank, D)
    bias: Tensor | None,  # (V of this rank,)
    target: Tensor | None,  # (N,), IGNORED, ELSEWHERE or a class of this rank
    group: dist.ProcessGroup,
    options: tuple[str, float, float],  # backend, softcap and temperature
) -> tuple[Tensor, ...]:  # (N, K) each
    """maximum and log_total over all shards and, if there are targets, their logits. Ranks exchange at most three
    numbers per row."""
    own_maximum, own_log_total, own_logit = ops.row_statistics(latent, weight, bias, target, *options)
    maximum = own_maximum.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
    terms = [(own_log_total + (own_maximum - maximum)).exp()]
    if target is not None:
        terms.append(torch.where((target >= 0)[:, None], own_logit, 0))
    sums = torch.stack(terms)
    dist.all_reduce(sums, group=group)
    total, *target_logit = sums
    return maximum, total.log(), *target_logit


class ShardedNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latent, prior_logits, weight, bias, target, group, options) -> tuple[Tensor, Tensor]:
        _, backend, softcap = options
        statistics = combined_statistics(latent, weight, bias, target, group, (backend, softcap, 1.0))
        losses, _ = mix_target(log_softmax_prior(prior_logits).to(statistics[0].dtype), *statistics)
        ctx.save_for_backward(latent, prior_logits, weight, bias, target, *statistics)
        ctx.set_materialize_grads(False)
        ctx.group, ctx.options = group, options
        return torch.where(target == IGNORED, 0, losses), statistics[0] + statistics[1]

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
        ops.refuse_double_backward()
        needs, others = list(ctx.needs_input_grad[:4]), (None,) * 3
        if grad is None and grad_lse is None:
            return (None,) * 4 + others
        latent, *_, log_total, _ = saved = ctx.saved_tensors
        grad = log_total.new_zeros(latent.shape[0]) if grad is None else grad.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        filter_eps, backend, softcap = ctx.options
        gradients = ops.nll_backward(grad, *saved, IGNORED, filter_eps, needs, backend, softcap, grad_lse)
        if needs[0]:
            dist.all_reduce(gradients[0], group=ctx.group)
        return *(gradient if need else None for gradient, need in zip(gradients, needs)), *others


class ShardedExperts(torch.autograd.Function):
    """`ops.expert_log_prob` over all ranks' classes. `index` counts from this rank's first class."""

    @staticmethod
    def forward(ctx, latent, weight, bias, index, group, options) -> tuple[Tensor, Tensor]:
        *_, own_maximum, own_log_total, own_logits = ops.expert_log_prob(latent, weight, bias, index, *options)
        maximum = own_maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
        total = (own_log_total + (own_maximum - maximum)).exp()
        logits = torch.where((index >= 0)[:, None], own_logits, 0)
        dist.all_reduce(total, group=group)
        dist.all_reduce(logits, group=group)
        log_total = total.log()
        ctx.save_for_backward(latent, weight, bias, index, maximum, log_total, logits)
        ctx.group, ctx.options = group, options
        return (logits - maximum[..., None]) - log_total[..., None], maximum + log_total

    @staticmethod
    def backward(ctx, grad: Tensor, grad_lse: Tensor):
        ops.refuse_double_backward()
        needs, given = list(ctx.needs_input_grad[:3]), (grad.contiguous(), grad_lse.contiguous())
        gradients = ops.expert_log_prob_backward(*given, *ctx.saved_tensors, needs, *ctx.options)
        if needs[0]:
            dist.all_reduce(gradients[0], group=ctx.group)
        return *(gradient if need else None for gradient, need in zip(gradients, needs)), None, None, None


class ShardedSum(torch.autograd.Function):
    """`ops.likelihood_and_sum` over all ranks' classes. `target` counts from this rank's first class."""

    @staticmethod
    def forward(ctx, latent, prior_logits, weight, bias, target, group, of_sum, options) -> tuple[Tensor, ...]:
        statistics = combined_statistics(latent, weight, bias, target, group, options)
        maximum, log_total, _ = statistics
        log_prior = log_softmax_prior(prior_logits).to(maximum.dtype)
        nll, _ = mix_target(log_prior, *statistics)
        given = latent, log_prior, weight, bias, maximum, log_total
        value, s, _, log_p = ops.mixture_sum(*given, *of_sum, *options)
        if of_sum[0] == "tempered":
            peak = value.clone()
            dist.all_reduce(peak, dist.ReduceOp.MAX, group)
            share = torch.exp(value - peak)
            s, total = s * share[:, None], share
        else:
            peak, total = torch.zeros_like(value), value
        sums = torch.cat([s, total[:, None]], 1)
        dist.all_reduce(sums, group=group)
        s, total = sums[:, :-1].contiguous(), sums[:, -1].contiguous()
        if of_sum[0] == "tempered":
            s, total = s / total[:, None], peak + total.log()
        s = Sum(of_sum[0]).completed(s, log_prior)
        ctx.save_for_backward(latent, prior_logits, weight, bias, target, *statistics, s, total, of_sum[1])
        dist.all_reduce(log_p, dist.ReduceOp.MAX, group)
        is_top1 = at_top(-nll, log_p)
        ctx.mark_non_differentiable(is_top1)
        ctx.group, ctx.of_sum, ctx.options = group, of_sum, options
        return -nll, maximum + log_total, total, is_top1

    @staticmethod
    def backward(ctx, grad_likelihood: Tensor, grad_lse: Tensor, grad_value: Tensor, *_):
        ops.refuse_double_backward()
        *saved, class_weight = ctx.saved_tensors
        needs, (kind, _, mixture_temperature) = list(ctx.needs_input_grad[:4]), ctx.of_sum
        grads = (grad.contiguous() for grad in (grad_value, grad_likelihood, grad_lse))
        of_sum = kind, class_weight, mixture_temperature
        gradients = ops.mixture_sum_backward(*grads, *saved, *of_sum, needs, *ctx.options)
        if needs[0]:
            dist.all_reduce(gradients[0], group=ctx.group)
        return *(gradient if need else None for gradient, need in zip(gradients, needs)), *(None,) * 4


class RanksSum(torch.autograd.Function):
    """Sum over ranks. All ranks compute the same thing from the sum, so each has the whole gradient of its own term."""

    @staticmethod
    def forward(ctx, term: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = term.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None
