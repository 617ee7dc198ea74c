"""What holds while torch traces the package's functions: marks that it reads, and tensors without memory."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

Function = TypeVar("Function", bound=Callable)


def assume_constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` for programs that may never compile: that one imports torch._dynamo,
    which takes as long as importing torch, to set the same attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_memory(tensor: Tensor) -> bool:
    """False while a graph is traced and for a fake tensor: there are no values to read, and no address to give."""
    return not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)
