"""The frame of every command: it parses flags, prints errors in one line, and ends with the right status."""

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
"""What usage lines call the command, where that is not `python -m` and its module."""

CONTINUES = "run the same command to continue"

BROKEN_PIPE = 128 + 13  # as of a program that SIGPIPE ends


def parse(
    config_type: type[Config] | UnionType, command: str, description: str, arguments: list[str], **options: Any
) -> Config:
    """Flags as a dataclass, by tyro, those of a nested dataclass without its name in front. Exits with status 0 after
    --help, with 2 for a flag that does not exist.

    Args:
        config_type: a dataclass, or a union of them for subcommands; its fields' docstrings are the help.
        options: for `tyro.cli`, such as `default`.
    """
    import tyro  # here: it takes a while, and not every use of a command's module parses

    return tyro.cli(
        cast(type[Config], config_type),  # whose stubs know no union
        prog=program or f"python -m fused_mos.{command}",
        description=description,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        **options,
    )


def run(work: Callable[[list[str]], int | None], arguments: list[str] | None = None, interrupted: str = "") -> int:
    """Runs a command and returns its exit status.

    | what happens | what the user sees | status |
    |---|---|---|
    | `work` returns | | what it returns, or 0 |
    | UserError, OSError, no memory left | `error: …` on stderr | 2 |
    | TimeLimitReached | on stdout that the same command continues | 0 |
    | SIGINT, SIGTERM | `stopped; ` and `interrupted` on stderr | 130, 143 |
    | nobody reads stdout any longer | nothing | 141 |

    Args:
        work: takes the command line's arguments.
        arguments: those of this process by default.
        interrupted: how to go on after a signal; "" for a command that leaves nothing to go on with.
    """
    _repair_streams()
    rank = os.environ.get("RANK", "0")
    try:
        with signals.raising():
            status = work(sys.argv[1:] if arguments is None else arguments)
            sys.stdout.flush()
            return status or 0
    except BrokenPipeError:
        # what is still buffered goes nowhere, so that the interpreter's last flush finds nothing to complain of
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
    """True for what Python or torch, which this module does not import, raise where they get no memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed"))


def _in_words(error: Exception) -> str:
    if isinstance(error, UserError) or not isinstance(error, OSError):
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


def _repair_streams() -> None:
    """Makes prints work whatever the caller did: closed streams go nowhere, characters that an encoding lacks become
    question marks."""
    # files that are opened later must not get the numbers of closed streams, or what others write there would be in
    # them
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
    """The values of some flags, without their dashes, before all flags are known; None for one that is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name)
    return vars(parser.parse_known_args(arguments)[0])


def asks_for_help(arguments: list[str]) -> bool:
    return any(argument in ("-h", "--help") or argument.startswith("--tyro-") for argument in arguments)
