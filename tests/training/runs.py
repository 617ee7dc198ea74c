"""What tests of runs share."""

import os
import random
import signal
import subprocess
import sys
import time

from fused_mos.data import lm1b
from fused_mos.training.metrics import read_metrics


def losses(folder):
    return [(m["kind"], m["step"], m["loss"]) for m in read_metrics(folder)]


def killed_at(flags, out, lines, command="train"):
    """Starts the run as a user would and kills it, as an out-of-memory killer would, once metrics.jsonl has `lines`
    lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"fused_mos.{command}", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def write_benchmark(folder, seed=0):
    """Three training shards and two held-out ones in the benchmark's layout, of sentences that can be learnt."""
    draw = random.Random(seed)
    for split, names in (("train", lm1b.SHARDS["train"][:3]), ("heldout", lm1b.SHARDS["heldout"][:2])):
        (folder / lm1b.FOLDERS[split]).mkdir(parents=True)
        for i, name in enumerate(names):
            starts = [draw.randrange(40) for _ in range(150 + 20 * i)]
            lines = (" ".join(f"w{(s + j) % 40}" for j in range(draw.randrange(1, 12))) + "\n" for s in starts)
            (folder / lm1b.FOLDERS[split] / name).write_text("".join(lines))


def refused(command, arguments, capsys, *parts):
    """The command ends with one line, which says all of `parts`."""
    capsys.readouterr()
    assert command.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    for part in parts:
        assert str(part) in lines[0], lines[0]
