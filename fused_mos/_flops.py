"""FLOP formulas of the ops for torch.utils.flop_counter.FlopCounterMode, which cannot see inside a custom op.

Only matrix products count, as in torch's own formulas, and a recomputed product counts again, except the logits that a
CPU computes twice for want of memory in `nll_with_gradients`. The prior and the bias cost nothing.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from math import prod

import torch

from ._backends import one_sweep_pays

COUNTER = "torch.utils.flop_counter"


def _product(latent: Sequence[int], weight: Sequence[int]) -> int:
    """FLOPs of all logits, (N, K, D) times (V, D)."""
    return 2 * prod(latent) * weight[0]


def _backward(latent: Sequence[int], weight: Sequence[int], latent_needed: bool, weight_needed: bool, *others: bool):
    """One product recomputes the logits if any gradient is needed; latent and weight take one more each."""
    n_products = any((latent_needed, weight_needed, *others)) + latent_needed + weight_needed
    return n_products * _product(latent, weight)


def _nll(latent, prior_logits, weight, *_, out_shape=None):
    return _product(latent, weight)


def _nll_with_gradients(latent, prior_logits, weight, bias, target, ignore_index, eps, mean, needs, *_, out_shape=None):
    return _product(latent, weight) * (1 + needs[0] + needs[2])


def _nll_backward(grad, latent, prior_logits, weight, *others, out_shape=None):
    needs = others[7]
    return _backward(latent, weight, needs[0], needs[2], needs[3])


def _logsumexp(latent, weight, *_, out_shape=None):
    return _product(latent, weight)


def _logsumexp_backward(grad, latent, weight, *others, out_shape=None):
    needs = others[3]
    return _backward(latent, weight, *needs)


def _expert_log_prob(latent, weight, bias, index, *_, out_shape=None):
    gathered = index[1] if index[1] > 1 else 0  # the sweep for the normalisers finds a single class
    return _product(latent, weight) + 2 * prod(latent) * gathered


def _expert_log_prob_backward(grad, grad_lse, latent, weight, bias, index, *others, out_shape=None):
    needs = others[3]
    gathered = index[1] * (needs[0] + needs[1]) if index[1] > 1 else 0
    return _backward(latent, weight, *needs) + 2 * prod(latent) * gathered


def _sample(latent, prior_logits, weight, *_, out_shape=None):
    n, _, d = latent
    return _product((n, d), weight)  # each token needs the logits of one expert


def _likelihood_and_sum(latent, prior_logits, weight, bias, target, kind, *_, out_shape=None):
    sweeps = 1 if kind == "entropy" and latent[1] == 1 else 2
    return sweeps * _product(latent, weight)


def _mixture_sum_backward(grad, grad_target, grad_lse, latent, prior_logits, weight, *others, out_shape=None):
    needs = others[10]
    return _backward(latent, weight, needs[0], needs[2], needs[3])


def _log_prob(latent, prior_logits, weight, bias, backend, *_, out_shape=None):
    """One sweep for the normalisers and one for the probabilities, or a single sweep if the backend can."""
    sweeps = 1 if one_sweep_pays(backend, *latent[:2], *weight) else 2
    return sweeps * _product(latent, weight)


def _topk(latent, prior_logits, weight, bias, k, backend, *_, out_shape=None):
    return _log_prob(latent, prior_logits, weight, bias, backend)


def _log_prob_backward(grad, latent, prior_logits, weight, *others, out_shape=None):
    """Two sweeps over the classes: the first computes the sums that the second subtracts."""
    needs = others[3]
    return _product(latent, weight) + _backward(latent, weight, needs[0], needs[2], needs[3])


FORMULAS = {
    "nll": _nll,
    "nll_backward": _nll_backward,
    "nll_with_gradients": _nll_with_gradients,
    "normalisers": _nll,
    "expert_log_prob": _expert_log_prob,
    "expert_log_prob_backward": _expert_log_prob_backward,
    "logsumexp": _logsumexp,
    "logsumexp_backward": _logsumexp_backward,
    "log_prob": _log_prob,
    "log_prob_backward": _log_prob_backward,
    "likelihood_and_sum": _likelihood_and_sum,
    "mixture_log_prob": _nll,
    "mixture_sum": _nll,
    "mixture_sum_backward": _mixture_sum_backward,
    "mixture_topk": _nll,
    "predict": _log_prob,
    "topk": _topk,
    "sample": _sample,
    "row_statistics": _logsumexp,
}
"""Formula of each op, by name. The op "scaled" has no matrix product."""


def register() -> None:
    """Register the formulas now if the counter has been imported, else as soon as it is.

    Importing it here would take longer than importing this package, and would import triton.
    """
    if COUNTER in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _WithCounter())


def _register_all() -> None:
    counter = sys.modules[COUNTER]
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.fused_mos, name)
        if op not in counter.flop_registry:  # it is there already if this module was reloaded
            counter.register_flop_formula(op)(formula)


class _WithCounter(MetaPathFinder):
    """Registers the formulas right after the counter is imported. It finds no modules itself."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            _register_all()

        spec.loader.exec_module = execute_and_register
        return spec
