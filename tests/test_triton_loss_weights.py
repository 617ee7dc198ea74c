"""Losses with token weights and a z-loss in the Triton backend, with gradients formed in the forward pass."""

import math

import pytest
import torch
from backends import configurations, triton
from problem import Problem, problem
from torch import Tensor
from transformed import ALL, check, logits, nll, unpacked

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted

from fused_mos._backends import IDENTITY, Transform, reference


def weighted(p: Problem, weights: Tensor, transform: Transform) -> Tensor:  # ()
    """The loss by definition, in the problem's dtype."""
    prior, lse = reference.log_softmax_prior(p.prior_logits).exp(), torch.logsumexp(logits(p, transform), -1)
    c, of_lse, of_squared_lse = weights.to(lse.dtype)
    losses = c * nll(p, transform) + of_lse * (prior * lse).sum(1) + of_squared_lse * (prior * lse**2).sum(1)
    return losses[p.target != -100].sum()


def weights_of(kind: str, target: Tensor) -> Tensor:  # (3, N)
    n = len(target)
    c, of_lse, of_squared_lse = torch.randn(3, n, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    zero = torch.zeros(n)
    rows = {
        "tokens": (c, zero, zero),  # of both signs
        "λ": (zero, of_lse, zero),
        "ζ": (zero, zero, of_squared_lse),
        "label smoothing": (torch.full((n,), 0.9), torch.full((n,), 0.1), zero),
        "all": (c, of_lse, of_squared_lse / 4),
        "none": (zero, zero, zero),
    }[kind]
    return torch.stack(rows) * (target != -100)


EACH = [
    ("tokens", IDENTITY, (13, 3, 20, 201), torch.float32),
    ("tokens", Transform(1.5, 1.7), (7, 1, 33, 64), torch.bfloat16),
    ("λ", IDENTITY, (13, 3, 20, 201), torch.bfloat16),
    ("λ", Transform(2.0), (13, 3, 20, 201), torch.float32),
    ("ζ", Transform(temperature=0.6), (7, 1, 33, 64), torch.float32),
    ("label smoothing", IDENTITY, (13, 3, 20, 201), torch.float32),
    ("all", IDENTITY, (13, 3, 20, 201), torch.bfloat16),
    ("all", Transform(1.5, 1.7), (13, 3, 20, 201), torch.float32),
    ("none", Transform(2.0), (13, 3, 20, 201), torch.float32),
]


@pytest.mark.parametrize(("kind", "transform", "shape", "dtype"), EACH, ids=str)
def test_weighted_losses(kind, transform, shape, dtype, workspace):
    """Nothing is filtered, and the NLL that comes beside the loss has no weight."""
    case = problem(*shape, bias=shape[1] > 1, scale=2.0)
    weights, p = weights_of(kind, case.target), case.to(dtype, ())
    needs = (True, True, True, case.bias is not None)

    def results(needs):
        return triton.nll_with_gradients(*p.inputs(), p.target, -100, 0.5, False, needs, transform, weights)

    loss, divisor, losses, *known, grads = unpacked(results(needs))
    assert divisor == 1
    check(case, dtype, (loss, *grads), lambda p: weighted(p, weights, transform), torch.ones(()), 2**-20)
    alone = results((False,) * 4)
    assert torch.allclose(alone[0], loss, rtol=1e-5, atol=1e-5)
    unweighted, *statistics = triton.nll(*p.inputs(), p.target, -100, transform)
    for found in (losses, alone[2]):
        assert torch.allclose(found, unweighted, atol=1e-5)
    assert torch.allclose(known[0] + known[1], statistics[0] + statistics[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("off", [0.0, 1e-7, -1e-7, 1e-3])
def test_weights_of_all_classes_that_cancel(off, dtype):
    """nll − L is minus the target's logit. Its gradient has no term of exponentials: A = 0."""
    case = problem(13, 1, 12, 70, scale=2.0)
    weights, p = torch.stack([torch.ones(13), torch.full((13,), off - 1), torch.zeros(13)]), case.to(dtype, ())
    weights *= case.target != -100
    found = triton.nll_with_gradients(*p.inputs(), p.target, -100, 0.0, False, ALL, IDENTITY, weights)
    ours = found[0], *found[-4:]
    slack = 2**-18 if dtype == torch.float32 else 2**-8  # what is kept for the target is rounded to the dtype
    check(case, dtype, ours, lambda p: weighted(p, weights, IDENTITY), torch.ones(()), slack)


def test_a_weighted_token_of_no_weight_adds_nothing_whatever_it_is():
    """Its target is masked, so that its NLL is infinite; another one is ignored."""
    case = problem(9, 2, 12, 70).to(torch.float32, ())
    case.bias[3] = -math.inf
    case.target[case.target == 3] = 4
    case.target[:2] = 3
    weights = torch.ones(3, 9) * (case.target != -100)
    weights[:, 0] = 0
    weights[0, 1] = 0
    for needs in (ALL, (False,) * 4):
        loss, _, losses, *_, grads = unpacked(
            triton.nll_with_gradients(*case.inputs(), case.target, -100, 0.0, False, needs, IDENTITY, weights)
        )
        assert losses[:2].eq(math.inf).all() and loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in grads)
        if needs[0]:
            assert grads[0][0].eq(0).all() and grads[0][4].eq(0).all() and grads[0][1].ne(0).any()


def test_several_blocks_take_their_own_weights(monkeypatch):
    """The (3, N) weights are cut along the tokens."""
    case = problem(40, 2, 12, 300)
    weights, p = weights_of("all", case.target), case.to(torch.float32, ())
    whole = triton.nll_with_gradients(*p.inputs(), p.target, -100, 0.0, False, ALL, IDENTITY, weights)
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(32, 128, 16, 4, 1))
    monkeypatch.setattr(triton, "_rows_of_block", lambda *_: 32)
    blocks = triton.nll_with_gradients(*p.inputs(), p.target, -100, 0.0, False, ALL, IDENTITY, weights)
    for i in (0, 1, 2, *range(-4, 0)):  # but for statistics, which are relative to other references
        assert torch.allclose(whole[i], blocks[i], rtol=1e-4, atol=1e-4)
