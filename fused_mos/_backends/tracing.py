"""Marks on functions that torch.compile reads while it traces them."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def assume_constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result` for programs that may never compile: that one imports torch._dynamo,
    which takes as long as importing torch, to set the same attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
