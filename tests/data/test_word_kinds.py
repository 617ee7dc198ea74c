"""Which words are function words."""

import pytest

from fused_mos.data.word_kinds import KINDS, kind_of, kinds_of


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("function", ["the", "The", "of", "n't", "'s", "would", "themselves"]),
        ("content", ["cat", "house", "élan", "__init__", "u.s.", "is-a"]),
        ("other", ["<unk>", "<eos>", "N", "$", ",", "12.5", "====", ""]),
    ],
)
def test_kinds(kind, words):
    assert [kind_of(word) for word in words] == [kind] * len(words)
    assert kinds_of(words).tolist() == [KINDS.index(kind)] * len(words)
