"""Helpers for functions that torch may trace: markers for the tracer, and checks for tensors without memory."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

Function = TypeVar("Function", bound=Callable)


def assume_constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` without importing torch._dynamo, which takes as long as importing torch.
    It sets the same attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@assume_constant_result
def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, corrected for torch before 2.13, which assumes True in all that torch.compile
    traces."""
    return torch.compiler.is_exporting()


def has_memory(tensor: Tensor) -> bool:
    """False while a graph is traced, for fake tensors, and for tensors batched by vmap: they have no values to read
    and no address."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor) and not is_batched(tensor)


def is_batched(tensor: Tensor) -> bool:
    """True for gradients inside torch.autograd.grad(is_grads_batched=True), which torch's old vmap has batched."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(tensor)
