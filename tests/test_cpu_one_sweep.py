"""The native CPU kernel that computes the mixture and its normalisers in one product, against the float64 definition
and the two sweeps that it replaces."""

import itertools
import math

import pytest
import torch
from problem import Problem, assert_meets_criterion, problem
from test_cpu_transform import DTYPES, TRANSFORMS, check, log_prob_of, logits
from torch import Tensor

_cpu = pytest.importorskip("fused_mos._cpu")

from fused_mos._backends import Transform, cpu, cpu_one_sweep

# tokens of one block and of several, experts that share vectors of lanes and one alone, odd numbers of classes
SHAPES = list(itertools.product([1, 7, 100], [1, 5], [13], [2, 507]))


def expected(case: Problem, transform: Transform) -> dict[str, Tensor]:
    lse = logits(case.latent, case.weight, case.bias, transform).logsumexp(-1)
    return {"log_p": log_prob_of(case, transform).detach(), "lse": lse.detach()}


def ours(case: Problem, transform: Transform) -> dict[str, Tensor]:
    log_p, maximum, log_total = cpu.log_prob_and_normalisers(*case.inputs(), transform)
    return {"log_p": log_p, "lse": maximum.double() + log_total}


def in_two_sweeps(case: Problem, transform: Transform) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p, the most probable class, and the normalisers."""
    log_prior, maximum, log_total = cpu.normalisers(*case.inputs(), transform)
    given = case.latent, log_prior, case.weight, case.bias, maximum, log_total, transform
    return cpu.log_prob(*given), cpu.predict(*given), maximum, log_total


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values(bias, dtype, instruction_set, workspace):
    for shape, transform in itertools.product(SHAPES, TRANSFORMS):
        check(problem(*shape, bias=bias, scale=3.0), dtype, ours, expected, transform)


@DTYPES
def test_the_normalisers_are_those_of_two_sweeps(dtype, instruction_set, workspace):
    case = problem(100, 5, 33, 507, scale=3.0).to(dtype, ())
    for transform in TRANSFORMS:
        _, maximum, log_total = cpu.log_prob_and_normalisers(*case.inputs(), transform)
        _, _, maximum_of_two, log_total_of_two = in_two_sweeps(case, transform)
        assert torch.equal(maximum, maximum_of_two)
        assert torch.allclose(log_total, log_total_of_two, rtol=0, atol=2e-6)


@DTYPES
def test_predict(dtype, instruction_set, workspace):
    for n, transform in itertools.product((1, 7, 100), TRANSFORMS):
        case = problem(n, 5, 13, 507, scale=3.0)
        best = cpu.predict_in_one_sweep(*case.to(dtype, ()).inputs(), transform)
        log_p = log_prob_of(case, transform)
        assert (log_p.amax(1) - log_p.gather(1, best[:, None]).squeeze(1)).max() < 1e-5


def test_equal_classes_are_won_by_the_first(instruction_set, workspace):
    case = problem(50, 3, 13, 900).to(torch.float32, ())
    case.weight.zero_()
    case.bias.zero_()[[130, 131, 700]] = 1.0
    assert cpu.predict_in_one_sweep(*case.inputs()).eq(130).all()


@DTYPES
def test_the_number_of_threads_changes_no_bit(dtype, instruction_set, workspace):
    case, transform = problem(100, 5, 37, 900, scale=3.0).to(dtype, ()), Transform(3.0, 1.7)
    before, runs = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            log_p, maximum, log_total = cpu.log_prob_and_normalisers(*case.inputs(), transform)
            runs.append((log_p, maximum, log_total, cpu.predict_in_one_sweep(*case.inputs(), transform)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("n", [1, 7, 100])
def test_classes_whose_exponentials_underflow(n, instruction_set, workspace):
    """In the panels of 128 classes of one token, or of all; e⁻³⁰⁰ has no float32, its logarithm has."""
    case = problem(n, 5, 13, 507, scale=3.0, ignored=False)
    case.bias[[7, 300]] = -300.0
    case.latent[n // 2] *= 40.0
    check(case, torch.float32, ours, expected, Transform())
    assert expected(case, Transform())["log_p"][:, 7].max() < -90


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
def test_large_logits(scale, instruction_set, workspace):
    check(problem(20, 5, 13, 507, scale=scale), torch.float32, ours, expected, Transform())


def test_an_expert_that_the_prior_leaves_out(instruction_set, workspace):
    case = problem(20, 5, 13, 507, scale=3.0)
    case.prior_logits[:, 1] = -math.inf
    case.prior_logits[3, 2] = 1e4
    check(case, torch.float32, ours, expected, Transform())


def test_masked_classes(instruction_set, workspace):
    """Of a bias of −inf; also a whole panel of them, and all classes but one."""
    for masked in (slice(0, None, 5), slice(100, 300), slice(1, None)):
        case = problem(20, 5, 13, 507, scale=3.0)
        case.bias[masked] = -math.inf
        single, transform = case.to(torch.float32, ()), Transform(0.0, 0.7)
        log_p = ours(single, transform)["log_p"]
        unfused, oracle = log_prob_of(single, transform), log_prob_of(case, transform)
        assert_meets_criterion(log_p, unfused, oracle, 2, torch.float32, "log_p")
        assert log_p[:, masked].eq(-math.inf).all()
        assert single.bias[cpu.predict_in_one_sweep(*single.inputs())].isfinite().all()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_distribution_is_nan(number, instruction_set, workspace):
    """Of its token alone, whose most probable class is 0."""
    for transform in (Transform(), Transform(2.0), Transform(0.0, 0.5)):
        case = problem(70, 3, 13, 300, ignored=False).to(torch.float32, ())
        bad = torch.zeros(70, dtype=torch.bool)
        case.latent[5, 1, 2], bad[5] = number, not (number == math.inf and transform.softcap)
        case.prior_logits[9, 0], bad[9] = number, True
        log_p = cpu.log_prob_and_normalisers(*case.inputs(), transform)[0]
        assert log_p[bad].isnan().all() and log_p[~bad].isfinite().all()
        assert cpu.predict_in_one_sweep(*case.inputs(), transform)[bad].eq(0).all()
        log_p_of_two, best, _, _ = in_two_sweeps(case, transform)
        assert torch.allclose(log_p[~bad], log_p_of_two[~bad], rtol=0, atol=1e-5)
        assert torch.equal(cpu.predict_in_one_sweep(*case.inputs(), transform)[~bad], best[~bad])


def test_its_memory():
    """The exponentials of one block, not of all tokens."""
    case = problem(300, 7, 32, 10_000).to(torch.float32, ())
    assert cpu_one_sweep.one_sweep_pays(300, 7, 10_000, 32)
    _cpu.reset_peak_bytes()
    cpu.log_prob_and_normalisers(*case.inputs())
    assert 20 * 2**20 < _cpu.peak_bytes() <= 44 * 2**20
