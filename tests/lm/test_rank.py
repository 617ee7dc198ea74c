"""The empirical rank, from blocks of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_mos
from fused_mos.data.synthetic import SyntheticLanguage
from fused_mos.lm.rank import Spectrum, numerical_rank, rank_threshold


def spectrum_of(matrix, block=7):
    found = Spectrum(matrix.shape[1])
    for rows in matrix.split(block):
        found.add(rows)
    return found


def rank_of(matrix):
    found = spectrum_of(matrix)
    return numerical_rank(found.singular_values(), found.n_rows, matrix.shape[1])


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 60),
    v=st.integers(1, 50),
    rank=st.integers(1, 20),
    block=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_singular_values_are_those_of_the_whole_matrix(n, v, rank, block, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, n, v)
    matrix = torch.randn(n, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, v, generator=generator, dtype=torch.float64
    )
    found, expected = spectrum_of(matrix, block), torch.linalg.svdvals(matrix)
    values = found.singular_values()
    assert values.shape == (min(n, v),) and found.n_rows == n
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6 * expected[0].item())
    assert numerical_rank(values, n, v) == torch.linalg.matrix_rank(matrix, rtol=rank_threshold(n, v))


@pytest.mark.parametrize("rank", [2, 9, 60])
def test_rank_of_a_language_in_float32(rank):
    assert rank_of(SyntheticLanguage(60, rank).log_prob.float()) == rank


def test_the_bottleneck():
    """A softmax over d features has rank d + 2 at most, its bias and normaliser counted, and so has a MoC; a MoS has
    not."""
    torch.manual_seed(0)
    hidden = torch.randn(400, 32) * 3
    heads = fused_mos.Softmax(32, 100), fused_mos.MoC(32, 100, 4, 8), fused_mos.MoS(32, 100, 4, 8)
    for head in heads:
        torch.nn.init.normal_(head.decoder.weight)
        torch.nn.init.normal_(head.decoder.bias)
    with torch.no_grad():
        softmax, moc, mos = (rank_of(head.log_prob(hidden)) for head in heads)
    assert softmax == 34 and moc == 10 and mos == 100


def test_threshold_is_the_papers():
    """½·√(m + n + 1)·ε of the largest singular value."""
    assert rank_threshold(80, 19) == pytest.approx(5 * 2**-23)
    values = torch.tensor([1.0, 2 * rank_threshold(80, 19), 0.5 * rank_threshold(80, 19)])
    assert numerical_rank(values, 80, 19) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 5), r"rows must be \(n, 4\), got \(3, 5\)"),
        (torch.zeros(4), r"rows must be \(n, 4\), got \(4,\)"),
        (torch.tensor([[0, 0, 0, -torch.inf]]), "rows must be finite"),
    ],
)
def test_what_is_no_row(rows, message):
    found = Spectrum(4)
    with pytest.raises(ValueError, match=message):
        found.add(rows)
    assert found.n_rows == 0 and not found.gram.any()


def test_of_nothing():
    with pytest.raises(ValueError, match="n_columns must be positive, got 0"):
        Spectrum(0)
    with pytest.raises(ValueError, match="singular_values must not be empty"):
        numerical_rank(Spectrum(4).singular_values(), 0, 4)
