"""The frame of every command: parses flags, prints errors in one line, and returns the exit status."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from types import UnionType
from typing import Any, TypeVar, cast

from . import signals
from .errors import UserError
from .text import show

Config = TypeVar("Config")

program = ""
"""Name of the command in usage lines; by default `python -m` and its module."""

CONTINUES = "run the same command to continue"

BROKEN_PIPE = 128 + 13  # status of a program killed by SIGPIPE


def parse(
    config_type: type[Config] | UnionType, command: str, description: str, arguments: list[str], **options: Any
) -> Config:
    """Parses flags into a dataclass with tyro. Flags of nested dataclasses have no prefix. Exits with status 0 after
    --help, and with 2 for an unknown flag.

    Args:
        config_type: a dataclass, or a union of dataclasses for subcommands. The docstrings of its fields are the help.
        command: module of the command, for usage lines.
        description: help text of the command.
        arguments: the command line.
        options: further arguments of `tyro.cli`, such as `default`.
    """
    import tyro  # imported here: it is slow, and not every import of a command's module parses flags

    return tyro.cli(
        cast(type[Config], config_type),  # tyro's stubs do not accept unions
        prog=program or f"python -m fused_mos.{command}",
        description=description,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        **options,
    )


def run(work: Callable[[list[str]], int | None], arguments: list[str] | None = None, interrupted: str = "") -> int:
    """Runs a command and returns its exit status.

    | event | output | status |
    |---|---|---|
    | `work` returns | | its return value, or 0 |
    | UserError, OSError, out of memory | `error: …` on stderr | 2 |
    | TimeLimitReached | on stdout, how to continue | 0 |
    | SIGINT, SIGTERM | `stopped; ` and `interrupted` on stderr | 130, 143 |
    | stdout was closed by its reader | nothing | 141 |

    Args:
        work: the command; takes the command line's arguments.
        arguments: the command line; by default that of this process.
        interrupted: tells the user how to continue after a signal; "" if nothing was saved.
    """
    _repair_streams()
    rank = os.environ.get("RANK", "0")
    try:
        with signals.raising():
            status = work(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
            return status or 0
    except BrokenPipeError:
        # discard what is still buffered, so that the interpreter's last flush does not fail
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (UserError, OSError) as error:
        show(f"error{f' on rank {rank}' if rank != '0' else ''}: {_in_words(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        show(f"error: there is not enough memory: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr)
        return 2
    except signals.TimeLimitReached:
        if rank == "0":
            show(f"time limit reached; {CONTINUES}")
        return 0
    except (KeyboardInterrupt, signals.Stopped) as stop:
        if rank == "0":
            show(f"\nstopped{interrupted and '; ' + interrupted}", file=sys.stderr)
        return 128 + getattr(stop, "signum", 2)


def _lacks_memory(error: Exception) -> bool:
    """True for the errors of Python and torch when an allocation fails; torch's are matched by name and message, since
    this module does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed"))


def _in_words(error: Exception) -> str:
    if isinstance(error, UserError) or not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


def _repair_streams() -> None:
    """Makes printing safe: discards output to closed streams, and replaces characters that the encoding lacks by
    question marks."""
    # occupy the descriptors 0 to 2: a file opened later must not get one, or prints would end up in it
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def peek(arguments: list[str], *names: str) -> dict[str, str | None]:
    """Returns the values of a few flags before the full parse. `names` are without dashes; a flag that is not given is
    None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    return vars(parser.parse_known_args(arguments)[0])


def asks_for_help(arguments: list[str]) -> bool:
    return any(argument in ("-h", "--help") or argument.startswith("--tyro-") for argument in arguments)
