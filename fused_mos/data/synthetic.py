"""Write texts of a language whose rank and entropy are known (Yang et al. 2018, section 2).

    python -m fused_mos.data.synthetic --out DIR [--n-words 1000] [--rank 65] [--concentration 2.5]

Writes train.txt, valid.txt and test.txt, to measure with fused_mos.train what a low rank costs.

language.json has the perplexity that no model can beat.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..runtime import UserError, command, files
from ..runtime.text import show

LARGEST = 2**31
"""Upper bound of sizes, exclusive."""


class SyntheticLanguage:
    """A bigram language, in which the matrix of log p(next word | word) has the given rank.

    Its logits are products of Gaussian vectors with rank − 1 features. A softmax over that many features can express
    it, and one over fewer cannot, since log-probabilities determine a row of logits up to a shift (section 2.2). The
    normalisers of the rows add one to the rank.

    Args:
        n_words: vocabulary size V; the first word ends a line.
        rank: rank of the matrix of log-probabilities, from 2 to V.
        concentration: standard deviation of the logits, in nats; 0 would be uniform.
        seed: seed of the language, not of its texts.

    Attributes:
        log_prob: (V, V) float64; row u holds log p(v | u).
        stationary: (V,) float64, relative frequency of each word in a long text.
        entropy: entropy of a word given the previous one, in nats. No model's expected loss is lower.

    Raises ValueError for an argument out of its range.
    """

    def __init__(self, n_words: int = 1000, rank: int = 65, concentration: float = 2.5, seed: int = 0):
        if not 2 <= n_words < LARGEST:
            raise ValueError(f"n_words must be in [2, 2**31), got {n_words}")
        if not 2 <= rank <= n_words:
            raise ValueError(f"rank must be from 2 to n_words = {n_words}, got {rank}")
        if not (concentration > 0 and math.isfinite(concentration)):
            raise ValueError(f"concentration must be positive and finite, got {concentration}")
        if not 0 <= seed < 2**62:  # leaves room for the seeds of its texts
            raise ValueError(f"seed must be in [0, 2**62), got {seed}")
        generator = torch.Generator().manual_seed(seed)
        context, word = (torch.randn(n_words, rank - 1, generator=generator, dtype=torch.float64) for _ in range(2))
        self.rank = rank
        self.log_prob = torch.log_softmax(concentration * (rank - 1) ** -0.5 * context @ word.T, 1)
        self.stationary = _stationary(self.log_prob.exp())
        self.entropy = self.cross_entropy(self.log_prob)

    @property
    def n_words(self) -> int:
        return len(self.log_prob)

    def cross_entropy(self, log_prob: Tensor) -> float:
        """Returns the exact expected loss, in nats per word, of a model with these log-probabilities (V, V)."""
        if log_prob.shape != self.log_prob.shape:
            raise ValueError(
                f"log_prob must be (n_words, n_words) = {tuple(self.log_prob.shape)}, got {tuple(log_prob.shape)}"
            )
        return -(self.stationary @ (self.log_prob.exp() * log_prob.double()).sum(1)).item()

    def sample(self, n: int, seed: int) -> Tensor:
        """Returns a text (n,) int64 of n words, whose first word is drawn from the stationary distribution."""
        uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        until = self.log_prob.exp().cumsum(1).clamp_(max=1)
        until[:, -1] = 1  # rounding may leave it below
        words = torch.empty(n, dtype=torch.int64)
        cumulative = self.stationary.cumsum(0)
        for i, u in enumerate(uniform):
            words[i] = word = min(int(torch.searchsorted(cumulative, u, right=True)), self.n_words - 1)
            cumulative = until[word]
        return words


def _stationary(transition: Tensor) -> Tensor:
    """Returns the unique stationary distribution of a transition matrix with positive entries."""
    n = len(transition)
    equations = torch.cat(
        [transition.T - torch.eye(n, dtype=transition.dtype), torch.ones(1, n, dtype=transition.dtype)]
    )
    right = torch.zeros(n + 1, 1, dtype=transition.dtype)
    right[-1] = 1
    found = torch.linalg.lstsq(equations, right).solution[:, 0].clamp_(min=0)
    return found / found.sum()


@dataclasses.dataclass
class Flags:
    out: Path
    """Folder to write to."""
    n_words: int = 1000
    """Vocabulary size; the first word is the end of a line."""
    rank: int = 65
    """Rank of the matrix of log-probabilities. A softmax needs rank − 1 features to express it."""
    concentration: float = 2.5
    """Standard deviation of the logits, in nats."""
    seed: int = 0
    """Random seed of the language and its texts."""
    train: int = 1_000_000
    """Number of words in train.txt."""
    heldout: int = 100_000
    """Number of words in each of valid.txt and test.txt."""


def write(config: Flags) -> dict[str, float]:
    """Writes the folder and returns the content of language.json. Raises ValueError for sizes out of range, or a text
    too short to contain each word; FolderOccupied for a folder with other content; FolderInUse."""
    for name in ("train", "heldout"):
        if not 1 <= getattr(config, name) < LARGEST:
            raise ValueError(f"{name} must be in [1, 2**31), got {getattr(config, name)}")
    language = SyntheticLanguage(config.n_words, config.rank, config.concentration, config.seed)
    texts = {
        split: language.sample(n, config.seed + i)
        for i, (split, n) in enumerate(
            {"train": config.train, "valid": config.heldout, "test": config.heldout}.items(), start=1
        )
    }
    if missing := config.n_words - len(texts["train"].unique()):
        raise ValueError(
            f"train must be long enough for all n_words = {config.n_words} words to occur, got {config.train}, with "
            f"{missing} words missing"
        )
    files.refuse_foreign(config.out, lambda path: path.name == "language.json")
    facts = {
        "entropy": language.entropy,
        "perplexity": math.exp(language.entropy),
        "rank": language.rank,
        "n_words": config.n_words,
        "concentration": config.concentration,
        "seed": config.seed,
    }
    with files.FolderLock(config.out):
        # written first, so that a folder left by a kill is recognised
        files.write_json(config.out / "language.json", facts)
        words = ["\n"] + [f"w{i} " for i in range(1, config.n_words)]
        for split, tokens in texts.items():
            # a newline is a word; Corpus adds the one that ends the last line
            files.write_text(config.out / f"{split}.txt", "".join(words[i] for i in tokens.tolist()))
    return facts


def work(arguments: list[str]) -> None:
    config = command.parse(Flags, "data.synthetic", __doc__, arguments)
    try:
        facts = write(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    show(
        f"{config.out}: {config.n_words} words, rank {config.rank}; the lowest possible perplexity is "
        f"{facts['perplexity']:.2f}"
    )


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
