"""Saving and stopping long work: checkpoint intervals, time limits, SIGINT and SIGTERM."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_noted: list[int] = []  # signals that arrived within a `noting` block


class TimeLimitReached(Exception):
    """The time limit has ended the work, after its state was saved; it can be continued."""


class Stopped(Exception):
    """A signal has ended the work, after its state was saved.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Within the block, notes SIGINT and SIGTERM so that the work can save its state and stop, by `check` or a
    `CheckpointClock`. A second signal of the same kind takes effect immediately. Signals that were ignored before stay
    ignored, such as SIGINT in background jobs of a script.

    Raises Stopped at the end of the block if a signal was noted and not acted upon. Does nothing in threads other than
    the main one, which cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}  # previous handlers

    def note(signum: int, frame: FrameType | None) -> None:
        _noted.append(signum)
        signal.signal(signum, before[signum])
        with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
            os.write(2, b"\nsaving before stopping; a second signal stops immediately\n")

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield
        check()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _noted.clear()


def noted() -> int:
    """Returns the number of the first noted signal, or 0."""
    return _noted[0] if _noted else 0


def check() -> None:
    """Raises Stopped if a signal was noted."""
    if _noted:
        raise Stopped(_noted[0])


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within the block, SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt, so that open files are closed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class CheckpointClock:
    """Decides when long work saves its state and when it stops.

    Args:
        minutes: minutes between checkpoints; 0 saves at every tick.
        time_limit: seconds from now until the work stops; 0 sets no limit.
    """

    def __init__(self, minutes: float, time_limit: float = 0.0):
        self._seconds = minutes * 60
        self._saved = time.monotonic()
        self._deadline = self._saved + time_limit if time_limit else math.inf

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._deadline

    @property
    def due(self) -> bool:
        return self.over or time.monotonic() - self._saved >= self._seconds

    def saved(self) -> None:
        self._saved = time.monotonic()

    def tick(self, save: Callable[[], None]) -> None:
        """Calls `save` if a checkpoint is due. Raises Stopped or TimeLimitReached after saving."""
        stop, signum = self.over, noted()
        if stop or self.due or signum:
            save()
            self.saved()
        if signum:
            raise Stopped(signum)
        if stop:
            raise TimeLimitReached
