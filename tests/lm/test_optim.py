"""NT-ASGD: its steps, its trigger and its averages, by hand."""

import pytest
import torch
from torch import nn

from fused_mos.lm import NTASGD


def make(**options):
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    return parameter, NTASGD([parameter], lr=0.5, **options)


def step(parameter, optimizer, gradient, scale=1.0):
    optimizer.zero_grad()
    parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step(scale)


def test_sgd_steps_with_weight_decay_and_scale():
    parameter, optimizer = make(weight_decay=0.1)
    step(parameter, optimizer, [1.0, 0.0], scale=0.2)
    assert parameter.tolist() == pytest.approx([1 - 0.1 * (1 + 0.1), -2 + 0.1 * 0.2])


def test_averaging_starts_when_validation_is_worse_than_all_but_the_last_values():
    _, optimizer = make(nonmono=3)
    for value in (5.0, 4.0, 3.0):
        optimizer.record(value)
    optimizer.record(9.0)
    assert not optimizer.averaging, "only three values were recorded before this one"
    optimizer.record(4.9)
    assert not optimizer.averaging, "4.9 is better than 5.0, the only value before the last three"
    optimizer.record(4.1)
    assert optimizer.averaging, "4.1 is worse than 4.0, the best before the last three"
    optimizer.record(1.0)
    assert optimizer.averaging and optimizer.history == [5.0, 4.0, 3.0, 9.0, 4.9, 4.1, 1.0]


def test_asgd_steps_with_its_own_scale_and_averages():
    """The average restarts once: its weight is 1 in the first two steps."""
    parameter, optimizer = make()
    optimizer.start_averaging()
    trail, value = [], torch.tensor([1.0, -2.0], dtype=torch.float64)
    for gradient, scale in (([1.0, 2.0], 1.0), ([1.0, -1.0], 0.2), ([0.5, 1.0], 2.0), ([2.0, 0.0], 0.1)):
        step(parameter, optimizer, gradient, scale)
        value = value - 0.5 * scale * torch.tensor(gradient, dtype=torch.float64)
        trail.append(value)
        assert torch.allclose(parameter.detach(), value, rtol=0, atol=1e-15)
    current = parameter.detach().clone()
    with optimizer.averaged():
        assert torch.allclose(parameter.detach(), torch.stack(trail[1:]).mean(0), rtol=0, atol=1e-15)
    assert torch.equal(parameter.detach(), current)
    with pytest.raises(KeyError), optimizer.averaged():
        raise KeyError
    assert torch.equal(parameter.detach(), current), "an error in validation must not lose the parameters"


def test_equals_torchs_asgd_where_the_rate_is_constant():
    parameter, optimizer = make(weight_decay=0.1)
    theirs = parameter.detach().clone().requires_grad_()
    asgd = torch.optim.ASGD([theirs], lr=0.5, t0=0, lambd=0.0, weight_decay=0.1)
    optimizer.start_averaging()
    for gradient in torch.randn(9, 2, dtype=torch.float64):
        step(parameter, optimizer, gradient.tolist())
        theirs.grad = gradient
        asgd.step()
    assert torch.allclose(parameter, theirs, rtol=0, atol=1e-12)
    with optimizer.averaged():
        assert torch.allclose(
            parameter, asgd.state[theirs]["ax"], rtol=0, atol=1e-6
        )  # torch keeps the weight in float32


def test_averaged_changes_nothing_before_averaging():
    parameter, optimizer = make()
    with optimizer.averaged():
        assert parameter.tolist() == [1.0, -2.0]
    optimizer.start_averaging()
    with optimizer.averaged():  # the trigger was pulled, but no step taken
        assert parameter.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("averaging", [False, True])
def test_resumes_exactly(averaging):
    torch.manual_seed(1)
    gradients = torch.randn(6, 2, dtype=torch.float64).tolist()
    parameter, optimizer = make(weight_decay=0.01)
    optimizer.record(3.0)
    if averaging:
        optimizer.start_averaging()
    for gradient in gradients[:3]:
        step(parameter, optimizer, gradient)
    other, resumed = make(weight_decay=0.01)
    tensors, meta = optimizer.state_dict()
    resumed.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, meta)
    other.data.copy_(parameter.data)
    for gradient in gradients[3:]:
        step(parameter, optimizer, gradient, 0.7)
        step(other, resumed, gradient, 0.7)
    assert torch.equal(parameter, other) and resumed.history == [3.0] and resumed.averaging == averaging
    with optimizer.averaged(), resumed.averaged():
        assert torch.equal(parameter, other)
