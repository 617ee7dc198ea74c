"""Ordinary calls of an op, past torch's dispatcher, whose Python around a custom op takes longer than a small kernel.

An ordinary call has plain tensors with memory, and nobody who looks on: no tracing, no dispatch mode (fake tensors, a
FLOP counter), no transform of torch.func. All others go to the op, with equal results.
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
    """Whether these tensors have values, and nothing traces or transforms what is done with them."""
    return not torch.compiler.is_compiling() and _nobody_looks_on() and _are_plain(arguments)


def direct(
    op: CustomOpDef,
    function: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """What calls `op`, or in an ordinary call its function; with the gradient that is registered for it."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:  # with ctx: torch would else ask for the signature in each call
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
