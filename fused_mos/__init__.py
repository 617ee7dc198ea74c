"""fused_mos: the Mixture of Softmaxes at the cost of its matrix products."""

from . import functional
from ._backends import backends
from ._linear import LinearCrossEntropyLoss
from .module import MoC, MoS, Softmax

__version__ = "0.2.0"

__all__ = ["LinearCrossEntropyLoss", "MoC", "MoS", "Softmax", "backends", "functional"]
