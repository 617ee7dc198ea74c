"""Generate a corpus of random words with the size and the files of the One Billion Word benchmark, for
fused_mos.data.lm1b:

    python -m benchmarks.lm1b_corpus OUT [--words 100_000_000] [--vocabulary 793_468] [--shards 99] …

Word frequencies follow the Zipf–Mandelbrot law: rank r has probability ∝ 1 / (r + 2.7).
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from fused_mos.data.lm1b import FOLDERS, MIN_COUNT, SHARDS

SHIFT = 2.7
SENTENCE = 25
"""Mean length of a sentence, in words."""
CHUNK = 1 << 20
"""Words to join at once, which bounds the memory."""


@dataclasses.dataclass
class Config:
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    words: int = 100_000_000
    """Words in all training shards."""
    heldout_words: int = 0
    """Words in all held-out shards. 0 means as many as in a training shard, as in the benchmark."""
    vocabulary: int = 793_468
    """Distinct words. Each occurs at least three times if the training shards have that many words."""
    shards: int = 99
    """Training shards."""
    heldout_shards: int = 50
    """Held-out shards."""
    seed: int = 1
    """Seed of the random words."""

    def check(self) -> None:
        for name, value, most in (
            ("shards", self.shards, len(SHARDS["train"])),
            ("heldout_shards", self.heldout_shards, len(SHARDS["heldout"])),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {value}")
        if self.vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {self.vocabulary}")
        if self.words < self.shards * self.heldout_shards:
            raise ValueError(
                f"words must be at least shards x heldout_shards, {self.shards * self.heldout_shards}, got {self.words}"
            )
        if self.heldout_words and self.heldout_words < self.heldout_shards:
            raise ValueError(
                f"heldout_words must be at least heldout_shards, {self.heldout_shards}, got {self.heldout_words}"
            )


def words(n: int) -> list[bytes]:
    """`n` distinct words. The frequent ones are short, so that text has about the word length of English."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou"]
    all_words = ("".join(word) for length in itertools.count(1) for word in itertools.product(syllables, repeat=length))
    return [word.encode() for word in itertools.islice(all_words, n)]


def ranks(n: int, vocabulary: int, generator: np.random.Generator) -> np.ndarray:
    """`n` random ranks, counted from 0. Rank r takes the area under 1 / x from r + 2.2 to r + 3.2, which is
    1 / (r + 2.7) within a hundredth."""
    first = SHIFT + 0.5
    x = first * np.exp(generator.random(n) * np.log1p(vocabulary / first))
    return np.minimum((x - first).astype(np.int32), vocabulary - 1)


def write_shard(path: Path, n: int, often_enough: np.ndarray, table: np.ndarray, generator: np.random.Generator) -> int:
    """Write `n` words, which include those of `often_enough`. Return the bytes written."""
    vocabulary = len(table) // 2
    ids = np.concatenate([often_enough, ranks(n - len(often_enough), vocabulary, generator)])
    generator.shuffle(ids)
    # sentence lengths with the benchmark's mean and spread
    ends = np.cumsum(1 + generator.negative_binomial(4, 4 / (SENTENCE + 3), n // 20 + 50)) - 1
    ids[ends[ends < n - 1]] += vocabulary
    ids[-1] += vocabulary
    with path.open("wb") as file:
        for start in range(0, n, CHUNK):
            file.write(b"".join(table[ids[start : start + CHUNK]].tolist()))
        return file.tell()


def generate(config: Config) -> None:
    config.check()
    start, n_bytes = time.monotonic(), 0
    vocabulary = words(config.vocabulary)
    table = np.array([word + end for end in (b" ", b"\n") for word in vocabulary], dtype=object)
    needed = MIN_COUNT * config.vocabulary if MIN_COUNT * config.vocabulary <= config.words else 0
    heldout_words = config.heldout_words or config.words // config.shards
    with tqdm(
        total=config.words + heldout_words, unit="words", unit_scale=True, mininterval=0.5, dynamic_ncols=True
    ) as bar:
        for split, n_shards, n_words in (
            ("train", config.shards, config.words),
            ("heldout", config.heldout_shards, heldout_words),
        ):
            folder = config.out / FOLDERS[split]
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n_shards):
                first, last = n_words * i // n_shards, n_words * (i + 1) // n_shards
                share = (first * needed // n_words, last * needed // n_words) if split == "train" else (0, 0)
                often_enough = np.arange(*share, dtype=np.int32) % config.vocabulary
                generator = np.random.default_rng([config.seed, n_shards, i, split == "train"])
                n_bytes += write_shard(folder / SHARDS[split][i], last - first, often_enough, table, generator)
                bar.update(last - first)
    seconds = time.monotonic() - start
    print(
        f"{config.out}: {bar.n:,} words, {n_bytes / 1e6:,.0f} MB in {seconds:.1f} s, {bar.n / seconds / 1e6:.2f} M "
        "words/s"
    )


def main() -> int:
    try:
        generate(tyro.cli(Config, prog="python -m benchmarks.lm1b_corpus", description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
