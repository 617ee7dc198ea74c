"""The random numbers of samples on devices where the host must not read the seed, such as a GPU."""

import math

import pytest
import torch
from problem import problem

from fused_mos import functional as F
from fused_mos._backends import from_rows, random_numbers, tiled_products
from fused_mos._backends.random_numbers import Exponentials

WORD = 2**64


@pytest.fixture(autouse=True)
def unreadable_seeds(monkeypatch):
    monkeypatch.setattr(random_numbers, "has_readable_seed", lambda device: False)


def split_mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def test_they_are_those_of_splitmix():
    """SplitMix64's first word for the seed 1234567 is known. Here Python integers compute it."""
    assert split_mix(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317
    seed = 2**61 + 12345
    key = split_mix(2 * seed + 1)
    numbers = Exponentials(torch.tensor([seed]), "classes").like(torch.empty(3, 4, dtype=torch.float64), 5, 7)
    for row in range(3):
        for column in range(4):
            counter = (row + 5) * 2**32 + column + 7
            bits = split_mix((counter * 0x9E3779B97F4A7C15 + key) % WORD) >> 12
            assert numbers[row, column].item() == pytest.approx(-math.log1p(-(bits + 0.5) / 2**52), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_they_are_exponentially_distributed_and_independent(dtype):
    """Moments, and correlations between rows, columns, uses and seeds, are within 5 standard deviations."""
    n, like = 200_000, torch.empty(400, 500, dtype=dtype)
    samples = [Exponentials(torch.tensor([seed]), use).like(like) for seed in (3, 4) for use in random_numbers.USES]
    for x in (sample.double() for sample in samples):
        assert (x > 0).all() and x.isfinite().all()
        for moment in (1, 2, 3):
            deviation = math.sqrt((math.factorial(2 * moment) - math.factorial(moment) ** 2) / n)
            assert abs((x**moment).mean().item() - math.factorial(moment)) < 5 * deviation
        assert (x < math.log(2)).double().mean().item() == pytest.approx(0.5, abs=2.5 / math.sqrt(n))
    deviations = [sample.double() - 1 for sample in samples]
    pairs = [(a, b) for i, a in enumerate(deviations) for b in deviations[:i]]
    pairs += [(x[1:], x[:-1]) for x in deviations] + [(x[:, 1:], x[:, :-1]) for x in deviations]
    for a, b in pairs:
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())


def test_they_are_finite_where_a_uniform_number_would_round_to_one(monkeypatch):
    monkeypatch.setattr(random_numbers, "mixed_", lambda x: x.fill_(-1))
    for dtype in (torch.float32, torch.float64):
        number = Exponentials(torch.tensor([0]), "experts").like(torch.empty(1, 1, dtype=dtype))
        assert 15 < number.item() < 40


def test_samples_follow_the_distribution_whatever_the_tiles_are(monkeypatch):
    """A chi-square statistic of 20,000 draws, within 5 standard deviations."""
    n, v = 20_000, 150
    case = problem(1, 3, 6, v).to(torch.float32, ())
    expected = n * F.mos_log_prob(*case.inputs(), backend="reference").double().exp()[0]
    repeated = case.latent.expand(n, -1, -1), case.prior_logits.expand(n, -1), case.weight, case.bias

    def drawn(seed):
        return F.mos_sample(*repeated, generator=torch.Generator().manual_seed(seed), backend="tiled")

    samples = drawn(3)
    chi_square = ((samples.bincount(minlength=v) - expected).square() / expected).sum().item()
    assert abs(chi_square - (v - 1)) < 5 * math.sqrt(2 * (v - 1) + (1 / expected).sum().item())
    assert not torch.equal(samples, drawn(4))
    monkeypatch.setitem(tiled_products.WORKSPACE_BYTES, "cpu", 2**20)
    monkeypatch.setattr(tiled_products, "MAX_ROWS", 999)
    assert torch.equal(samples, drawn(3))


def test_a_prior_that_is_no_distribution_chooses_no_expert():
    prior_logits = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0], [-torch.inf, -torch.inf]])
    rows = from_rows.choose_rows(torch.ones(3, 2, 4), prior_logits, torch.tensor([3]))
    assert (rows[0] == 1).all() and rows[1:].isnan().all()
