"""python -m fused_mos.data.lm1b prepare --source DIR --out DIR [--min-count 3 | --top N | --vocabulary FILE]
python -m fused_mos.data.lm1b download --out DIR

The One Billion Word benchmark (Chelba et al. 2013) as files of token ids, one for each of its shards. Every sentence is
`<S>`, its words and `</S>`, raw little-endian int32. Killed at any moment, the same command continues.
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
"""The benchmark's files: the held-out ones are what would be training shard 0."""
MIN_COUNT = 3
ENTRY = {"file", "tokens", "sentences", "unknown", "empty", "sha256", "vocabulary", "source"}
"""Keys of what is kept of a shard."""
START, END = b"\xfe", b"\xff"
"""Stand for the marks of a sentence until it is encoded: no word of a UTF-8 text can be one of these."""


@dataclasses.dataclass
class Prepare:
    """Counts words and writes the vocabulary, the shards' token ids and, at the end, manifest.json."""

    source: Path
    """The benchmark's folder, or the one that it was extracted to."""
    out: Path
    """Folder to write; what an earlier run finished there is kept."""
    min_count: int | None = None
    """The vocabulary is the words that the training shards have at least so often; 3 by default."""
    top: int | None = None
    """Or: the most frequent words, so many with the three marks."""
    vocabulary: Path | None = None
    """Or: the words of this file, one a line, the three marks among them. Line numbers are ids."""
    workers: int | None = None
    """Processes; by default one for each processor that this one may use."""
    allow_missing: bool = False
    """Go on with fewer shards than the benchmark has."""

    def check(self) -> None:
        given = [
            (name, value) for name in ("min_count", "top", "vocabulary") if (value := getattr(self, name)) is not None
        ]
        if len(given) > 1:
            (a, first), (b, second) = given[:2]
            raise CorpusError(
                f"--{a.replace('_', '-')} {first} and --{b} {second} both choose the vocabulary; give one of them"
            )
        for name, least in (("min_count", 1), ("top", len(MARKS) + 1), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CorpusError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of sentences, and what is made of it: how often it has each word, and its token ids."""

    path: Path
    n_bytes: int
    counts: Path
    tokens: Path

    def blocks(self, hashed: Any) -> Iterator[bytes]:
        """Its lines, some MiB at a time, without a byte-order mark. `hashed` of hashlib is updated with all bytes.
        Raises CorpusError where they are not UTF-8."""
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
    """Ids of words. Those that the vocabulary lacks, or that look like a mark, are `<UNK>`."""

    def __init__(self, words: list[bytes]):
        super().__init__((word, i) for i, word in enumerate(words))
        self.bos, self.eos, self.unknown = (self.pop(mark.encode()) for mark in MARKS)
        self[START], self[END] = self.bos, self.eos

    def __missing__(self, word: bytes) -> int:
        return self.unknown

    def encode(self, lines: bytes) -> np.ndarray:
        """Token ids of whole lines, without the blank ones."""
        words = (START + b" " + lines.replace(b"\n", b" " + END + b" " + START + b" ")).split()
        ids = np.fromiter(map(self.__getitem__, words), "<i4", len(words))[:-1]
        blank = np.flatnonzero((ids[:-1] == self.bos) & (ids[1:] == self.eos))
        return np.delete(ids, [blank, blank + 1]) if blank.size else ids


def prepare(config: Prepare) -> dict[str, Any]:
    """Returns what it writes to manifest.json. Raises CorpusError, FileError or FolderInUse; the same call
    continues."""
    config.check()
    shards = {split: _find_shards(config, split) for split in FOLDERS}
    words = _read_vocabulary(config.vocabulary) if config.vocabulary else None
    with files.FolderLock(config.out):
        return _prepare(config, shards, words)


def _prepare(config: Prepare, shards: dict[str, list[Shard]], words: list[bytes] | None) -> dict[str, Any]:
    """`words` are those of config.vocabulary; where it names none, they are counted."""
    for name in ("counts", *FOLDERS):
        files.make_folder(config.out / name)
    source_digest = functools.cache(lambda shard: files.sha256(shard.path))  # of shards that seem to be done
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
            f"{folder} has {have} of {len(names)} shards and lacks {listed}; complete it, or give --allow-missing to "
            "do with fewer"
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
    """The marks, then the words of the training shards by falling count; those of the same count in the order of their
    bytes."""
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
            f"no word is in the training shards {least} times, the most frequent one is there {most} times; lower "
            "min_count"
        )
    words = [*marks, *words]
    if config.top and config.top > len(words):
        raise CorpusError(
            f"top {config.top} is more than the {len(words)} that the words of the training shards and the marks "
            "make; lower it"
        )
    return words[: config.top]


def _is_counted(shard: Shard, source_digest: SourceDigest) -> bool:
    """True if an earlier run has counted this very source, and its counts are undamaged."""
    if not shard.counts.is_file():
        return False
    first, _, lines = shard.counts.read_bytes().partition(b"\n")
    return first == _counts_header(shard, lines, source_digest(shard))


def _counts_header(shard: Shard, lines: bytes, source_sha256: str) -> bytes:
    return f"{shard.path.name}\t{shard.n_bytes}\t{source_sha256}\t{hashlib.sha256(lines).hexdigest()}".encode()


def _count(shard: Shard) -> int:
    """Writes how often the shard has each word, behind its own name, size and digests, and returns how many words it
    has."""
    counts: Counter[bytes] = Counter()
    source_sha256 = hashlib.sha256()
    for block in shard.blocks(source_sha256):
        counts.update(block.split())
    lines = b"".join(b"%s\t%d\n" % item for item in counts.items())
    with files.writing(shard.counts) as file:
        file.write(_counts_header(shard, lines, source_sha256.hexdigest()) + b"\n" + lines)
    return counts.total()


def _finished(shard: Shard, digest: str, source_digest: SourceDigest) -> dict[str, Any] | None:
    """What an earlier run says of the shard, if its token ids are those of this source and vocabulary, undamaged."""
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
    """Built once in a process. The digest tells vocabularies apart that take turns at the same path."""
    return Index(path.read_bytes().removesuffix(b"\n").split(b"\n"))


def _tokenise(shard: Shard, digest: str) -> dict[str, Any]:
    """Writes the shard's token ids, and what is returned to the JSON file beside them."""
    out = shard.tokens.parents[1]
    index = _index(out / "vocabulary.txt", digest)
    lines = 0
    totals = dict.fromkeys(("tokens", "sentences", "unknown"), 0)
    source_sha256, sha256 = hashlib.sha256(), hashlib.sha256()
    shard.tokens.with_suffix(".json").unlink(missing_ok=True)  # it speaks of other tokens
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
    """The function's result for every shard, computed in processes, or in this one where one is enough. Prints the
    speed."""
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
            f"{split}: {tokens:,} tokens in {sentences:,} sentences, {share:.2%} of the words {UNKNOWN}, "
            f"{empty:,} blank lines skipped"
        )


def main(arguments: list[str] | None = None) -> int:
    return command.run(work, arguments, command.CONTINUES)


if __name__ == "__main__":
    sys.exit(main())
