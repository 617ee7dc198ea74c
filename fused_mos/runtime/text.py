"""Safe text for a terminal. Commands print only through `show`, `progress.say` and `progress.bar`, since words, paths
and messages may come from files of others and contain control characters."""

import sys
from typing import TextIO

_JOINERS = "\u200c\u200d"  # part of correct spelling in Persian and in Indic scripts


def printable(text: object) -> str:
    """Returns the text in one line, with control, bidirectional and invisible characters as escapes, which a terminal
    would obey instead of showing."""
    return "".join(c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in str(text))


def counted(n: int, noun: str) -> str:
    """Returns the number and the noun, in the plural unless n is 1."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def show(text: object = "", *, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Prints the text with each line made `printable`, by default to stdout."""
    print("\n".join(map(printable, str(text).split("\n"))), end=end, file=file or sys.stdout, flush=flush)
