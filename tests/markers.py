"""Marks slow tests automatically by the reason why they are slow."""

import functools
import inspect
import multiprocessing
import subprocess
from pathlib import Path
from types import CodeType, FunctionType

import pytest
import torch
from backends import triton

TESTS = Path(__file__).parent
STARTERS = (subprocess, multiprocessing, torch.multiprocessing)


def add_markers(item: pytest.Item) -> None:
    """Add `interpreted` if a parameter names the interpreted Triton backend, and `processes` if the test's code starts
    processes. If a fixture or the package does so, the test needs its own mark."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if triton and triton.INTERPRETED and any(isinstance(value, str) and value == "triton" for value in parameters):
        item.add_marker("interpreted")
    if starts_processes(item.function):
        item.add_marker("processes")


@functools.cache  # each test function has many parameters
def starts_processes(test) -> bool:
    return _starts_processes(inspect.unwrap(test), set())


def _starts_processes(function: FunctionType, seen: set[FunctionType]) -> bool:
    """True if `function`, or a test function that it calls, names a module that starts processes."""
    seen.add(function)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if any(value is module for module in STARTERS):
            return True
        if _of_the_tests(value) and value not in seen and _starts_processes(value, seen):
            return True
    return False


def _of_the_tests(value: object) -> bool:
    return isinstance(value, FunctionType) and TESTS in Path(value.__code__.co_filename).parents


def _names(code: CodeType) -> set[str]:
    """Names that the code, or a function in it, looks up."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
