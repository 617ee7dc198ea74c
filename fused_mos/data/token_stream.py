"""Reads prepared One Billion Word shards as parallel columns of text, from memory-mapped files.

A *column* is one of the parallel texts of a batch. Columns are numbered over all ranks, and each rank reads a range of
them, so a column's text and hidden state do not depend on the number of ranks.
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
"""Tokens to count at once: numpy copies them to 8 bytes each."""


@dataclass(frozen=True)
class TokenFile:
    """A shard of int32 token ids. Each sentence is <S>, its words and </S>."""

    path: Path
    n_tokens: int
    sha256: str

    def open(self) -> np.ndarray:
        """Returns the tokens (n_tokens,) int32, memory-mapped. Raises CorpusError if the file is missing or its length
        is not that in the manifest."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise CorpusError(
                f"the shard {self.path} is missing; prepare the corpus again (finished shards are kept)"
            ) from None
        if size != 4 * self.n_tokens:
            raise CorpusError(
                f"the shard {self.path} has {size} bytes, {4 * self.n_tokens} in the manifest; prepare the corpus again"
            )
        return np.memmap(self.path, dtype="<i4", mode="r")

    def check(self, progress: Callable[[int], Any]) -> None:
        """Raises CorpusError unless the content has the manifest's digest. Calls `progress` with the number of bytes
        after each read."""
        self.open()
        if (digest := sha256(self.path, progress)) != self.sha256:
            raise CorpusError(
                f"the shard {self.path} is damaged: its sha256 is {digest[:12]}…, {self.sha256[:12]}… in the manifest; "
                "prepare the corpus again"
            )


class PreparedCorpus:
    """A corpus written to `folder` by `python -m fused_mos.data.lm1b prepare`.

    Raises CorpusError if the folder is not a prepared corpus, or a file is missing or has the wrong length.
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
        """Verifies the digests of this rank's share of the files; see `TokenFile.check`."""
        files = [*self.train, *self.heldout][rank::n_ranks]
        n_bytes = 4 * sum(f.n_tokens for f in files)
        with bar(desc="check shards", unit="bytes", total=n_bytes, leave=False, disable=rank > 0) as shown:
            for file in files:
                file.check(shown.update)

    def count_targets(self, rank: int = 0, n_ranks: int = 1) -> Tensor:
        """Returns how often each word is a target in this rank's share of the training shards, (V,) int64."""
        counts = np.zeros(len(self.vocabulary), dtype=np.int64)
        for file in self.train[rank::n_ranks]:
            text = file.open()
            for start in range(0, len(text), COUNTED_AT_ONCE):
                counts += np.bincount(text[start : start + COUNTED_AT_ONCE], minlength=len(counts))
        counts[self.bos] = 0
        return torch.from_numpy(counts)


@dataclass
class Position:
    """Position of training in the corpus, the same on all ranks; part of a checkpoint."""

    epoch: int = 0
    shard: int = 0  # index in the epoch's order
    row: int = 0  # row within the shard


class Segment(NamedTuple):
    """Training text of this rank's columns."""

    inputs: Tensor  # (T, columns of this rank) int64
    targets: Tensor  # (T, columns of this rank) int64
    words: int  # number of targets in the columns of all ranks


@dataclass
class TrainStream:
    """Yields segments of training text, shard after shard, in an order that depends on the seed and the epoch.

    Each shard is cut into `n_columns` columns; the remaining tokens, fewer than n_columns, are left out. The hidden
    state is carried from shard to shard. The last segment of a shard may have a single row. (AWD-LSTM's published code
    skips such segments, since its temporal regularisation would be NaN. There is none here.)

    Args:
        files: the training shards.
        n_columns: number of columns over all ranks.
        columns: the columns of this rank.
        bptt: rows in a segment; the last one of a shard may have fewer.
        bos: the token <S>, which is never a target.
        seed: seed of the order.
        position: where to start.

    Raises CorpusError if a shard is too short for `n_columns` columns.
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
        """Continues from `position`. Raises ValueError if it is outside the text."""
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
        """Number of epochs done, including the fraction of the current one."""
        done = sum(
            self.files[i].n_tokens // self.n_columns - 1 for i in self.order(self.position.epoch)[: self.position.shard]
        )
        return self.position.epoch + (done + self.position.row) / self.rows_per_epoch

    def segments(self) -> Iterator[Segment]:
        """Yields the segments from `position` to the end of the epoch. `position` moves before each is yielded.

        Each rank counts the words of all ranks itself, since it has all of the text.
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
    """Yields a whole held-out shard as segments (T, columns of this rank).

    Each column starts with a sentence, so every word is predicted once for any number of columns. Shorter columns are
    padded with `bos`, which is never a target.
    """
    text = file.open()
    starts = np.flatnonzero(text == bos)
    # columns start at the sentences nearest to equal shares of the tokens; a column may be empty
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
