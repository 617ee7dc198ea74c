"""CUDA tensors where there is no device: torch's fake ones, and a backward pass for them.

`make check-cuda` runs the tests of this folder in an environment with torch's CUDA wheel, which imports without a GPU.
They are skipped elsewhere: a CPU wheel has no CUDA tensors, and on a GPU the other tests see more.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

only_without_a_device = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="is for torch's CUDA wheel without a GPU: make check-cuda",
)

N, K, D, V, H = 20, 3, 16, 50, 12
"""Tokens, experts, latent features, classes, and a head's input features."""


def fake_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of `functional.mos_nll_loss`; for use within a FakeTensorMode."""
    shapes = {"latent": (N, K, D), "prior_logits": (N, K), "weight": (V, D), "bias": (V,)}
    inputs = {
        name: torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True) for name, shape in shapes.items()
    }
    return inputs | {"target": torch.zeros(N, device="cuda", dtype=torch.int64)}


def assert_like(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert tensor.device == torch.device("cuda", 0)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)


@contextlib.contextmanager
def autocast(enabled: bool) -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16)`, which switches itself off where there is no device."""
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Sequence[Tensor | None] | None = None,
    **_,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` in Python. torch's own engine asks for the device's streams, which needs the device; the
    nodes that it would call do not.

    Also AOTAutograd traces a backward pass by `torch.autograd.grad`, for which tests put this one in its place.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    roots = [get_gradient_edge(tensor) for tensor in outputs]
    wanted = [get_gradient_edge(tensor) for tensor in inputs]
    received: dict[Node, list[Tensor | None]] = {}
    for edge, output, gradient in zip(roots, outputs, grad_outputs or [None] * len(outputs)):
        _receive(received, edge.node, edge.output_nr, torch.ones_like(output) if gradient is None else gradient)

    leaves = {edge.node for edge in wanted}
    with torch.no_grad():
        for node in _in_order([edge.node for edge in roots]):
            if node not in received or node in leaves and not node.next_functions:
                continue
            results = _called(node, received[node])
            for (successor, number), result in zip(node.next_functions, results):
                if successor is not None and result is not None:
                    _receive(received, successor, number, result)
    return tuple(received[edge.node][edge.output_nr] if edge.node in received else None for edge in wanted)


def _called(node: Node, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if not isinstance(node, BackwardCFunction):
        results = node(*gradients)
    elif "CompiledFunction" in node.name():  # a graph, which takes zeros for an output that no gradient came to
        zeros = [torch.zeros(like.shape, dtype=like.dtype, device=like.device) for like in node._input_metadata]
        results = node.apply(*(zero if gradient is None else gradient for gradient, zero in zip(gradients, zeros)))
    else:
        results = node.apply(*gradients)
    return results if isinstance(results, tuple) else (results,)


def _receive(received: dict[Node, list[Tensor | None]], node: Node, number: int, gradient: Tensor) -> None:
    """Adds a gradient to those of a node's outputs, reduced to the shape and dtype that the output had: formulas of
    operations that broadcast leave that to the engine."""
    outputs = node._input_metadata
    like = outputs[number]
    gradient = gradient.sum_to_size(like.shape).to(like.dtype)
    gradients = received.setdefault(node, [None] * len(outputs))
    before = gradients[number]
    gradients[number] = gradient if before is None else before + gradient


def _in_order(roots: list[Node]) -> list[Node]:
    """All nodes, each before those that its results go to."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for successor, _ in node.next_functions:
            if successor is not None:
                visit(successor)
        order.append(node)

    for root in roots:
        visit(root)
    return order[::-1]
