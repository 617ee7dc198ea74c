"""torch.library custom ops, the layer between `functional` and the backends: autograd, fake kernels and dispatch.

An op is opaque to torch.compile, so no (N, K, V) tensor can appear in a graph. It checks its arguments before it takes
an address, since it can also be called as `torch.ops.fused_mos.…`. The differentiable ops are

    fused_mos::nll                 per-token NLL; its backward recomputes the logits (4 products)
    fused_mos::nll_with_gradients  the same with the gradient of its sum, formed in the forward pass (3 products)
    fused_mos::expert_log_prob     l − L of given classes, (N, K, M), and L, (N, K)
    fused_mos::likelihood_and_sum  log p of a class and a sum over all log p, (N,) each
    fused_mos::logsumexp           log Σ_v exp l, (N, K)
    fused_mos::log_prob            log-probabilities of all classes, (N, V)

Outputs are float32 for 16-bit inputs. Gradients have the dtype of their input. Double backward raises RuntimeError; use
the `reference` backend, which is plain torch, for that.
"""

from .. import _flops
from .autograd import refuse_double_backward
from .distribution import (
    log_prob,
    log_prob_backward,
    mixture_log_prob,
    mixture_topk,
    normalisers,
    predict,
    sample,
    topk,
)
from .experts import expert_log_prob, expert_log_prob_backward, logsumexp, logsumexp_backward, row_statistics
from .losses import call_nll, call_nll_with_gradients, nll, nll_backward, nll_with_gradients, scaled
from .sums import likelihood_and_sum, mixture_sum, mixture_sum_backward

__all__ = [
    "call_nll",
    "call_nll_with_gradients",
    "likelihood_and_sum",
    "mixture_sum",
    "mixture_sum_backward",
    "expert_log_prob",
    "expert_log_prob_backward",
    "log_prob",
    "log_prob_backward",
    "logsumexp",
    "logsumexp_backward",
    "mixture_log_prob",
    "mixture_topk",
    "nll",
    "nll_backward",
    "nll_with_gradients",
    "normalisers",
    "predict",
    "refuse_double_backward",
    "row_statistics",
    "sample",
    "scaled",
    "topk",
]

_flops.register()
