"""Durable files, which are complete or absent after a kill at any moment, and folders with one writer at a time.

A file is written under a temporary name, flushed to disk and renamed; then its folder is flushed to disk, too.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import UserError
from .text import show

try:
    import fcntl
except ImportError:  # not Unix: no locks
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
"""Suffix of a file or folder that is being written."""

LOCK = ".lock"
"""Name of the lock file in a folder."""


class FileError(UserError, OSError):
    """A file cannot be read or written. The message names its path and the reason."""


class FolderInUse(UserError):
    """Another process writes to the folder."""


class FolderOccupied(UserError):
    """The folder has content that its writer does not recognise."""


def refuse_foreign(folder: Path, belongs: Callable[[Path], bool]) -> None:
    """Raises FolderOccupied if `folder` is not a folder, or has content of which nothing satisfies `belongs`."""
    if not folder.exists():
        return
    if folder.is_dir():
        paths = [path for path in folder.iterdir() if not is_leftover(path)]
        if not paths or any(belongs(path) for path in paths):
            return
    raise FolderOccupied(f"out: {folder} is not empty and holds something else; name another --out")


def real(path: Path) -> Path:
    """Resolves symbolic links. Unlike Path.resolve before Python 3.13, it does not raise RuntimeError for links in a
    circle."""
    return Path(os.path.realpath(path))


# -------------------------------------------------------------------------------------------------------------- reading


def check_regular(path: Path) -> None:
    """Raises FileError for a pipe or a device, or a symbolic link to one: reading it might never end."""
    with explained(path):
        mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # for a folder, reading raises
        raise FileError(f"{path} is not a regular file; restore it or move it away")


def read_text(path: Path) -> str:
    """Reads a UTF-8 text. Raises FileError."""
    check_regular(path)
    with explained(path):
        content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path} is not UTF-8 text (line {line}: {error.reason})") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON file, whose value must be of type `kind`. Raises FileError."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is not JSON ({error}); restore it or move it away") from None
    if not isinstance(value, kind):
        raise FileError(f"{path} is damaged: it must hold a {kind.__name__}, got a {type(value).__name__}; restore it")
    return value


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote, without the digest. Accepts files of versions before 0.2, which have no digest.
    Raises FileError if the content does not match the digest."""
    value = read_json(path)
    seal = value.pop("digest", None)
    if seal not in (None, _json_digest(value)):
        raise FileError(f"{path} is damaged: its content does not match its digest; restore it or move it away")
    return value


DIGEST_BLOCK = 1 << 24
"""Bytes to read at once for a file's digest."""


def sha256(path: Path, progress: Callable[[int], Any] = lambda n_bytes: None) -> str:
    """SHA-256 of a file, in hexadecimal digits. Calls `progress` with the number of bytes after each read. Raises
    FileError."""
    check_regular(path)
    digest = hashlib.sha256()
    with explained(path), path.open("rb") as file:
        while block := file.read(DIGEST_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError within the block into a FileError that names `path` and tells what to do."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the disk that holds {path} is full; free space and run the same command to continue"
            raise FileError(what) from error
        raise FileError(f"{error.filename or path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path, last: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` if the block ends without an exception. Otherwise an old file
    at `path` stays unchanged. Calls `last` when the new file is on disk, just before renaming it. Raises FileError for
    an OSError."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with explained(path):
            yield partial
            with partial.open("rb+") as file:
                sync(file)
            last()
            rename(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path, last: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Yields a binary file that replaces `path` at the end of the block, see `replacing`. Raises FileError."""
    with replacing(path, last) as partial, partial.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text to `path`, replacing an old file. Raises FileError."""
    with writing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a value to `path` as indented JSON, replacing an old file; see `to_json`. Raises FileError."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Writes a value to `path` as indented JSON with a digest, which `read_sealed` verifies. Raises FileError."""
    write_json(path, value | {"digest": _json_digest(value)})


def to_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON. NaN and infinity become null, since JSON has neither. `options` are those of
    json.dumps."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), allow_nan=False, **options)


def _json_digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(value, sort_keys=True).encode()).hexdigest()


def append_json(path: Path, record: Any) -> None:
    """Appends a record to the JSON list in `path`, which is created if necessary. Concurrent processes wait for each
    other, so that no record is lost. Raises FileError."""
    with explained(path), path.with_name(f".{path.name}{LOCK}").open("ab") as lock:
        _lock(lock, path, wait=True)
        records = read_json(path, list) if path.is_file() else []
        write_json(path, [*records, record])


def make_folder(path: Path) -> None:
    """Creates a folder and its missing parents, and flushes their names to disk. Raises FileError."""
    with explained(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)


def sync(file: IO[bytes]) -> None:
    """Flushes an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Renames a complete file or folder, and flushes the new name to disk."""
    os.replace(old, new)
    sync_folder(new.parent)


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not support this
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Returns the package's folder in the user's cache, which may be deleted at any time, or a temporary folder if
    there is no writable home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_mos"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (OSError, RuntimeError):  # RuntimeError: the user has no home at all, as in some containers
        return Path(tempfile.gettempdir()) / f"fused_mos-{os.getuid()}"


# -------------------------------------------------------------------------------------------------------------- locking


class FolderLock:
    """An exclusive lock on a folder, held until `release`, the end of the `with` block, or the end of the process, even
    if it is killed.

    The lock is reentrant: the folder is free once the process has released it as often as locked. Creates the folder if
    necessary.

    Args:
        wait: waits for another process to release the folder, instead of raising.

    Raises FolderInUse if another process has the lock, FileError if the folder cannot be created.
    """

    _held: dict[Path, tuple[BinaryIO, int]] = {}  # by folder: the locked file, and the number of locks on it

    def __init__(self, folder: Path, wait: bool = False):
        self._folder: Path | None = None
        make_folder(folder)
        with explained(folder):
            path = folder.resolve()
            file, count = self._held.get(path) or (_locked_file(folder, wait), 0)
        self._held[path], self._folder = (file, count + 1), path

    def release(self) -> None:
        """Releases the lock; a second call does nothing."""
        if self._folder is None:
            return
        file, count = self._held.pop(self._folder)
        if count > 1:
            self._held[self._folder] = file, count - 1
        else:
            file.close()
        self._folder = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.release()


def _locked_file(folder: Path, wait: bool) -> BinaryIO:
    """Locks the folder's lock file, and writes the process, its machine and its command into it."""
    file = (folder / LOCK).open("ab+")
    try:
        _lock(file, folder, wait)
    except BlockingIOError:
        with file:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
        raise FolderInUse(f"{folder} is being written by {holder}; wait for it, or stop it") from None
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    command = " ".join(["python", *sys.orig_argv[1:]])[:200]
    file.write(f"process {os.getpid()} on {socket.gethostname()} ({command})\n".encode())
    file.flush()
    return file


def _lock(file: BinaryIO, path: Path, wait: bool) -> None:
    """Locks the lock file of `path`. Without `wait`, raises BlockingIOError if another process has the lock."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:  # on file systems without locks, warn and continue
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        show(f"warning: {path} cannot be locked ({error.strerror}); let no other process write to it", file=sys.stderr)


def is_leftover(path: Path) -> bool:
    """True if `path` is a lock or an unfinished file, such as a killed process may leave behind."""
    # .tmp: names that safetensors wrote in our versions before 0.2
    return path.name == LOCK or PARTIAL in path.suffixes or re.fullmatch(r"\.tmp\w{6}", path.name) is not None
