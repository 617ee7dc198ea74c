"""Text for a terminal. All that a command prints goes through `show`, `progress.say` or `progress.bar`, since words,
paths and messages may come from a file that somebody else made."""

import sys
from typing import TextIO

_JOINERS = "\u200c\u200d"  # which spelling needs in Persian and in the scripts of India


def printable(text: object) -> str:
    """The text in one line, with each character that a terminal would obey instead of showing it as its escape: ESC
    and the other control characters, those that change the direction of writing, and those that nobody sees."""
    return "".join(c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in str(text))


def show(text: object = "", *, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """`print` for what a terminal may be told: lines of `printable` text, by default to stdout."""
    print("\n".join(map(printable, str(text).split("\n"))), end=end, file=file or sys.stdout, flush=flush)
