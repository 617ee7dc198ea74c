"""The prepared One Billion Word shards as parallel columns of text, read from memory-mapped files.

A *column* is one line of text that a row of the batch reads on and on. Columns are numbered over the whole job: each
rank reads its own span of them, so what a column reads, and its hidden state, do not depend on how many ranks there
are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import sha256
from ..runtime.progress import bar
from .corpus import CorpusError, Vocabulary
from .lm1b import BOS
from .manifest import read_manifest

COUNTED_AT_ONCE = 1 << 22
"""Tokens of which numpy makes a copy in 8 bytes each."""


@dataclass(frozen=True)
class TokenFile:
    """A shard of int32 words: each sentence <S>, its words, </S>."""

    path: Path
    n_tokens: int
    sha256: str

    def open(self) -> np.ndarray:
        """(n_tokens,) int32, memory-mapped. Raises CorpusError where the file is not of the manifest's length."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise CorpusError(
                f"the shard {self.path} is missing; prepare the corpus again, finished shards are kept"
            ) from None
        if size != 4 * self.n_tokens:
            raise CorpusError(
                f"the shard {self.path} has {size} bytes, {4 * self.n_tokens} in the manifest; prepare the corpus again"
            )
        return np.memmap(self.path, dtype="<i4", mode="r")

    def check(self, progress: Callable[[int], Any]) -> None:
        """Raises CorpusError unless the content is that of the manifest. `progress` is told the bytes read."""
        self.open()
        if (digest := sha256(self.path, progress)) != self.sha256:
            raise CorpusError(
                f"the shard {self.path} is damaged: its sha256 is {digest[:12]}…, {self.sha256[:12]}… in the manifest; "
                "prepare the corpus again"
            )


class PreparedCorpus:
    """What `python -m fused_mos.data.lm1b prepare` wrote to `folder`.

    Raises CorpusError where the folder is not a prepared corpus, or a file of it is missing or of another length.
    """

    def __init__(self, folder: Path):
        manifest = read_manifest(folder)
        self.digest = manifest["vocabulary"]["sha256"]
        path = folder / "vocabulary.txt"
        if not path.is_file() or sha256(path) != self.digest:
            raise CorpusError(
                f"{path} is not the vocabulary that the shards were prepared with; prepare the corpus again"
            )
        self.vocabulary = Vocabulary.load(path, BOS)
        self.bos = self.vocabulary.index[BOS]
        self.train, self.heldout = (
            [TokenFile(folder / f["file"], f["tokens"], f["sha256"]) for f in manifest[split]]
            for split in ("train", "heldout")
        )
        for file in (*self.train, *self.heldout):
            file.open()

    def check(self, rank: int = 0, n_ranks: int = 1) -> None:
        """Compares the digests of the files that are this rank's to check; see `TokenFile.check`."""
        files = [*self.train, *self.heldout][rank::n_ranks]
        n_bytes = 4 * sum(f.n_tokens for f in files)
        with bar(desc="check shards", unit="bytes", total=n_bytes, leave=False, disable=rank > 0) as shown:
            for file in files:
                file.check(shown.update)

    def count_targets(self, rank: int = 0, n_ranks: int = 1) -> Tensor:
        """How often each word is to be predicted in the training shards that are this rank's to count, (V,) int64."""
        counts = np.zeros(len(self.vocabulary), dtype=np.int64)
        for file in self.train[rank::n_ranks]:
            text = file.open()
            for start in range(0, len(text), COUNTED_AT_ONCE):
                counts += np.bincount(text[start : start + COUNTED_AT_ONCE], minlength=len(counts))
        counts[self.bos] = 0
        return torch.from_numpy(counts)


@dataclass
class Position:
    """Where training stands in the corpus: what a checkpoint keeps of the data, the same on all ranks."""

    epoch: int = 0
    shard: int = 0  # of the epoch's order
    row: int = 0  # of the shard


class Segment(NamedTuple):
    """Training text of this rank's columns."""

    inputs: Tensor  # (T, columns of this rank) int64
    targets: Tensor  # (T, columns of this rank) int64
    words: int  # to predict, in the columns of all ranks


@dataclass
class TrainStream:
    """Segments of training text, shard after shard, in an order that the seed and the epoch give.

    Each shard is cut into as many columns as the whole batch has; the last few tokens, fewer than columns, are left
    out. A hidden state is carried from a shard to the next. The last segment of a shard may have a single row. (The
    published code of AWD-LSTM skips such a segment: its temporal regularisation would be NaN. There is none here.)

    Args:
        files: the training shards.
        n_columns: of the batch over all ranks.
        columns: those of this rank.
        bptt: rows of a segment; the last of a shard may have fewer.
        bos: the token that is no word to predict.
        seed: of the order.
        position: where to start.

    Raises CorpusError where a shard is too short for `n_columns` columns.
    """

    files: list[TokenFile]
    n_columns: int
    columns: range
    bptt: int
    bos: int
    seed: int
    position: Position = field(default_factory=Position)

    def __post_init__(self):
        for file in self.files:
            if file.n_tokens // self.n_columns < 2:
                raise CorpusError(
                    f"the shard {file.path} of {file.n_tokens} tokens is too short for {self.n_columns} columns of "
                    "at least 2; use a smaller batch_size"
                )

    def go_to(self, position: Position) -> None:
        """The segments go on from `position`. Raises ValueError where the text has no such."""
        shards = len(self.files)
        if not (0 <= position.epoch < 2**62 and 0 <= position.shard < shards):
            raise ValueError(f"position must be in one of {shards} shards of an epoch, got {position}")
        rows = self.files[self.order(position.epoch)[position.shard]].n_tokens // self.n_columns
        if not 0 <= position.row < rows:
            raise ValueError(f"position must be in the {rows} rows of its shard, got {position}")
        self.position = position

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(((self.seed << 20) + epoch) % 2**63)
        return torch.randperm(len(self.files), generator=generator).tolist()

    @property
    def rows_per_epoch(self) -> int:
        return sum(file.n_tokens // self.n_columns - 1 for file in self.files)

    @property
    def fraction(self) -> float:
        """Epochs done, with the share of the present one."""
        done = sum(
            self.files[i].n_tokens // self.n_columns - 1 for i in self.order(self.position.epoch)[: self.position.shard]
        )
        return self.position.epoch + (done + self.position.row) / self.rows_per_epoch

    def segments(self) -> Iterator[Segment]:
        """The segments from `position`, which is moved before each is handed out, to the end of the epoch.

        All ranks have all of the text, so each counts the words of all by itself instead of asking the others.
        """
        position, order = self.position, self.order(self.position.epoch)
        while position.shard < len(order):
            file = self.files[order[position.shard]]
            rows = file.n_tokens // self.n_columns
            text = file.open()[: rows * self.n_columns].reshape(self.n_columns, rows)
            own = text[self.columns.start : self.columns.stop]
            while position.row < rows - 1:
                start, stop = position.row, min(position.row + self.bptt, rows - 1)
                tokens = torch.from_numpy(own[:, start : stop + 1].T.astype(np.int64))
                words = int(np.count_nonzero(text[:, start + 1 : stop + 1] != self.bos))
                segment = Segment(tokens[:-1], tokens[1:], words)
                position.row = stop
                if stop == rows - 1 and position.shard == len(order) - 1:
                    self.position.epoch, self.position.shard, self.position.row = position.epoch + 1, 0, 0
                    yield segment
                    return
                yield segment
            position.shard, position.row = position.shard + 1, 0


def evaluation_segments(
    file: TokenFile, bos: int, n_columns: int, columns: range, bptt: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A held-out shard as segments (T, columns of this rank) of all its sentences: the columns start with sentences, so
    that every word is predicted once whatever their number. Behind the end of a column stands `bos`, which is no
    target."""
    text = file.open()
    starts = np.flatnonzero(text == bos)
    # the sentences nearest to equal shares of the tokens; a column may have none
    bounds = np.append(
        starts[np.minimum(np.searchsorted(starts, np.arange(n_columns) * len(text) / n_columns), len(starts) - 1)],
        len(text),
    )
    bounds[0] = 0
    rows = int(np.diff(bounds).max())
    for start in range(0, rows - 1, bptt):
        stop = min(start + bptt, rows - 1)
        padded = np.full((len(columns), stop + 1 - start), bos, dtype=np.int64)
        for i, column in enumerate(columns):
            words = text[bounds[column] : bounds[column + 1]][start : stop + 1]
            padded[i, : len(words)] = words
        segment = torch.from_numpy(padded.T.copy())
        yield segment[:-1], segment[1:]
