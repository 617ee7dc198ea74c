"""Entropies and other means over the vocabulary of the native CPU kernels, and gradients of log-probabilities that are
given by formulas, against autograd in float64."""

import itertools

import pytest
import torch
from problem import Problem, problem
from test_cpu_transform import DTYPES, SHAPES, check, kept_by_gradients, log_prob_of, logits, named, weights_like
from torch import Tensor

from fused_mos._backends import Transform, cpu, cpu_mixture
from fused_mos._backends.log_prob_gradient import LogProbGradient

TRANSFORMS = [Transform(), Transform(0.0, 0.7), Transform(2.0, 1.7)]

PARTS = [
    LogProbGradient._fields,
    ("token", "of_class"),
    ("at_target", "target"),
    ("entropy",),
    ("entropy", "at_target", "target"),
]


def expected_of_rows(case: Problem, transform: Transform) -> dict[str, Tensor]:
    log_softmax = logits(case.latent.flatten(0, 1), case.weight, case.bias, transform).log_softmax(1)
    return {"entropy": (log_softmax.exp() * -log_softmax).nansum(1).detach()}


def ours_of_rows(case: Problem, transform: Transform) -> dict[str, Tensor]:
    return {"entropy": cpu.row_entropy(case.latent.flatten(0, 1), case.weight, case.bias, None, transform)[3]}


def expected_of_score(case: Problem, transform: Transform) -> dict[str, Tensor]:
    softmax = logits(case.latent, case.weight, case.bias, transform).softmax(-1)
    log_p = log_prob_of(case, transform)
    each = torch.where(softmax > 0, softmax * log_p[:, None], 0)
    return {"mean log_prob": each.sum(-1).detach()}


def given(case: Problem, transform: Transform) -> tuple:
    log_prior, maximum, log_total = cpu.normalisers(*case.inputs(), transform)
    return case.latent, log_prior, case.weight, case.bias, maximum, log_total


def ours_of_score(case: Problem, transform: Transform) -> dict[str, Tensor]:
    return {"mean log_prob": cpu_mixture.score(*given(case, transform), transform)[1]}


def gradient_of(case: Problem, parts: tuple[str, ...]) -> LogProbGradient:
    """Random numbers, the same for every dtype."""
    n, v = case.latent.shape[0], case.weight.shape[0]
    every = LogProbGradient(
        token=weights_like(torch.empty(n), 1),
        of_class=weights_like(torch.empty(v), 2),
        at_target=weights_like(torch.empty(n), 3),
        target=case.target,
        entropy=weights_like(torch.empty(n), 4),
    )
    return LogProbGradient(**{name: getattr(every, name) for name in parts})


def dense(grad: LogProbGradient, log_p: Tensor) -> Tensor:
    result = torch.zeros_like(log_p)
    if grad.token is not None:
        result += grad.token[:, None] * grad.of_class
    if grad.at_target is not None:
        classes = torch.arange(log_p.shape[1])
        result += grad.at_target[:, None] * (grad.target[:, None] == classes)
    if grad.entropy is not None:
        result -= grad.entropy[:, None] * (log_p + 1) * log_p.exp()
    return result


def expected_of_gradient(case: Problem, transform: Transform, parts, _) -> dict[str, Tensor]:
    log_p = log_prob_of(case, transform)
    (dense(gradient_of(case, parts), log_p.detach()) * log_p).sum().backward()
    return kept_by_gradients(case)


def mean_gradient_of(case: Problem, transform: Transform, parts) -> Tensor:
    """s[n,k] = Σ_v G q with q the posterior of expert k, in float64."""
    case = case.to(torch.float64, ())
    log_p = log_prob_of(case, transform)
    log_softmax = logits(case.latent, case.weight, case.bias, transform).log_softmax(-1)
    posterior = (case.prior_logits.log_softmax(-1)[..., None] + log_softmax - log_p[:, None]).exp()
    return (dense(gradient_of(case, parts), log_p)[:, None] * posterior).sum(-1)


def ours_of_gradient(case: Problem, transform: Transform, parts, known: bool) -> dict[str, Tensor]:
    mean_gradient = mean_gradient_of(case, transform, parts) if known else None
    needs = (True, True, True, case.bias is not None)
    grad_latent, grad_prior, *others = cpu.log_prob_backward(
        gradient_of(case, parts), *given(case, transform), needs, transform, mean_gradient
    )
    return named(case, grad_latent, grad_prior, *others)


@DTYPES
@pytest.mark.parametrize(
    ("ours", "expected"),
    [(ours_of_rows, expected_of_rows), (ours_of_score, expected_of_score)],
    ids=["entropy", "mean log_prob"],
)
def test_means_over_the_vocabulary(ours, expected, dtype, instruction_set, workspace):
    for shape, transform, bias in itertools.product(SHAPES, TRANSFORMS, (True, False)):
        check(problem(*shape, bias=bias, scale=3.0), dtype, ours, expected, transform)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_means_of_large_logits(scale, instruction_set, workspace):
    """Of probabilities that underflow, which are as good as 0, and of logits whose rounding would spoil the entropy."""
    case = problem(11, 3, 12, 300, scale=scale)
    check(case, torch.float32, ours_of_rows, expected_of_rows, Transform())
    check(case, torch.float32, ours_of_score, expected_of_score, Transform())


def test_the_entropy_of_logits_far_from_zero(instruction_set):
    """l = L − H is not what it is computed from: its rounding would be a thousandth."""
    case = problem(40, 1, 12, 900)
    case.weight.mul_(8).round_().div_(8)  # so that adding to the bias rounds no logit
    case.bias.mul_(8).round_().div_(8)
    case.latent.mul_(8).round_().div_(8)
    exact = expected_of_rows(case, Transform())["entropy"]
    for offset in (-20_000, 20_000):
        moved = problem(40, 1, 12, 900)
        moved.latent, moved.weight, moved.bias = case.latent, case.weight, case.bias + offset
        assert (ours_of_rows(moved.to(torch.float32, ()), Transform())["entropy"] - exact).abs().max() < 1e-5


def test_masked_classes_count_for_nothing(instruction_set, workspace):
    """0·log 0 = 0, also where the masked classes fill whole panels, at either end."""
    case = problem(11, 3, 12, 700, scale=3.0)
    allowed = torch.ones(700, dtype=torch.bool)
    allowed[:270], allowed[300::3], allowed[600:] = False, False, False
    masked = case.to(torch.float32, ())
    masked.bias[~allowed] = -torch.inf
    only = Problem(case.latent, case.prior_logits, case.weight[allowed], case.bias[allowed], case.target)
    for ours, expected in ((ours_of_rows, expected_of_rows), (ours_of_score, expected_of_score)):
        for result, oracle in zip(ours(masked, Transform()).values(), expected(only, Transform()).values()):
            assert torch.allclose(result.double(), oracle, rtol=0, atol=1e-5)
    best, _ = cpu_mixture.score(*given(masked, Transform()), Transform())
    assert torch.equal(best, allowed.nonzero().squeeze(1)[log_prob_of(only, Transform()).argmax(1)])


def test_the_best_class_is_that_of_predict(instruction_set, workspace):
    single = problem(70, 3, 13, 507, scale=3.0).to(torch.float32, ())
    for transform in TRANSFORMS:
        best, _ = cpu_mixture.score(*given(single, transform), transform)
        assert torch.equal(best, cpu.predict(*given(single, transform), transform))


def test_scores_of_what_is_not_a_number(instruction_set):
    case = problem(5, 2, 4, 30).to(torch.float32, ())
    case.latent[1, 0, 2] = torch.nan
    assert ours_of_rows(case, Transform())["entropy"].isnan().tolist() == [row == 2 for row in range(10)]
    assert ours_of_score(case, Transform())["mean log_prob"].isnan().any(1).tolist() == [n == 1 for n in range(5)]


@DTYPES
@pytest.mark.parametrize("known", [True, False], ids=["known mean", "summed mean"])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_gradients_given_by_formulas(parts, known, dtype, instruction_set, workspace):
    for shape, transform in itertools.product(SHAPES, TRANSFORMS):
        case = problem(*shape, scale=3.0)
        check(case, dtype, ours_of_gradient, expected_of_gradient, transform, parts, known)


def test_gradients_given_by_formulas_of_large_logits(instruction_set, workspace):
    """p log p of a probability that underflows is 0."""
    case = problem(11, 3, 12, 300, scale=100.0)
    check(case, torch.float32, ours_of_gradient, expected_of_gradient, Transform(), ("entropy",), False)


def test_a_known_mean_is_not_summed_again(instruction_set):
    case = problem(40, 3, 12, 300).to(torch.float32, ())
    _, grad_prior, *_ = cpu.log_prob_backward(
        gradient_of(case, LogProbGradient._fields),
        *given(case, Transform()),
        (True,) * 4,
        mean_gradient=torch.zeros(40, 3),
    )
    assert grad_prior.eq(0).all()


def test_the_number_of_threads_changes_no_bit(instruction_set, workspace):
    case, transform = problem(70, 3, 37, 900, scale=3.0).to(torch.float32, ()), Transform(3.0, 1.7)
    before, runs = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            runs.append([ours_of_rows(case, transform)["entropy"], ours_of_score(case, transform)["mean log_prob"]])
            runs[-1] += ours_of_gradient(case, transform, LogProbGradient._fields, False).values()
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
