"""The Triton kernels of transformed logits: a soft cap, a temperature, and both."""

import math

import pytest
import torch
from backends import configurations, triton
from problem import Problem, problem
from transformed import ALL, check, log_prob, logits, nll, unpacked

if not triton or not triton.INTERPRETED:
    pytest.skip("triton is not installed, or not interpreting", allow_module_level=True)

pytestmark = pytest.mark.interpreted

from fused_mos._backends import IDENTITY, Transform

TRANSFORMS = [Transform(2.0), Transform(temperature=0.6), Transform(1.5, 1.7)]
SHAPES = [(13, 3, 20, 201), (7, 1, 33, 64)]
EACH = list(zip(TRANSFORMS, [*SHAPES, SHAPES[0]], [torch.bfloat16, torch.float32, torch.float32])) + [
    (TRANSFORMS[2], SHAPES[1], torch.float16),
    (TRANSFORMS[1], SHAPES[0], torch.bfloat16),
]
"""Each transform, shape and dtype with most of the others: the interpreter is slow."""


def case_of(shape: tuple[int, int, int, int], bias: bool = True) -> Problem:
    """Logits of order 2, in the caps' saturation and below it."""
    return problem(*shape, bias=bias, scale=2.0)


@pytest.mark.parametrize(("transform", "shape", "dtype"), EACH, ids=str)
def test_statistics_and_gradients_of_rows(shape, transform, dtype, workspace):
    """L and the targets' logits, for one gradient of both."""
    case = case_of(shape, bias=shape[1] > 1)
    n, k, d, _ = shape
    target = case.target.clamp_min(0).repeat_interleave(k)
    p = case.to(dtype, ())
    rows = p.latent.view(-1, d), p.weight, p.bias, target
    maximum, log_total, target_logit = triton.row_statistics(*rows, transform)
    generator = torch.Generator().manual_seed(0)
    grad_lse, grad_target = (torch.randn(n * k, generator=generator) for _ in range(2))
    needs = (True, True, case.bias is not None)
    grads = triton.rows_backward(*rows, maximum, log_total, grad_lse, grad_target, needs, transform)

    def both(p):
        found = logits(p, transform).view(n * k, -1)
        return torch.stack([torch.logsumexp(found, -1), found.gather(1, target[:, None])[:, 0]])

    ours = torch.stack([maximum + log_total, target_logit]), grads[0].view(n, k, d), grads[1].new_empty(0), *grads[1:]
    check(case, dtype, ours, both, torch.stack([grad_lse, -grad_target]))


@pytest.mark.parametrize(("transform", "shape", "dtype"), EACH, ids=str)
def test_nll_recomputed(transform, shape, dtype, workspace):
    case = case_of(shape)
    p = case.to(dtype, ())
    losses, *statistics = triton.nll(*p.inputs(), p.target, -100, transform)
    grad = torch.linspace(0.1, 1, len(losses))
    grads = triton.nll_backward(grad, *p.inputs(), p.target, *statistics, -100, 0.0, ALL, transform)
    check(case, dtype, (losses, *grads), lambda p: nll(p, transform), grad)


def test_rows_that_survive_a_filter_are_transformed(workspace):
    """The filtered gradient differs by rows of small responsibility alone."""
    case, transform = case_of(SHAPES[0]).to(torch.float32, ()), TRANSFORMS[0]
    case.prior_logits[:, 0] -= 20
    losses, *statistics = triton.nll(*case.inputs(), case.target, -100, transform)
    whole, filtered = (
        triton.nll_backward(losses, *case.inputs(), case.target, *statistics, -100, eps, ALL, transform)
        for eps in (0.0, 1e-4)
    )
    assert filtered[0][:, 0].eq(0).all()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, filtered))


@pytest.mark.parametrize(("transform", "shape", "dtype"), [each for each in EACH if each[2] != torch.float16], ids=str)
def test_nll_with_gradients(shape, transform, dtype, workspace):
    case = case_of(shape, bias=shape[1] > 1)
    p = case.to(dtype, ())
    needs = (True, True, True, case.bias is not None)
    loss, divisor, losses, *statistics, grads = unpacked(
        triton.nll_with_gradients(*p.inputs(), p.target, -100, 0.0, False, needs, transform)
    )
    assert divisor == 1
    check(case, dtype, (loss, *grads), lambda p: nll(p, transform).sum(), torch.ones(()))
    known = triton.nll(*p.inputs(), p.target, -100, transform)
    assert torch.allclose(losses, known[0], atol=1e-5)
    assert torch.allclose(statistics[0] + statistics[1], known[1] + known[2], atol=1e-5)


@pytest.mark.parametrize(("transform", "shape", "dtype"), EACH, ids=str)
def test_log_prob_and_its_gradients(shape, transform, dtype, workspace):
    case = case_of(shape)
    p = case.to(dtype, ())
    normalisers = triton.normalisers(*p.inputs(), transform)
    mixture = p.latent, normalisers[0], p.weight, p.bias, *normalisers[1:]
    output = triton.log_prob(*mixture, transform)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    grads = triton.log_prob_backward(grad, *mixture, ALL, transform)
    check(case, dtype, (output, *grads), lambda p: log_prob(p, transform), grad)

    predicted = triton.predict(*mixture, transform)
    expected = log_prob(p, transform)
    assert torch.allclose(expected.gather(1, predicted[:, None])[:, 0], expected.amax(1), atol=2e-2)


@pytest.mark.parametrize("transform", [IDENTITY, *TRANSFORMS], ids=str)
def test_samples_are_of_the_transformed_logits(transform, workspace):
    """Random numbers depend on the seed, the row and the class alone: an embedding of units makes the logits."""
    weight, seed = torch.eye(40), torch.tensor([5])
    rows = 3 * torch.randn(60, 40)
    case = Problem(rows[:, None], torch.zeros(60, 1), weight, None, torch.zeros(60))
    drawn = triton.sample(rows, weight, None, transform, seed)
    assert torch.equal(drawn, triton.sample(logits(case, transform)[:, 0], weight, None, IDENTITY, seed))
    others = [triton.sample(rows, weight, None, other, seed) for other in (IDENTITY, *TRANSFORMS) if other != transform]
    assert not any(torch.equal(drawn, other) for other in others)


def test_the_mixture_predicts_what_the_cap_makes_most_probable():
    """A class that one expert is sure of, and another one that two expect: a cap moves the choice."""
    latent, weight = torch.tensor([[[20.0, 0.0], [0.0, 2.0], [0.0, 2.0]]]), torch.eye(17, 2)
    prior_logits = torch.zeros(1, 3)
    found = []
    for transform in (IDENTITY, Transform(1.0)):
        log_prior, *normalisers = triton.normalisers(latent, prior_logits, weight, None, transform)
        found.append(triton.predict(latent, log_prior, weight, None, *normalisers, transform).item())
    assert found == [0, 1]


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_bias_of_minus_infinity_is_capped(recomputed, workspace):
    """Such a class has the logit −c/T, and what fills up the last tile has none."""
    transform, case = Transform(0.5, 0.8), case_of((9, 2, 12, 67))
    case.bias[::5] = -math.inf
    case.target[0] = 5
    p = case.to(torch.float32, ())
    if recomputed:
        losses, *statistics = triton.nll(*p.inputs(), p.target, -100, transform)
        grads = triton.nll_backward(torch.ones(9), *p.inputs(), p.target, *statistics, -100, 0.0, ALL, transform)
        output = losses.sum()
    else:
        output, *_, grads = unpacked(triton.nll_with_gradients(*p.inputs(), p.target, -100, 0.0, False, ALL, transform))
    check(case, torch.float32, (output, *grads), lambda p: nll(p, transform).sum(), torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", [Transform(500.0), Transform(temperature=0.5), Transform(8.0, 0.03)], ids=str)
def test_a_first_tile_that_says_nothing_about_the_maximum(transform, dtype, monkeypatch):
    """Where exponentials are made once more, relative to the maximum, they take the derivative, too."""
    monkeypatch.setattr(configurations, "INTERPRETER_TILE", configurations.Tile(32, 64, 16, 4, 1))
    case = problem(20, 2, 8, 300, scale=2.0)
    case.latent[::3] *= 32
    case.weight[100:] *= 16
    case.target[:3] = torch.tensor([150, 250, 20])
    exact = logits(case, transform)
    assert ((exact.amax(-1) - exact[..., :64].amax(-1)) > 90).any()
    p = case.to(dtype, ())
    loss, *_, grads = unpacked(triton.nll_with_gradients(*p.inputs(), p.target, -100, 0.0, False, ALL, transform))
    check(case, dtype, (loss, *grads), lambda p: nll(p, transform).sum(), torch.ones(()), 2**-18)


@pytest.mark.parametrize("softcap", [0.01, 30.0, 1e4])
def test_logits_keep_their_digits_under_any_cap(softcap):
    """Far below a cap, a logit is itself; tanh as a difference of exponentials would lose it to rounding."""
    values = torch.cat([torch.logspace(-6, 2, 65), torch.linspace(0.3, 0.9, 31) * softcap])
    values = torch.cat([values, -values, torch.tensor([0.0, math.inf, -math.inf])])
    _, _, capped = triton.row_statistics(
        torch.zeros(len(values), 4), torch.zeros(len(values), 4), values, torch.arange(len(values)), Transform(softcap)
    )
    exact = softcap * torch.tanh(values.double() / softcap)
    assert ((capped.double() - exact).abs() <= 4 * 2**-24 * exact.abs()).all()


def test_float16_gradients_of_a_cold_softmax_do_not_overflow():
    """The weights of dl are scaled into float16's range, and the derivative 1 / T multiplies them again."""
    transform, case = Transform(temperature=0.01), case_of((16, 2, 12, 50))
    p = case.to(torch.float16, ())
    losses, *statistics = triton.nll(*p.inputs(), p.target, -100, transform)
    grads = triton.nll_backward(torch.ones(16), *p.inputs(), p.target, *statistics, -100, 0.0, ALL, transform)
    check(case, torch.float16, (losses.sum(), *grads), lambda p: nll(p, transform).sum(), torch.ones(()))
