"""Uses of autograd on a loss and its gradients: retained graphs, in-place edits of results, batched gradients."""

import pytest
import torch
from problem import EXACT, problem
from torch.autograd import grad

from fused_mos import functional as F


@pytest.mark.parametrize("reduction", F.REDUCTIONS)
def test_gradients_are_the_caller_s(reduction, backend):
    """Clipping gradients in place does not change those of a second backward pass through a retained graph."""
    p = problem(7, 3, 5, 23).to(EXACT[backend][0])
    loss = p.nll(reduction=reduction, backend=backend).sum()
    inputs = p.inputs()
    first = grad(loss, inputs, retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.mul_(-3)
    for actual, wanted in zip(grad(loss, inputs), expected):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("reduction", F.REDUCTIONS)
def test_gradients_of_a_batch(reduction, backend):
    p = problem(7, 3, 5, 23).to(EXACT[backend][0])
    loss = p.nll(reduction=reduction, backend=backend)
    weights = torch.randn(4, *loss.shape, device=loss.device)
    batched = grad(loss, p.inputs(), weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        for actual, wanted in zip(batched, grad(loss, p.inputs(), weight, retain_graph=True)):
            torch.testing.assert_close(actual[i], wanted)
