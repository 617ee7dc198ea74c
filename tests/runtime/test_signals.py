"""Signals are noted until the work has saved itself."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from fused_mos.runtime import signals


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before and not signals.noted()


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_waits_for_the_tick_that_saves(number):
    saved, clock = [], signals.CheckpointClock(minutes=5)
    with pytest.raises(signals.Stopped) as stop, signals.noting():
        clock.tick(lambda: saved.append("too early"))
        os.kill(os.getpid(), number)
        assert signals.noted() == number
        clock.tick(lambda: saved.append("checkpoint"))
    assert saved == ["checkpoint"] and stop.value.signum == number


def test_a_second_signal_acts_at_once():
    with pytest.raises(signals.Stopped), signals.raising(), signals.noting():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the second one was noted, too")


def test_a_signal_that_nobody_looked_at_is_not_lost():
    with pytest.raises(signals.Stopped), signals.noting():
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_ends_what_is_open():
    closed = []
    with pytest.raises(signals.Stopped), signals.raising():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            closed.append(True)
    assert closed


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_what_the_caller_ignores_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals.raising(), signals.noting():
            signal.raise_signal(number)
            assert not signals.noted()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_thread_takes_no_signals():
    def work():
        with signals.noting(), signals.raising():
            done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_the_clock():
    saved = []
    clock = signals.CheckpointClock(minutes=5)
    clock.tick(lambda: saved.append(1))
    assert not saved
    signals.CheckpointClock(minutes=0).tick(lambda: saved.append(2))
    with pytest.raises(signals.TimeLimitReached):
        signals.CheckpointClock(minutes=5, time_limit=1e-9).tick(lambda: saved.append(3))
    assert saved == [2, 3]


def test_these_tests_pass_in_a_background_job_of_a_script(request):
    """Such a job ignores SIGINT from its start, and so do its children."""
    arguments = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "a_signal_waits", __file__]
    ignoring = ["bash", "-c", "trap '' INT TERM; exec \"$@\"", "bash"]
    result = subprocess.run([*ignoring, *arguments], capture_output=True, text=True, cwd=request.config.rootpath)
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout + result.stderr
