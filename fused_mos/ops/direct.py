"""Calls an op's function directly, past torch's dispatcher, whose Python overhead for a custom op exceeds a small
kernel.

This is done for ordinary calls: plain tensors with memory, and no tracing, dispatch mode (fake tensors, a FLOP counter)
or transform of torch.func. All other calls go through the op, with equal results.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import Parameter


def _are_plain(arguments: Iterable[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if type(argument) not in (Tensor, Parameter) or argument.device.type == "meta":
                return False
        elif isinstance(argument, list | tuple) and not _are_plain(argument):
            return False
    return True


def _nobody_looks_on() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def is_ordinary(arguments: Iterable[Any]) -> bool:
    """True if all tensors have values and nothing traces or transforms operations on them."""
    return not torch.compiler.is_compiling() and _nobody_looks_on() and _are_plain(arguments)


def direct(
    op: CustomOpDef,
    function: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return a function that calls `function` in an ordinary call and `op` otherwise, with the op's own gradient."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:  # without ctx, torch would inspect the signature in each call
            output = function(*arguments)
            assert setup_context is not None
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            assert backward is not None
            return backward(ctx, *gradients)

    Differentiable.__name__ = op._name

    def call(*arguments: Any) -> Any:
        if not is_ordinary(arguments):
            return op(*arguments)
        wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        if wanted and backward is not None:
            return Differentiable.apply(*arguments)
        with torch.no_grad():
            return function(*arguments)

    return call
