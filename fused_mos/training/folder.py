"""The folder of a run: its lock, and the check that it holds nothing else."""

from collections.abc import Callable
from pathlib import Path

from ..runtime import files
from .errors import ConfigError


def claim(folder: Path, belongs: Callable[[Path], bool]) -> files.FolderLock:
    """Locks the folder of a run for this process, and creates it if necessary.

    Args:
        belongs: returns True for a path that a run has written, even one killed in its first moments.

    Raises ConfigError if the folder has content, but nothing of a run, and leaves it untouched; FolderInUse if another
    process writes to it; FileError if it cannot be created.
    """
    check_free(folder, belongs)
    lock = files.FolderLock(folder)
    check_free(folder, belongs)  # again, since another process may have written to it before the lock
    return lock


def check_name(argument: str, folder: Path) -> None:
    """Raises ConfigError, naming the argument, if the folder's name is not UTF-8: TensorBoard cannot write to such a
    folder, and safetensors cannot read from it."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{argument} must be a folder with a name in UTF-8, got {str(folder)!r}") from None


def check_free(folder: Path, belongs: Callable[[Path], bool]) -> None:
    """Raises ConfigError if the folder has content, but nothing of a run, or a name that is not UTF-8."""
    check_name("out", folder)
    try:
        files.refuse_foreign(folder, belongs)
    except files.FolderOccupied:
        message = f"out: {folder} is not empty and holds no checkpoint of such a run; name another --out"
        raise ConfigError(message) from None
