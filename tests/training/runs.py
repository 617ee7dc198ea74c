"""What tests of runs share."""

import os
import signal
import subprocess
import sys
import time

from fused_mos.training.logging import read_metrics


def losses(folder):
    return [(m["kind"], m["step"], m["loss"]) for m in read_metrics(folder)]


def killed_at(flags, out, lines, command="train"):
    """Starts the run as a user would and kills it, as an out-of-memory killer would, once metrics.jsonl has `lines` lines."""
    process = subprocess.Popen([sys.executable, "-m", f"fused_mos.{command}", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
