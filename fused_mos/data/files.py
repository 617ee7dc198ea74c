"""Files of a prepared corpus: complete or absent, with progress, and a full disk in words."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from .corpus import CorpusError

BLOCK_BYTES = 2 << 20
"""Read at once, so that memory does not grow with a shard."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its name once all of it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with explained(path), partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says what to do where the disk of `path` is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CorpusError(
            f"the disk that holds {path} is full; free space and run the same command, which continues"
        ) from None


def write_json(path: Path, value: Any) -> None:
    with writing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    # where no person watches, a line every half minute is enough
    return tqdm(iterable, mininterval=0.5 if sys.stderr.isatty() else 30.0, dynamic_ncols=True, **options)
