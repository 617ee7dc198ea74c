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


@assume_constant_result
def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which torch before 2.13 takes for True in whatever torch.compile traces."""
    return torch.compiler.is_exporting()


def has_memory(tensor: Tensor) -> bool:
    """False while a graph is traced, for a fake tensor and for one in which vmap wraps others: there are no values to
    read, and no address to give."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor) and not is_batched(tensor)


def is_batched(tensor: Tensor) -> bool:
    """True for a gradient of torch.autograd.grad(is_grads_batched=True), in which torch's old vmap wraps others."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(tensor)
