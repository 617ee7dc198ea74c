"""The continuous cache against a plain restatement of its equations, word by word."""

import math

import pytest
import torch

from fused_mos.lm import AWDLSTM
from fused_mos.lm.cache import ContinuousCache, interpolated

V, D, WIDTH, N = 11, 4, 6, 40


def restated(hidden, target, window, theta):
    """p_cache of all words, (N, V): Σᵢ 1[w = xᵢ₊₁] exp(θ hₜ·hᵢ) over its sum; zeros where the cache is empty."""
    rows = []
    for t in range(len(target)):
        row = torch.zeros(V, dtype=torch.float64)
        for i in range(max(0, t - window), t):
            row[target[i]] += math.exp(theta * sum(a * b for a, b in zip(hidden[t].tolist(), hidden[i].tolist())))
        rows.append(row / row.sum() if t else row)
    return torch.stack(rows)


def text(n=N):
    return torch.randn(n, WIDTH, dtype=torch.float64), torch.randint(V, (n,))


def log_likelihood(hidden, target, window, thetas, block=N):
    return ContinuousCache(window, WIDTH, block=block).log_likelihood(hidden, target, thetas)


@pytest.mark.parametrize("theta", [0.0, 0.4, 3.0])
@pytest.mark.parametrize("window", [1, 5, N - 1, 1000])
def test_it_is_the_equation_for_blocks_of_any_size(window, theta):
    hidden, target = text()
    expected = restated(hidden, target, window, theta).gather(1, target[:, None])[:, 0].log()
    for block in (1, 7, N):
        found = log_likelihood(hidden, target, window, [theta], block)[0]
        assert found[0].isnan() and found[1:].isinf().any() and not found[1:].isinf().all()
        torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=1e-12)


def test_a_text_may_come_in_pieces_of_any_length():
    hidden, target = text()
    cache, pieces = ContinuousCache(9, WIDTH, block=7), []
    for start, stop in ((0, 1), (1, 4), (4, 30), (30, N)):
        pieces.append(cache.log_likelihood(hidden[start:stop], target[start:stop], [0.4]))
        assert len(cache.keys) == len(cache.words) == min(stop, 9), "it holds the window and no more"
    whole = log_likelihood(hidden, target, 9, [0.4])
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12, equal_nan=True)


def test_several_thetas_are_each_by_itself():
    hidden, target = text()
    thetas = [0.0, 0.4, 3.0]
    found = log_likelihood(hidden, target, 9, thetas)
    for theta, row in zip(thetas, found):
        assert torch.equal(row.nan_to_num(7), log_likelihood(hidden, target, 9, [theta])[0].nan_to_num(7))
    assert not torch.equal(found[0].nan_to_num(7), found[1].nan_to_num(7))


def test_a_window_of_one_knows_the_last_word_alone():
    """Without doubt, whatever theta."""
    hidden, target = text()
    found = log_likelihood(hidden, target, 1, [0.7])[0, 1:]
    assert torch.equal(found, torch.where(target[1:] == target[:-1], 0.0, -math.inf).double())
    assert (found == 0).any()


def test_scores_far_beyond_exp_stay_finite():
    """θ h·h of thousands, as wide layers have them: the most similar place says the word."""
    hidden = torch.eye(3, WIDTH, dtype=torch.float64)[[0, 1, 2, 0, 1]] * 100
    found = log_likelihood(hidden, torch.tensor([4, 5, 6, 4, 5]), 10, [1.0, 1e30])
    assert torch.equal(found[:, 3:], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("lambdasm", [0.0, 0.1, 0.9])
def test_the_mix(lambdasm):
    hidden, target = text()
    model = torch.rand(N, dtype=torch.float64)
    of_cache = restated(hidden, target, 9, 0.4).gather(1, target[:, None])[:, 0]
    expected = (1 - lambdasm) * model + lambdasm * of_cache
    expected[0] = model[0]  # an empty cache
    found = interpolated(model.log(), log_likelihood(hidden, target, 9, [0.4])[0], lambdasm)
    torch.testing.assert_close(found, expected.log(), rtol=0, atol=1e-12)
    assert torch.equal(found, model.log()) == (lambdasm == 0)


def test_a_window_without_words_is_refused():
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        ContinuousCache(0, WIDTH)


@pytest.mark.parametrize("head", ["softmax", "moc", "mos"])
@torch.no_grad()
def test_with_a_model_it_is_a_distribution(head):
    """Every word in turn as the target of the last place: the probabilities add up to 1, and are those of (2)."""
    model = AWDLSTM(V, D, (7, WIDTH), head, 3).double().eval()
    tokens = torch.randint(V, (N, 1))
    raw, features, _ = model.features(tokens)
    hidden, target = raw[:, 0], tokens[1:, 0]
    cache = ContinuousCache(9, model.widths[-1])
    cache.log_likelihood(hidden[:-1], target, [2.0])
    keys, words = cache.keys, cache.words
    log_p = []
    for word in range(V):
        cache.keys, cache.words = keys, words
        of_cache = cache.log_likelihood(hidden[-1:], torch.tensor([word]), [2.0])[0]
        log_p.append(interpolated(model.head.log_prob(features[-1])[0, word : word + 1], of_cache, 0.3))
    found = torch.cat(log_p).exp()
    assert found.sum().item() == pytest.approx(1, abs=1e-12)
    counted = torch.zeros(V, dtype=torch.float64)
    similarity = (2.0 * hidden[-10:-1] @ hidden[-1]).exp()
    counted.index_add_(0, target[-9:], similarity / similarity.sum())
    expected = 0.7 * model.log_prob(tokens)[-1, 0].exp() + 0.3 * counted
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
