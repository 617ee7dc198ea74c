"""How many floating point operations the ops take, for torch.utils.flop_counter.FlopCounterMode, which sees nothing of
what is inside an op.

As torch does, it counts matrix products alone, and those that are done, recomputed ones too: of a prior or a bias there
are none.
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
    """(N, K, D) times (V, D)."""
    return 2 * prod(latent) * weight[0]


def _backward(latent: Sequence[int], weight: Sequence[int], latent_needed: bool, weight_needed: bool, *others: bool):
    """The logits once more, where any gradient needs them, and a product for each of two gradients."""
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
    gathered = index[1] if index[1] > 1 else 0  # a single class comes with the normalisers
    return _product(latent, weight) + 2 * prod(latent) * gathered


def _expert_log_prob_backward(grad, grad_lse, latent, weight, bias, index, *others, out_shape=None):
    needs = others[3]
    gathered = index[1] * (needs[0] + needs[1]) if index[1] > 1 else 0
    return _backward(latent, weight, *needs) + 2 * prod(latent) * gathered


def _sample(latent, prior_logits, weight, *_, out_shape=None):
    n, _, d = latent
    return _product((n, d), weight)  # of one expert for each token


def _likelihood_and_sum(latent, prior_logits, weight, bias, target, kind, *_, out_shape=None):
    sweeps = 1 if kind == "entropy" and latent[1] == 1 else 2
    return sweeps * _product(latent, weight)


def _mixture_sum_backward(grad, grad_target, grad_lse, latent, prior_logits, weight, *others, out_shape=None):
    needs = others[10]
    return _backward(latent, weight, needs[0], needs[2], needs[3])


def _log_prob(latent, prior_logits, weight, bias, backend, *_, out_shape=None):
    """The normalisers, and then the probabilities, unless the backend has both at once."""
    sweeps = 1 if one_sweep_pays(backend, *latent[:2], *weight) else 2
    return sweeps * _product(latent, weight)


def _topk(latent, prior_logits, weight, bias, k, backend, *_, out_shape=None):
    return _log_prob(latent, prior_logits, weight, bias, backend)


def _log_prob_backward(grad, latent, prior_logits, weight, *others, out_shape=None):
    """Two sweeps over the classes: the first finds what the second subtracts."""
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
"""By the names of the ops; "scaled" has no product."""


def register() -> None:
    """Now if the counter has been imported, else as soon as it is: it takes longer to import than this package, and
    brings triton."""
    if COUNTER in sys.modules:
        _register_all()
    else:
        sys.meta_path.insert(0, _WithCounter())


def _register_all() -> None:
    counter = sys.modules[COUNTER]
    for name, formula in FORMULAS.items():
        op = getattr(torch.ops.fused_mos, name)
        if op not in counter.flop_registry:  # this module may have been reloaded
            counter.register_flop_formula(op)(formula)


class _WithCounter(MetaPathFinder):
    """Finds no module, but registers the formulas behind the import of the counter."""

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
