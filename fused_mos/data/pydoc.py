"""A real text that every machine with Python has: the language reference behind `help("topics")`.

CPython ships it as pydoc_data.topics: some 80 articles, 65,000 white-space words.
"""

import re
from collections import Counter
from pathlib import Path

from .corpus import UNKNOWN

TOKEN = re.compile(r"[a-z_]+|\d+|([^\sa-z_\d])\1*")
"""A word, a number, or a run of one punctuation mark (headings are underlined with runs)."""


def write_pydoc_corpus(folder: Path, min_count: int = 3) -> None:
    """Writes train.txt, valid.txt and test.txt to `folder`: lower-cased words and punctuation, a paragraph a line.

    Of each ten paragraphs one goes to valid and one to test, which keeps the three alike. Words that train.txt
    has fewer than `min_count` times, anywhere, become `<unk>`; digits become N, as in the Penn Treebank.

    Raises FileNotFoundError if this Python has no pydoc_data.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError("this Python ships no pydoc_data.topics; Debian has it in libpython3-stdlib") from None
    paragraphs = [
        ["N" if match[0].isdigit() else match[0] for match in TOKEN.finditer(paragraph.lower())]
        for name in sorted(topics)
        for paragraph in topics[name].split("\n\n")
    ]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    splits = {
        "train": [p for i, p in enumerate(paragraphs) if i % 10 < 8],
        "valid": paragraphs[8::10],
        "test": paragraphs[9::10],
    }
    counts = Counter(token for paragraph in splits["train"] for token in paragraph)
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in splits.items():
        lines = (" ".join(t if counts[t] >= min_count else UNKNOWN for t in paragraph) for paragraph in text)
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
