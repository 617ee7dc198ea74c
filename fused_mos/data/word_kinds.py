"""English function words, told from content words and from everything else in a text."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["function", "content", "other"]
KINDS: tuple[Kind, ...] = ("function", "content", "other")

FUNCTION_WORDS = frozenset(
    # articles and other determiners
    "a an the this that these those each every either neither some any no all both half such another other many much "
    "more most few fewer little less least several enough what which whose whatever whichever "
    # pronouns
    "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself yourself "
    "himself herself itself ourselves yourselves themselves who whom whoever one ones none nobody nothing somebody "
    "someone something anybody anyone anything everybody everyone everything "
    # prepositions
    "about above across after against along among around as at before behind below beneath beside besides between "
    "beyond by despite down during except for from in inside into like near of off on onto out outside over past per "
    "since through throughout till to toward towards under until up upon via with within without "
    # conjunctions
    "and or but nor so yet if then than because although though while whereas whether unless once "
    # auxiliary and modal verbs
    "am is are was were be been being do does did doing have has had having can could may might must shall should will "
    "would ought cannot "
    # adverbs of grammar
    "not there here where when why how too very also only just even ever never again still "
    # parts that the Penn Treebank splits off
    "n't 's 'm 're 've 'll 'd".split()
)
"""The closed classes of English."""


def kind_of(word: str) -> Kind:
    """Whether a word, in any case, is a function word, a content word or something else: a number, a punctuation mark,
    a placeholder such as <unk>. Words of other languages are content words."""
    word = word.lower()
    if word in FUNCTION_WORDS:
        return "function"
    is_word = any(c.isalpha() for c in word) and not (word.startswith("<") and word.endswith(">")) and word != "n"
    return "content" if is_word else "other"


def kinds_of(words: Sequence[str]) -> Tensor:  # (V,) int64
    """The index in `KINDS` of each word's kind."""
    return torch.tensor([KINDS.index(kind_of(word)) for word in words], dtype=torch.int64)
