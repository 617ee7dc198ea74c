"""The sample text, which ships with Python: the language reference behind `help("topics")`.

CPython has it as pydoc_data.topics, about 80 articles and 65,000 words. The commands train on it if no corpus is given.
"""

import platform
import random
import re
from collections import Counter
from pathlib import Path

from ..runtime import files
from . import lm1b
from .corpus import SPLITS, UNKNOWN, CorpusError

TOKEN = re.compile(r"[a-z_]+|\d+|([^\sa-z_\d])\1*")
"""A word, a number, or a run of one punctuation mark (runs underline headings)."""

NAME = "Python's own documentation"


def paragraphs() -> list[list[str]]:
    """Returns the tokens of each paragraph: lower-cased words, numbers (as N, like Penn Treebank) and punctuation.

    Raises CorpusError if this Python has no pydoc_data.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            "this Python has no pydoc_data.topics, the sample text; install it (Debian: libpython3-stdlib) "
            "or name a corpus with --data"
        ) from None
    found = (
        ["N" if match[0].isdigit() else match[0] for match in TOKEN.finditer(paragraph.lower())]
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
    )
    return [paragraph for paragraph in found if paragraph]


def texts(min_count: int = 3) -> dict[str, str]:
    """Returns the splits train, valid and test, one paragraph a line.

    One paragraph in ten goes to valid and one to test, so that the splits are alike. Words that occur fewer than
    `min_count` times in train become `<unk>` in all splits.

    Raises CorpusError if this Python has no pydoc_data.
    """
    text = paragraphs()
    splits = {"train": [p for i, p in enumerate(text) if i % 10 < 8], "valid": text[8::10], "test": text[9::10]}
    counts = Counter(token for paragraph in splits["train"] for token in paragraph)

    def line(paragraph: list[str]) -> str:
        return " ".join(t if counts[t] >= min_count else UNKNOWN for t in paragraph) + "\n"

    return {split: "".join(map(line, part)) for split, part in splits.items()}


def write_corpus(folder: Path) -> None:
    """Writes `texts` to train.txt, valid.txt and test.txt in `folder`. Raises CorpusError, FileError."""
    files.make_folder(folder)
    for split, text in texts().items():
        files.write_text(folder / f"{split}.txt", text)


def is_corpus(folder: Path) -> bool:
    """True if `folder` only has files that `write_corpus` writes, even if it was killed before it wrote them all."""
    if not folder.is_dir():
        return False
    known = {f"{split}.txt": text.encode() for split, text in texts().items()}
    paths = [path for path in folder.iterdir() if not files.is_leftover(path)]
    return all(path.is_file() and path.read_bytes() == known.get(path.name) for path in paths)


def write_benchmark(folder: Path) -> None:
    """Writes the text in the format of the One Billion Word benchmark: shuffled paragraphs, one a line, in three
    training shards and a held-out one. Raises FileError, or CorpusError if this Python has no pydoc_data."""
    lines = [" ".join(paragraph) + "\n" for paragraph in paragraphs()]
    random.Random(0).shuffle(lines)
    shards = [("train", name) for name in lm1b.SHARDS["train"][:3]] + [("heldout", lm1b.SHARDS["heldout"][0])]
    bounds = [0, *(len(lines) * share // 10 for share in (3, 6, 9, 10))]
    for (split, name), start, stop in zip(shards, bounds, bounds[1:]):
        path = folder / lm1b.FOLDERS[split] / name
        files.make_folder(path.parent)
        files.write_text(path, "".join(lines[start:stop]))


def _folders() -> tuple[Path, Path]:
    """Returns the folders of the corpus and of its benchmark format in the user's cache."""
    cache, python = files.cache_folder(), f"python-{platform.python_version()}"
    return cache / f"sample-{python}", cache / f"sample-1b-{python}"


def is_sample(data: Path) -> bool:
    """True for the folders that `cached_corpus` and `cached_benchmark` return."""
    corpus, benchmark = _folders()
    return files.real(data) in (files.real(corpus), files.real(benchmark / "prepared"))


def cached_corpus() -> Path:
    """Returns a folder in the user's cache with the files of `write_corpus`, which are written once."""
    folder, _ = _folders()
    with files.FolderLock(folder, wait=True):
        if not all((folder / f"{split}.txt").is_file() for split in SPLITS):
            write_corpus(folder)
    return folder


def cached_benchmark() -> Path:
    """Returns a folder in the user's cache with the prepared text of `write_benchmark`, which is written once."""
    _, folder = _folders()
    with files.FolderLock(folder, wait=True):
        if not (folder / "prepared" / "manifest.json").is_file():
            write_benchmark(folder / "source")
            lm1b.prepare(lm1b.Prepare(folder / "source", folder / "prepared", workers=1, allow_missing=True))
    return folder / "prepared"
