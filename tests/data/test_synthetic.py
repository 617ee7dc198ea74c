"""The language of known rank and entropy."""

import json
import math

import pytest
import torch

from fused_mos.data import Corpus, synthetic
from fused_mos.data.synthetic import SyntheticLanguage


@pytest.mark.parametrize(("n_words", "rank"), [(2, 2), (40, 2), (40, 9), (40, 40), (300, 65)])
def test_rank_and_entropy(n_words, rank):
    language = SyntheticLanguage(n_words, rank, seed=3)
    log_prob, p = language.log_prob, language.log_prob.exp()
    assert log_prob.shape == (n_words, n_words) and torch.linalg.matrix_rank(log_prob) == rank
    # up to a shift of each row, as a softmax sees it, one less
    assert torch.linalg.matrix_rank(log_prob - log_prob[:, :1]) == rank - 1
    torch.testing.assert_close(p.sum(1), torch.ones(n_words, dtype=torch.float64))
    torch.testing.assert_close(language.stationary @ p, language.stationary, rtol=1e-12, atol=1e-15)
    assert language.stationary.sum().item() == pytest.approx(1)
    by_hand = -sum((language.stationary[u] * p[u] * log_prob[u]).sum().item() for u in range(n_words))
    assert language.entropy == pytest.approx(by_hand, rel=1e-12) and 0 < language.entropy < math.log(n_words)
    assert language.cross_entropy(torch.full_like(log_prob, -math.log(n_words))) == pytest.approx(math.log(n_words))
    assert not torch.equal(SyntheticLanguage(n_words, rank, seed=4).log_prob, log_prob)


def test_no_model_beats_the_entropy():
    """The true log-probabilities have a smaller cross-entropy than others drawn around them."""
    language = SyntheticLanguage(50, 6)
    noise = torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaps = [
        language.cross_entropy(torch.log_softmax(language.log_prob + scale * noise, 1)) - language.entropy
        for scale in (-0.1, 0, 1e-3, 0.1)
    ]
    assert gaps[1] == pytest.approx(0, abs=1e-12) and min(gaps[0], gaps[2], gaps[3]) > 1e-8


def test_texts_are_of_the_language():
    """Pairs of neighbours by a chi-square statistic, within 5 standard deviations, and the mean loss by its own."""
    language = SyntheticLanguage(20, 5, concentration=1.0)
    words = language.sample(200_000, seed=7)
    few = language.sample(500, seed=7)
    assert torch.equal(language.sample(500, seed=7), few) and not torch.equal(language.sample(500, seed=8), few)
    counts = torch.zeros(20, 20, dtype=torch.float64).index_put_(
        (words[:-1], words[1:]), torch.ones(len(words) - 1, dtype=torch.float64), accumulate=True
    )
    expected = counts.sum(1, keepdim=True) * language.log_prob.exp()
    statistic, degrees = ((counts - expected) ** 2 / expected).sum().item(), 20 * 19
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees + (1 / expected).sum().item())
    frequencies = torch.bincount(words, minlength=20) / len(words)
    torch.testing.assert_close(frequencies.double(), language.stationary, rtol=0.1, atol=0)
    losses = -language.log_prob[words[:-1], words[1:]]
    assert (
        abs(losses.mean().item() - language.entropy) < 5 * losses.std().item() / math.sqrt(len(losses)) * 2
    )  # neighbours are not independent


def test_written_texts_are_read_back(tmp_path, capsys):
    arguments = [
        "--out",
        str(tmp_path),
        "--n-words",
        "30",
        "--rank",
        "4",
        "--train",
        "3000",
        "--heldout",
        "500",
        "--seed",
        "5",
    ]
    assert synthetic.main(arguments) == 0
    facts, language, corpus = (
        json.loads((tmp_path / "language.json").read_text()),
        SyntheticLanguage(30, 4, seed=5),
        Corpus(tmp_path),
    )
    assert facts["entropy"] == language.entropy and f"{math.exp(language.entropy):.2f}" in capsys.readouterr().out
    assert len(corpus.vocabulary) == 30
    index = torch.tensor([0 if word == "<eos>" else int(word[1:]) for word in corpus.vocabulary.words])
    assert torch.equal(index[corpus.train][:3000], language.sample(3000, 6)) and corpus.train.numel() <= 3001
    assert (
        torch.equal(index[corpus.test][:500], language.sample(500, 8))
        and index[corpus.valid][:500].tolist() == language.sample(500, 7).tolist()
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--n-words", "1"], "n_words must be in [2, 2**31), got 1"),
        (["--n-words", "9999999999999999999999"], "n_words must be in [2, 2**31), got 9999999999999999999999"),
        (["--train", "9999999999999999999999"], "train must be in [1, 2**31), got 9999999999999999999999"),
        (["--heldout", "1000000000000"], "heldout must be in [1, 2**31), got 1000000000000"),
        (["--heldout", "0"], "heldout must be in [1, 2**31), got 0"),
        (["--seed", "99999999999999999999"], "seed must be in [0, 2**62), got 99999999999999999999"),
        (["--rank", "31"], "rank must be from 2 to n_words = 30, got 31"),
        (["--rank", "1"], "rank must be from 2 to n_words = 30, got 1"),
        (["--concentration", "0"], r"concentration must be positive and finite, got 0"),
        (["--concentration", "nan"], r"concentration must be positive and finite, got nan"),
        (["--train", "20"], "train must be long enough for all n_words = 30 words to occur, got 20, with"),
    ],
)
def test_what_cannot_be_written(changed, message, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "x"), "--n-words", "30", "--rank", "4", "--heldout", "500", *changed]
    assert synthetic.main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_cross_entropy_of_another_size():
    with pytest.raises(ValueError, match=r"log_prob must be \(n_words, n_words\) = \(30, 30\), got \(29, 30\)"):
        SyntheticLanguage(30, 4).cross_entropy(torch.zeros(29, 30))
