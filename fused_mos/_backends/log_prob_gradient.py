"""Gradients of log-probabilities that are formulas of a few numbers, and so need no (N, V) tensor."""

from typing import NamedTuple

from torch import Tensor


class LogProbGradient(NamedTuple):
    """G[n,v] = token[n]·of_class[v] + at_target[n]·1[v = target[n]] + (log_term[n]·log p[n,v] + linear_term[n])·p[n,v].

    A part that is None is 0. An entropy has log_term = linear_term = −1; label smoothing has `of_class`.
    """

    token: Tensor | None = None  # (N,), with of_class
    of_class: Tensor | None = None  # (V,)
    at_target: Tensor | None = None  # (N,), with target
    target: Tensor | None = None  # (N,) int64
    log_term: Tensor | None = None  # (N,)
    linear_term: Tensor | None = None  # (N,)
