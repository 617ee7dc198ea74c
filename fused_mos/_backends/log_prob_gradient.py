"""Gradients of log-probabilities given by a formula with a few numbers per token, without an (N, V) tensor."""

from typing import NamedTuple

from torch import Tensor


class LogProbGradient(NamedTuple):
    """G[n,v] = token[n]·of_class[v] + at_target[n]·1[v = target[n]] − entropy[n]·p[n,v] (log p[n,v] + 1).

    Parts that are None count as 0. Label smoothing uses `of_class`; `entropy` is the gradient of an entropy.
    """

    token: Tensor | None = None  # (N,), with of_class
    of_class: Tensor | None = None  # (V,)
    at_target: Tensor | None = None  # (N,), with target
    target: Tensor | None = None  # (N,) int64
    entropy: Tensor | None = None  # (N,)
