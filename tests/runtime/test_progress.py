"""Progress in a pipe and in a terminal of 80 columns."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from fused_mos.runtime import progress

SHOWS = """
from fused_mos.runtime.progress import bar, say
with bar(desc="epoch 12/500", unit="words", total=929_000) as shown:
    shown.set_postfix_str("ppl 1234.56", refresh=False)
    shown.update(123_456)
    say("epoch 11: valid loss 4.5")
    shown.refresh()
"""


def test_a_pipe_gets_plain_lines(monkeypatch, capsys):
    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    with progress.bar(desc="train", unit="words", total=5_000_000) as shown:
        shown.set_postfix_str("ppl 12.3", refresh=False)
        for _ in range(5):
            shown.update(1_000_000)
            progress.say("a line")
    lines = error.getvalue().splitlines(keepends=True)
    assert "\r" not in error.getvalue() and all(line.endswith("\n") and line.strip() for line in lines)
    assert len(lines) == 1, "the last state, for half a minute has not passed"
    assert re.fullmatch(
        r"train: 100% of 5\.00M words, \d\d:\d\d elapsed, 00:00 left, [\d.]+[kMG]? words/s, ppl 12\.3\n", lines[-1]
    )
    assert capsys.readouterr().out == "a line\n" * 5


def test_a_line_every_half_minute(monkeypatch):
    error, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", error)
    with progress.bar(desc="train", unit="words", total=100) as shown:
        shown._time = lambda: now[0]
        shown.start_t = shown.last_print_t = 0.0
        for second in range(1, 100):
            now[0] = float(second)
            shown.update(1)
    assert len(error.getvalue().splitlines()) == 3 + 1, "after 30, 60 and 90 seconds, and at the end"


def test_a_terminal_of_80_columns_shows_all_in_one_line():
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", SHOWS], stdout=terminal, stderr=terminal, check=True)
    os.close(terminal)
    text = b""
    try:
        while piece := os.read(controller, 4096):
            text += piece
    except OSError:  # the end, where a terminal is closed
        pass
    states = [state for state in re.split(r"[\r\n]+", text.decode()) if "12%" in state or " 13%" in state]
    assert states and all(len(state) <= 80 for state in states)
    assert re.match(r"epoch 12/500  13%\|[^|]+\| 123k/929k words 00:0\d<00:\d\d .*words/s, ppl 1234\.56", states[-1])
    assert "epoch 11: valid loss 4.5" in text.decode()


def test_few_things_are_counted_as_they_are(monkeypatch):
    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    with progress.bar([1, 2, 3], desc="evaluate", unit="shards") as shown:
        for _ in shown:
            pass
    assert error.getvalue().startswith("evaluate: 100% of 3 shards, ")
