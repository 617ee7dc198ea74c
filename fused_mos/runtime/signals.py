"""Saving and stopping of long work: clocks, time limits, SIGINT and SIGTERM."""

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

_noted: list[int] = []  # signals that arrived while work notes them


class TimeLimitReached(Exception):
    """Long work has saved its state and stopped; it can be continued."""


class Stopped(Exception):
    """A signal has ended the work; what a command saves, it has saved.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM are noted, for the work to save its state and stop (`check`, or a
    `CheckpointClock`). A second one of the same kind acts at once. What the caller has ignored stays ignored, as SIGINT
    in a script's background jobs.

    Raises Stopped at the end of the block if a signal was noted and nobody has looked. Threads other than the main one
    cannot take signals: there it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}  # what `signal.signal` returns

    def note(signum: int, frame: FrameType | None) -> None:
        _noted.append(signum)
        signal.signal(signum, before[signum])
        with contextlib.suppress(OSError):  # no print: the signal may have come in the middle of one
            os.write(2, b"\nstopping as soon as everything is saved; once more stops at once\n")

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
    """The number of a signal that was noted, or 0."""
    return _noted[0] if _noted else 0


def check() -> None:
    """Raises Stopped if a signal was noted."""
    if _noted:
        raise Stopped(_noted[0])


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Within the block SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt: what is open is closed."""
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
    """Says when long work saves its state, and when it stops.

    Args:
        minutes: between checkpoints; 0 saves at every tick.
        time_limit: seconds from now on after which to stop; 0: never.
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
        """Saves if it is time. Raises Stopped or TimeLimitReached, after saving."""
        stop, signum = self.over, noted()
        if stop or self.due or signum:
            save()
            self.saved()
        if signum:
            raise Stopped(signum)
        if stop:
            raise TimeLimitReached
