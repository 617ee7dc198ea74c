"""Reads a folder of train.txt, valid.txt and test.txt into tensors of word indices, batches and BPTT segments.

Words are split at white space, and each line ends with `<eos>`, as in the paper. The vocabulary is the words of
train.txt in order of first appearance, as in the paper's published code.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..runtime import UserError, files

EOS = "<eos>"
UNKNOWN = "<unk>"
SPLITS = ("train", "valid", "test")


class CorpusError(UserError, ValueError):
    """The corpus cannot be used. The message names the file and the reason."""


class Vocabulary:
    """Words and their indices 0, …, V − 1."""

    def __init__(self, words: Iterable[str]):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words)}
        if len(self.index) != len(self.words):
            raise ValueError(f"words must be distinct, got {len(self.words)} of which {len(self.index)} are")

    def __len__(self) -> int:
        return len(self.words)

    @property
    def _text(self) -> str:
        return "\n".join(self.words) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the words in order, equal to that of the file that `save` writes."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes one word a line. Raises FileError."""
        files.write_text(path, self._text)

    @classmethod
    def load(cls, path: Path, mark: str = EOS) -> "Vocabulary":
        """Reads what `save` wrote. Raises FileError, or CorpusError, also for a vocabulary without `mark`, the token
        that precedes every text."""
        try:
            vocabulary = cls(files.read_text(path).removesuffix("\n").split("\n"))
        except ValueError as error:
            raise CorpusError(f"{path} is not a vocabulary: {error}") from None
        if mark not in vocabulary.index:
            raise CorpusError(f"{path} is not a vocabulary: it lacks {mark}")
        return vocabulary


class Corpus:
    """The three splits of a folder as int64 tensors of word indices.

    Args:
        folder: holds train.txt, valid.txt and test.txt, UTF-8.
        map_unknown: what to do with a word of valid.txt or test.txt that is not in train.txt. False raises; True
            replaces it by `<unk>`, which train.txt must contain. (Replacing changes the meaning of a perplexity.)

    Raises CorpusError, naming the folder, the file or the word, and what to do.
    """

    def __init__(self, folder: str | Path, map_unknown: bool = False):
        folder = Path(folder)
        _check_folder(folder, SPLITS)
        self.vocabulary = Vocabulary(dict.fromkeys(word for _, words in _lines(folder / "train.txt") for word in words))
        self.train, self.valid, self.test = (
            _tokens(folder / f"{split}.txt", self.vocabulary, map_unknown) for split in SPLITS
        )


def read_text(folder: Path, split: str, vocabulary: Vocabulary, map_unknown: bool = False) -> Tensor:
    """Returns the word indices (n,) of the split "train", "valid" or "test" under a given vocabulary. Reads only that
    file. Raises CorpusError."""
    _check_folder(folder, (split,))
    return _tokens(folder / f"{split}.txt", vocabulary, map_unknown)


def _check_folder(folder: Path, splits: Iterable[str]) -> None:
    names = " and ".join(", ".join(f"{split}.txt" for split in splits).rsplit(", ", 1))
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        raise CorpusError(f"data folder {folder} {wrong}; it must hold {names}")
    missing = [f"{split}.txt" for split in splits if not (folder / f"{split}.txt").is_file()]
    if missing:
        raise CorpusError(f"data folder {folder} lacks {', '.join(missing)}")


def _tokens(path: Path, vocabulary: Vocabulary, map_unknown: bool) -> Tensor:
    index = vocabulary.index
    tokens: list[int] = []
    for number, words in _lines(path):
        for word in words:
            token = index.get(word)
            if token is None:
                if not map_unknown:
                    raise CorpusError(
                        f"{path}:{number}: the word {word!r} is not in train.txt's vocabulary of {len(index)} words; "
                        f"train with --map-unknown to count such words as {UNKNOWN}"
                    )
                if UNKNOWN not in index:
                    raise CorpusError(
                        f"{path}:{number}: cannot map {word!r} to {UNKNOWN}, which train.txt does not contain"
                    )
                token = index[UNKNOWN]
            tokens.append(token)
    return torch.tensor(tokens, dtype=torch.int64)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields each line's number and words, ending with `<eos>`."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # utf-8-sig skips a byte-order mark
            for number, line in enumerate(file, start=1):
                yield number, [*line.split(), EOS]
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (near line {number + 1}: {error.reason})") from None
    if number == 0:
        raise CorpusError(f"{path} is empty")


def digest(tokens: Tensor) -> str:
    """SHA-256 of a text (n,)."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def batchify(tokens: Tensor, batch_size: int, least: int = 2) -> Tensor:
    """Cuts a text into `batch_size` parallel columns: (n,) -> (n // batch_size, batch_size). The rest is dropped.

    Raises CorpusError if columns have fewer than `least` rows; with a single row there is no word to predict.
    """
    steps = tokens.numel() // batch_size
    if steps < least:
        raise CorpusError(
            f"a text of {tokens.numel()} tokens is too short for {batch_size} columns of at least {least}; use a "
            "smaller batch size"
        )
    return tokens[: steps * batch_size].view(batch_size, steps).t().contiguous()


def segment(source: Tensor, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns input and target of a BPTT segment: rows [start, start + length) of source (T, B), and each one's next
    row. The segment is shorter at the end of the source."""
    length = min(length, source.shape[0] - 1 - start)
    return source[start : start + length], source[start + 1 : start + 1 + length]


def random_bptt_length(bptt: int, longest: int, generator: torch.Generator) -> int:
    """Draws a segment length (Merity et al. 2017, section 4.1): max(5, int(N(base, 5))), but at most `longest`, where
    base is bptt with probability 0.95 and bptt / 2 otherwise."""
    base = bptt if torch.rand((), generator=generator).item() < 0.95 else bptt / 2
    length = int(base + 5 * torch.randn((), generator=generator).item())
    return min(max(5, length), longest)
