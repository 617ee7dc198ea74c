"""Ordinary calls bypass torch's dispatcher; all others reach the ops."""

import pytest
import torch
from problem import problem
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from fused_mos.ops.direct import direct


class Op:
    """Stands in for a custom op."""

    _name = "some"

    def __call__(self, x, *others):
        return "op"


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


call = direct(Op(), lambda x, *others: 2 * x, _setup, lambda ctx, grad: (grad * ctx.saved_tensors[0], None, None))


class Subclass(torch.Tensor):
    pass


def _in(mode):
    with mode:
        return call(torch.ones(2))


@pytest.mark.parametrize(
    "unusual",
    [
        lambda: _in(FlopCounterMode(display=False)),
        lambda: _in(FakeTensorMode()),
        lambda: call(torch.ones(2, device="meta")),
        lambda: call(torch.ones(2).as_subclass(Subclass)),
        lambda: call(torch.ones(2), [torch.ones(2, device="meta")]),
        lambda: call(FakeTensorMode().from_tensor(torch.ones(2))),
    ],
    ids=["dispatch mode", "fake mode", "meta", "subclass", "in a list", "fake tensor"],
)
def test_what_is_not_ordinary_reaches_the_op(unusual):
    assert unusual() == "op"


def test_a_transform_reaches_the_op():
    seen = []
    torch.func.vmap(lambda x: seen.append(call(x)) or x)(torch.ones(3, 2))
    assert seen == ["op"]


def test_an_ordinary_call_does_not():
    x = Parameter(torch.arange(3.0))
    result = call(x, None, [torch.ones(2)])
    result.sum().backward()
    assert torch.equal(result, 2 * x) and torch.equal(x.grad, x)
    with torch.no_grad():
        assert not call(x).requires_grad
    assert not call(x.detach()).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_ways_give_equal_bits(reduction, backend):
    results = []
    for mode in (FlopCounterMode(display=False), torch.enable_grad()):
        case = problem(23, 3, 17, 131).to(torch.float32)
        with mode:
            loss = case.nll(reduction=reduction, backend=backend)
            loss.sum().backward()
        results.append([loss.detach(), *case.gradients().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
