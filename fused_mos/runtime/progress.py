"""Progress bars: a bar in a terminal, a plain line every half minute in a pipe or a file."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from .text import printable, show

SECONDS_BETWEEN_LINES = 30.0
"""Interval of progress lines in a pipe or a file."""

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} {elapsed}<{remaining} {rate_noinv_fmt}{postfix}"
_TIMES = "{elapsed} elapsed, {remaining} left"
_LINE = "{desc}: {percentage:3.0f}% of {total_fmt}{unit}, " + _TIMES + ", {rate_noinv_fmt}{postfix}"


class _Lines:
    """A file for tqdm that writes each state of the bar as a line of its own."""

    def __init__(self, file: TextIO):
        self._file = file
        self.encoding = file.encoding

    def write(self, text: str) -> None:
        if line := text.strip("\r\n ").replace(",  ", ", "):
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()


def bar(
    iterable: Iterable[Any] | None = None, *, desc: str, unit: str, total: float | None = None, **options: Any
) -> tqdm:
    """Returns a progress bar on stderr.

    Args:
        unit: what is counted, in the plural. Totals from 1,000 on are shortened: 1,234,567 to 1.23M.
        options: further arguments of tqdm, such as `initial`, `leave` and `disable`.
    """
    watched = sys.stderr.isatty()
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    shown: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.5, "bar_format": _BAR}
    if not watched:
        shown = {"file": _Lines(sys.stderr), "bar_format": _LINE, "miniters": 1, "mininterval": SECONDS_BETWEEN_LINES}
        shown["delay"] = 1e-9  # no line before the first progress
    shown["unit_scale"] = total is None or total >= 1000
    if total is None:
        shown["bar_format"] = "{desc}: {n_fmt}{unit}, {elapsed} elapsed, {rate_noinv_fmt}{postfix}"
    return tqdm(iterable, desc=printable(desc), unit=f" {unit}", total=total, **{**shown, **options})


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line above any bar, by default to stdout."""
    file = file or sys.stdout
    with tqdm.external_write_mode(file):
        show(text, file=file, flush=True)
