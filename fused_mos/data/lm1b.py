"""Download the One Billion Word benchmark (Chelba et al. 2013), and prepare it for training.

    python -m fused_mos.data.lm1b download --out DIR
    python -m fused_mos.data.lm1b prepare --source DIR --out DIR [--min-count N | --top N]

Prepared shards are token ids in little-endian int32; each sentence is `<S>`, its words and `</S>`.

If a command was stopped or killed, the same command continues.
"""

import codecs
import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import command, files
from ..runtime.progress import bar
from ..runtime.text import show
from .corpus import CorpusError
from .download import BLOCK_BYTES, FOLDER, Download, download
from .manifest import FOLDERS
from .workers import in_processes, usable_processors

BOS, EOS, UNKNOWN = MARKS = ("<S>", "</S>", "<UNK>")
SHARDS = {
    "train": [f"news.en-{i:05}-of-00100" for i in range(1, 100)],
    "heldout": [f"news.en.heldout-{i:05}-of-00050" for i in range(50)],
}
"""File names of the benchmark's shards. The held-out shards take the place of training shard 0."""
MIN_COUNT = 3
ENTRY = {"file", "tokens", "sentences", "unknown", "empty", "sha256", "vocabulary", "source"}
"""Keys of a shard's JSON file."""
START, END = b"\xfe", b"\xff"
"""Placeholders for the marks of a sentence until it is encoded. No UTF-8 text contains these bytes."""


@dataclasses.dataclass
class Prepare:
    """Write the vocabulary, the shards' token ids and manifest.json."""

    source: Path
    """Folder of the benchmark, or the folder into which it was extracted."""
    out: Path
    """Folder to write to. Finished parts of an earlier run are kept."""
    min_count: int | None = None
    """Choose as vocabulary all words that occur at least this often in the training shards; 3 by default."""
    top: int | None = None
    """Or choose the most frequent words; this number includes the marks <S>, </S> and <UNK>."""
    vocabulary: Path | None = None
    """Or read the vocabulary from this file: one word a line, including the three marks. Line numbers become ids."""
    workers: int | None = None
    """Number of processes; by default one for each available processor."""
    allow_missing: bool = False
    """Accept fewer shards than the benchmark has."""

    def check(self) -> None:
        given = [
            (name, value) for name in ("min_count", "top", "vocabulary") if (value := getattr(self, name)) is not None
        ]
        if len(given) > 1:
            (a, first), (b, second) = given[:2]
            raise CorpusError(
                f"--{a.replace('_', '-')} {first} and --{b} {second} both choose the vocabulary; pass only one of them"
            )
        for name, least in (("min_count", 1), ("top", len(MARKS) + 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CorpusError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of sentences, and the files made from it: its word counts and its token ids."""

    path: Path
    n_bytes: int
    counts: Path
    tokens: Path

    def blocks(self, hashed: Any) -> Iterator[bytes]:
        """Yields its lines, some MiB at a time, without a byte-order mark. Updates the hashlib object `hashed` with all
        bytes. Raises CorpusError if they are not UTF-8."""
        before = 0
        with self.path.open("rb") as file:
            while block := file.read(BLOCK_BYTES) + file.readline():
                try:
                    block.decode()
                except UnicodeDecodeError as error:
                    line = before + block.count(b"\n", 0, error.start) + 1
                    raise CorpusError(
                        f"{self.path}:{line} is not UTF-8 text ({error.reason}); download the shard again"
                    ) from None
                hashed.update(block)
                yield block if before else block.removeprefix(codecs.BOM_UTF8)
                before += block.count(b"\n")


class Index(dict):
    """Maps words to ids. Words outside the vocabulary, or that look like a mark, become `<UNK>`."""

    def __init__(self, words: list[bytes]):
        super().__init__((word, i) for i, word in enumerate(words))
        self.bos, self.eos, self.unknown = (self.pop(mark.encode()) for mark in MARKS)
        self[START], self[END] = self.bos, self.eos

    def __missing__(self, word: bytes) -> int:
        return self.unknown

    def encode(self, lines: bytes) -> np.ndarray:
        """Returns the token ids of whole lines, skipping blank ones."""
        words = (START + b" " + lines.replace(b"\n", b" " + END + b" " + START + b" ")).split()
        ids = np.fromiter(map(self.__getitem__, words), "<i4", len(words))[:-1]
        blank = np.flatnonzero((ids[:-1] == self.bos) & (ids[1:] == self.eos))
        return np.delete(ids, [blank, blank + 1]) if blank.size else ids


def prepare(config: Prepare) -> dict[str, Any]:
    """Prepares the corpus and returns the content of manifest.json. Raises CorpusError, FileError or FolderInUse;
    calling it again continues the work."""
    config.check()
    shards = {split: _find_shards(config, split) for split in FOLDERS}
    words = _read_vocabulary(config.vocabulary) if config.vocabulary else None
    with files.FolderLock(config.out):
        return _prepare(config, shards, words)


def _prepare(config: Prepare, shards: dict[str, list[Shard]], words: list[bytes] | None) -> dict[str, Any]:
    """Prepares the shards. `words` are those of config.vocabulary; None counts words to choose the vocabulary."""
    for name in ("counts", *FOLDERS):
        files.make_folder(config.out / name)
    source_digest = functools.cache(lambda shard: files.sha256(shard.path))  # only shards that seem finished need it
    if words is None:
        words = _count_vocabulary(config, shards["train"], source_digest)
    text = b"\n".join(words) + b"\n"
    digest = hashlib.sha256(text).hexdigest()
    path, manifest_path = config.out / "vocabulary.txt", config.out / "manifest.json"
    finished = {shard: _finished(shard, digest, source_digest) for of_split in shards.values() for shard in of_split}
    pending = [shard for shard, entry in finished.items() if entry is None]
    known = path.is_file() and path.read_bytes() == text
    if pending or not known:
        manifest_path.unlink(missing_ok=True)
    if not known:
        with files.writing(path) as file:
            file.write(text)
    description = f"tokenise {len(pending)} of {len(finished)} shards"
    entries = {shard: entry for shard, entry in finished.items() if entry is not None} | _each(
        functools.partial(_tokenise, digest=digest),
        pending,
        config.workers,
        description,
        lambda e: e["tokens"] - 2 * e["sentences"],
    )
    manifest = {"format": 1, "vocabulary": {"words": len(words), "sha256": digest}}
    for split, of_split in shards.items():
        manifest[split] = [
            {key: value for key, value in entries[shard].items() if key != "vocabulary"} for shard in of_split
        ]
    files.write_sealed(manifest_path, manifest)
    return manifest


def _find_shards(config: Prepare, split: str) -> list[Shard]:
    root = config.source / FOLDER if (config.source / FOLDER).is_dir() else config.source
    folder, out, names = root / FOLDERS[split], config.out, SHARDS[split]
    missing = [name for name in names if not (folder / name).is_file()]
    if len(missing) == len(names):
        raise CorpusError(
            f"{folder} has no shard such as {names[0]}; --source must name the benchmark's folder, got {config.source}"
        )
    if missing and not config.allow_missing:
        listed = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        have = len(names) - len(missing)
        raise CorpusError(
            f"{folder} has {have} of {len(names)} shards and lacks {listed}; complete it, or pass --allow-missing to "
            "accept fewer"
        )
    shards = []
    for name in sorted({*names} - {*missing}):
        path = folder / name
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read() != b"\n":
                raise CorpusError(
                    f"{path} is truncated: its {size:,} bytes do not end with a newline; download it again"
                )
        shards.append(Shard(path, size, out / "counts" / f"{name}.tsv", out / split / f"{name}.tokens"))
    return shards


def _read_vocabulary(path: Path) -> list[bytes]:
    if not path.is_file():
        raise CorpusError(f"vocabulary {path} does not exist; it must hold one word a line")
    words = path.read_bytes().removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n")
    lines: dict[bytes, int] = {}
    for number, word in enumerate(words, start=1):
        shown = word.decode(errors="backslashreplace")
        if word.split() != [word] or word.decode(errors="ignore") != shown:
            raise CorpusError(f"{path}:{number} must be one word of UTF-8 text, got {shown!r}")
        if lines.setdefault(word, number) != number:
            raise CorpusError(
                f"{path}:{number}: the word {shown!r} is on line {lines[word]} already; remove one of them"
            )
    missing = [mark for mark in MARKS if mark.encode() not in lines]
    if missing:
        raise CorpusError(f"{path} lacks {', '.join(missing)}; a vocabulary must hold {', '.join(MARKS)}")
    return words


SourceDigest = Callable[[Shard], str]


def _count_vocabulary(config: Prepare, shards: list[Shard], source_digest: SourceDigest) -> list[bytes]:
    """Returns the marks, then the words of the training shards by decreasing count; words with equal counts are in byte
    order."""
    pending = [shard for shard in shards if not _is_counted(shard, source_digest)]
    _each(_count, pending, config.workers, f"count {len(pending)} of {len(shards)} shards", lambda n_words: n_words)
    counts: dict[bytes, int] = defaultdict(int)
    for shard in bar(shards, desc="add up counts", unit="shards"):
        fields = shard.counts.read_bytes().partition(b"\n")[2].split()
        for word, count in zip(fields[::2], map(int, fields[1::2])):
            counts[word] += count
    marks = [mark.encode() for mark in MARKS]
    for mark in marks:
        counts.pop(mark, None)
    least = 1 if config.top else config.min_count or MIN_COUNT
    words = sorted((word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word))
    if not words:
        most = max(counts.values(), default=0)
        raise CorpusError(
            f"no word occurs {least} times in the training shards, the most frequent one occurs {most} times; lower "
            "min_count"
        )
    words = [*marks, *words]
    if config.top and config.top > len(words):
        raise CorpusError(
            f"top must be at most {len(words)}, the number of words in the training shards and marks, got {config.top}"
        )
    return words[: config.top]


def _is_counted(shard: Shard, source_digest: SourceDigest) -> bool:
    """True if an earlier run has counted this same source, and the counts are undamaged."""
    if not shard.counts.is_file():
        return False
    first, _, lines = shard.counts.read_bytes().partition(b"\n")
    return first == _counts_header(shard, lines, source_digest(shard))


def _counts_header(shard: Shard, lines: bytes, source_sha256: str) -> bytes:
    return f"{shard.path.name}\t{shard.n_bytes}\t{source_sha256}\t{hashlib.sha256(lines).hexdigest()}".encode()


def _count(shard: Shard) -> int:
    """Writes the shard's word counts, after a line with its name, size and digests. Returns the number of words."""
    counts: Counter[bytes] = Counter()
    source_sha256 = hashlib.sha256()
    for block in shard.blocks(source_sha256):
        counts.update(block.split())
    lines = b"".join(b"%s\t%d\n" % item for item in counts.items())
    with files.writing(shard.counts) as file:
        file.write(_counts_header(shard, lines, source_sha256.hexdigest()) + b"\n" + lines)
    return counts.total()


def _finished(shard: Shard, digest: str, source_digest: SourceDigest) -> dict[str, Any] | None:
    """Returns the shard's JSON from an earlier run, or None unless its token ids are undamaged and those of this source
    and vocabulary."""
    try:
        entry = files.read_sealed(shard.tokens.with_suffix(".json"))
        if entry.keys() != ENTRY or (entry["vocabulary"], 4 * entry["tokens"]) != (digest, shard.tokens.stat().st_size):
            return None
        fits = files.sha256(shard.tokens) == entry["sha256"] and source_digest(shard) == entry["source"]["sha256"]
    except (OSError, KeyError, TypeError):
        return None
    return entry if fits else None


@functools.lru_cache(maxsize=1)
def _index(path: Path, digest: str) -> Index:
    """Builds the index once in a process. The digest distinguishes vocabularies that are written to the same path."""
    return Index(path.read_bytes().removesuffix(b"\n").split(b"\n"))


def _tokenise(shard: Shard, digest: str) -> dict[str, Any]:
    """Writes the shard's token ids and, beside them, the JSON file whose content it returns."""
    out = shard.tokens.parents[1]
    index = _index(out / "vocabulary.txt", digest)
    lines = 0
    totals = dict.fromkeys(("tokens", "sentences", "unknown"), 0)
    source_sha256, sha256 = hashlib.sha256(), hashlib.sha256()
    shard.tokens.with_suffix(".json").unlink(missing_ok=True)  # it describes the old tokens
    with files.writing(shard.tokens) as file:
        for block in shard.blocks(source_sha256):
            ids = index.encode(block)
            file.write(ids.data)
            sha256.update(ids.data)
            lines += block.count(b"\n")
            totals["tokens"] += len(ids)
            totals["sentences"] += int(np.count_nonzero(ids == index.eos))
            totals["unknown"] += int(np.count_nonzero(ids == index.unknown))
        if not totals["sentences"]:
            raise CorpusError(f"{shard.path} has no sentence in its {lines} lines, all blank; download it again")
    source = {"name": shard.path.name, "bytes": shard.n_bytes, "sha256": source_sha256.hexdigest()}
    entry = {
        "file": shard.tokens.relative_to(out).as_posix(),
        **totals,
        "empty": lines - totals["sentences"],
        "sha256": sha256.hexdigest(),
    }
    entry |= {"vocabulary": digest, "source": source}
    files.write_sealed(shard.tokens.with_suffix(".json"), entry)
    return entry


def _each(
    function: Callable[[Shard], Any],
    shards: list[Shard],
    workers: int | None,
    description: str,
    n_words: Callable[[Any], int],
) -> dict[Shard, Any]:
    """Returns the function's result for every shard, computed in worker processes, or in this one if one is enough.
    Prints the speed."""
    if not shards:
        return {}
    start, results, n_bytes = time.monotonic(), {}, sum(shard.n_bytes for shard in shards)
    workers = min(len(shards), workers or usable_processors())
    with bar(desc=description, total=n_bytes, unit="bytes") as progress:
        for shard, result in (
            in_processes(function, shards, workers) if workers > 1 else ((shard, function(shard)) for shard in shards)
        ):
            results[shard] = result
            progress.update(shard.n_bytes)
    seconds, words = time.monotonic() - start, sum(map(n_words, results.values()))
    show(
        f"{description}: {words:,} words in {seconds:.1f} s, {words / seconds / 1e6:.2f} M words/s, "
        f"{n_bytes / seconds / 1e6:.1f} MB/s"
    )
    return results


Flags = Prepare | Download


def work(arguments: list[str]) -> None:
    config: Prepare | Download = command.parse(Flags, "data.lm1b", __doc__, arguments)
    if isinstance(config, Download):
        download(config)
        return
    manifest = prepare(config)
    show(f"{config.out}: a vocabulary of {manifest['vocabulary']['words']:,} words")
    for split in FOLDERS:
        tokens, sentences, unknown, empty = (
            sum(entry[key] for entry in manifest[split]) for key in ("tokens", "sentences", "unknown", "empty")
        )
        share = unknown / (tokens - 2 * sentences)
        show(
            f"{split}: {tokens:,} tokens in {sentences:,} sentences, {share:.2%} of the words are {UNKNOWN}, "
            f"{empty:,} blank lines skipped"
        )


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
