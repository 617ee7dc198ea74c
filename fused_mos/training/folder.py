"""The folder of a run: who may write to it, and what is in it already."""

from collections.abc import Callable
from pathlib import Path

from ..runtime import files
from .errors import ConfigError


def claim(folder: Path, belongs: Callable[[Path], bool]) -> files.FolderLock:
    """Locks the folder of a run, which is created if need be, for this process to write to.

    Args:
        belongs: whether a path in the folder is that of a run that can go on, or of one killed in its first moments.

    Raises ConfigError, without touching the folder, if it holds something else alone; FolderInUse while another process
    writes to it; FileError where it cannot be created.
    """
    check_free(folder, belongs)
    lock = files.FolderLock(folder)
    check_free(folder, belongs)  # what another process wrote meanwhile
    return lock


def check_name(argument: str, folder: Path) -> None:
    """Raises ConfigError, naming the argument, for a folder whose name is not UTF-8: TensorBoard could not write to it,
    and safetensors not read from it."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{argument} must be a folder with a name in UTF-8, got {str(folder)!r}") from None


def check_free(folder: Path, belongs: Callable[[Path], bool]) -> None:
    """Raises ConfigError if the folder holds something, but nothing of a run, or cannot be a run's."""
    check_name("out", folder)
    try:
        files.refuse_foreign(folder, belongs)
    except files.FolderOccupied:
        message = f"out: {folder} is not empty and holds no checkpoint of such a run; name another --out"
        raise ConfigError(message) from None
