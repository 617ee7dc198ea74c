"""Durable files: complete or absent after a kill at any moment, and one writer a folder.

A file is written beside its name, forced to the disk, and renamed; then its folder is forced to the disk, too.
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
except ImportError:  # not a Unix: nothing to lock with
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
"""Suffix of a file or folder that is being written."""

LOCK = ".lock"
"""Name of the file in a folder that its writer holds locked."""


class FileError(UserError, OSError):
    """A file that could not be written, with its path and the reason."""


class FolderInUse(UserError):
    """Another process writes to the folder."""


class FolderOccupied(UserError):
    """The folder holds what its writer does not know."""


def refuse_foreign(folder: Path, belongs: Callable[[Path], bool]) -> None:
    """Raises FolderOccupied if the folder holds something, but nothing that `belongs` to what is to be written, or is
    no folder."""
    if not folder.exists():
        return
    if folder.is_dir():
        paths = [path for path in folder.iterdir() if not is_leftover(path)]
        if not paths or any(belongs(path) for path in paths):
            return
    raise FolderOccupied(f"out: {folder} is not empty and holds something else; name another --out")


def real(path: Path) -> Path:
    """The path without symbolic links; as it is where they lead in a circle, for which Path.resolve raises RuntimeError
    before Python 3.13."""
    return Path(os.path.realpath(path))


# -------------------------------------------------------------------------------------------------------------- reading


def check_regular(path: Path) -> None:
    """Raises FileError for a pipe or a device, also behind a symbolic link: reading it might never end."""
    with explained(path):
        mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a folder, reading tells
        raise FileError(f"{path} is no regular file; restore it or move it away")


def read_text(path: Path) -> str:
    """A UTF-8 text. Raises FileError."""
    check_regular(path)
    with explained(path):
        content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path} is not UTF-8 text (line {line}: {error.reason})") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """The value of a JSON file, which must be of this kind. Raises FileError."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: it is not JSON ({error}); restore it or move it away") from None
    if not isinstance(value, kind):
        raise FileError(f"{path} is damaged: it must hold a {kind.__name__}, got a {type(value).__name__}; restore it")
    return value


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest; also a file that has none, as versions before 0.2 wrote it. Raises
    FileError where content and digest do not fit."""
    value = read_json(path)
    seal = value.pop("digest", None)
    if seal not in (None, _json_digest(value)):
        raise FileError(
            f"{path} is damaged: its content does not have the digest that it was written with; restore it or "
            "move it away"
        )
    return value


DIGEST_BLOCK = 1 << 24
"""Bytes read at once for a file's digest."""


def sha256(path: Path, progress: Callable[[int], Any] = lambda n_bytes: None) -> str:
    """SHA-256 of a file, in hexadecimal digits. `progress` is told the bytes read. Raises FileError."""
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
    """Turns an OSError of what is done inside into a FileError that names `path` and says what to do."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the disk that holds {path} is full; free space and run the same command, which continues"
            raise FileError(what) from error
        raise FileError(f"{error.filename or path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path, last: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yields the path of a partial file, which takes the name `path` if the block ends without an exception; otherwise
    the old file stays as it was. `last` is called once all of it is on the disk, before it takes the name. An OSError
    becomes a FileError."""
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
    """A binary file that replaces `path` once all of it is on the disk, see `replacing`. Raises FileError."""
    with replacing(path, last) as partial, partial.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by a UTF-8 text. Raises FileError."""
    with writing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by a value as indented JSON, see `to_json`. Raises FileError."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Replaces `path` by a value as indented JSON with its own digest, for `read_sealed`. Raises FileError."""
    write_json(path, value | {"digest": _json_digest(value)})


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON, which has no NaN and no infinity: they become null. `options` are those of json.dumps."""

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
    """Adds a record to the JSON list in `path`, which begins empty. Processes that append at the same time wait for
    each other, so that no record is lost. Raises FileError."""
    with explained(path), path.with_name(f".{path.name}{LOCK}").open("ab") as lock:
        _lock(lock, path, wait=True)
        records = read_json(path, list) if path.is_file() else []
        write_json(path, [*records, record])


def make_folder(path: Path) -> None:
    """Creates a folder and those above it that are missing, and forces their names to the disk. Raises FileError."""
    with explained(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)


def sync(file: IO[bytes]) -> None:
    """Forces what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Renames a complete file or folder, and forces the new name to the disk."""
    os.replace(old, new)
    sync_folder(new.parent)


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no such thing
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """The user's cache of this package, which may be deleted at any time; a temporary one where there is no home that
    can be written."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_mos"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (OSError, RuntimeError):  # RuntimeError: the user has no home at all, as in some containers
        return Path(tempfile.gettempdir()) / f"fused_mos-{os.getuid()}"


# -------------------------------------------------------------------------------------------------------------- locking


class FolderLock:
    """The right to write to a folder, until `release`, the end of the block, or the end of the process, however it
    ends.

    A process may lock a folder that it has locked already: the folder is free again once each lock is released.
    Creates the folder. With `wait`, waits for the other process instead of refusing. Raises FolderInUse where another
    process has the lock, FileError where the folder cannot be made.
    """

    _held: dict[Path, tuple[BinaryIO, int]] = {}  # by folder: the locked file, and how many locks there are

    def __init__(self, folder: Path, wait: bool = False):
        self._folder: Path | None = None
        make_folder(folder)
        with explained(folder):
            path = folder.resolve()
            file, count = self._held.get(path) or (_locked_file(folder, wait), 0)
        self._held[path], self._folder = (file, count + 1), path

    def release(self) -> None:
        """Gives the right back; a second call does nothing."""
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
    """The folder's lock file, locked, with who has it: a process, its machine and its command."""
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
    """Locks a file that stands for `path`. Raises BlockingIOError without `wait` if another process has the lock."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:  # a file system without locks must not keep anybody from working
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        show(f"warning: {path} cannot be locked ({error.strerror}); let no other process write to it", file=sys.stderr)


def is_leftover(path: Path) -> bool:
    """True if `path` is a lock or an unfinished file, which a killed process may leave in a folder that holds nothing
    else yet."""
    # safetensors wrote such a name itself in versions before 0.2
    return path.name == LOCK or PARTIAL in path.suffixes or re.fullmatch(r"\.tmp\w{6}", path.name) is not None
