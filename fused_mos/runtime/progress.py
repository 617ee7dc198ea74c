"""Progress bars: in a terminal one line of 80 columns and more, in a pipe or a file a plain line every half minute."""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from .text import printable, show

SECONDS_BETWEEN_LINES = 30.0
"""Where nobody watches, a line every half minute is enough."""

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} {elapsed}<{remaining} {rate_noinv_fmt}{postfix}"
_LINE = "{desc}: {percentage:3.0f}% of {total_fmt}{unit}, {elapsed} passed, {remaining} left, {rate_noinv_fmt}{postfix}"


class _Lines:
    """Takes what tqdm would draw over itself, and writes each state as a line of its own."""

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
    """A progress bar on stderr. `unit` is what is counted, in the plural; `options` are tqdm's, such as `initial`,
    `leave` and `disable`. Of large totals 1,234,567 words are shown as 1.23M."""
    watched = sys.stderr.isatty()
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    shown: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.5, "bar_format": _BAR}
    if not watched:
        shown = {"file": _Lines(sys.stderr), "bar_format": _LINE, "miniters": 1, "mininterval": SECONDS_BETWEEN_LINES}
        shown["delay"] = 1e-9  # no line before there is something to tell
    shown["unit_scale"] = total is None or total >= 1000
    if total is None:
        shown["bar_format"] = "{desc}: {n_fmt}{unit}, {elapsed} passed, {rate_noinv_fmt}{postfix}"
    return tqdm(iterable, desc=printable(desc), unit=f" {unit}", total=total, **{**shown, **options})


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line above any bar, by default to stdout."""
    file = file or sys.stdout
    with tqdm.external_write_mode(file):
        show(text, file=file, flush=True)
