"""Check and time the Triton kernels on a GPU; write all results as JSON, and plots of them:

    python -m benchmarks.gpu                              # everything not in the file yet, for 8 minutes
    python -m benchmarks.gpu --only ptb 'step mean'       # cases whose names contain these words
    python -m benchmarks.gpu --steps sweep                # tile sizes, as entries of configurations.py
    python -m benchmarks.gpu_compare OTHER-TREE           # this source against another, in turns

The file is written after each case. For the same GPU, versions and source, the same command continues with the missing
cases; `--again` repeats all. A case that fails, hangs or crashes becomes a row with its error. `--dry-run` rehearses
everything on a CPU, in Triton's interpreter, at tiny shapes; its times mean nothing.

Exit status: 0 if all cases are measured, 1 if some are left for another call, 2 on an error.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

from fused_mos._backends.triton_kernels.shapes import DTYPES

from .gpu_cases import SECONDS, SHAPES, STEPS
from .gpu_device import ROOT, environment, gpu_name
from .gpu_results import fail_running, read

TIME_IS_UP, UNUSABLE, LOST = 1, 2, 3
"""Exit statuses of the measuring process."""
GRACE = 60.0
"""Seconds after the time limit at which a running case is ended."""


@dataclasses.dataclass
class Config:
    steps: tuple[str, ...] = STEPS
    """head: calls of the head and its peers; training: steps of the recipes; decode: few tokens; filter: the gradient
    filter on RUN; checks: tests and compute-sanitizer; sweep, only on request: tile sizes."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Shapes of the head."""

    dtypes: tuple[str, ...] = ("bfloat16", "float32", "tf32")
    """Products of the head: bfloat16, float16, tf32, float32."""

    only: tuple[str, ...] = ()
    """Only cases whose name contains all of these words."""

    without: tuple[str, ...] = ()
    """No cases whose name contains any of these words."""

    again: bool = False
    """Repeat cases that are in the file already."""

    minutes: float = 8.0
    """Minutes after which no case starts. A running case is ended a minute later."""

    run: Path | None = None
    """Folder of a run of `python -m fused_mos.train`, for the filter on a trained model."""

    data: Path | None = None
    """Folder of RUN's corpus; by default the one it was trained on."""

    out: Path | None = None
    """JSON file, benchmarks/results/gpu-NAME.json by default. The plots are written beside it."""

    commit: str = ""
    """Commit to record, if git cannot tell it."""

    dry_run: bool = False
    """Rehearse on a CPU."""

    def check(self) -> None:
        """Raise ValueError if a flag names something that does not exist."""
        for name, given, known in (
            ("steps", self.steps, SECONDS),
            ("shapes", self.shapes, SHAPES),
            ("dtypes", self.dtypes, DTYPES),
        ):
            if unknown := [word for word in given if word not in known]:
                raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(unknown)}")
        if self.run and not self.run.is_dir():
            raise ValueError(f"run must be the folder of a run, got {self.run}")


def results_path(config: Config) -> Path:
    if config.out or config.dry_run:
        return config.out or Path(tempfile.gettempdir()) / "gpu-dry-run.json"
    return ROOT / "benchmarks" / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu_name().lower())}.json"


def watch(command: list[str], path: Path, minutes: float, environment: dict[str, str]) -> int:
    """Run the measuring process, and another one for the rest if a case ended it or took too long. Return its exit
    status, 1 if the time was up before it was done."""
    deadline = time.monotonic() + 60 * minutes
    while True:
        left = max(deadline - time.monotonic(), 0.0)
        limit = ["--minutes", f"{left / 60:.3f}"]
        # a process group of its own: tests that outlive the process would share the GPU with the next cases
        process = subprocess.Popen([*command, *limit], cwd=ROOT, env=environment, preexec_fn=os.setpgrp)
        try:
            why = _wait(process, path, deadline + GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        command = [word for word in command if word != "--again"]  # repeated cases are no longer in the file
        if why == "":
            return TIME_IS_UP  # not the fault of the case, which runs again in the next call
        if why is None and status in (0, TIME_IS_UP, UNUSABLE):
            return status
        if status != LOST or why:
            why = why or f"the process ended with status {status}"
            case = fail_running(path, why)
            if case is None:
                return UNUSABLE  # it did not get as far as a case
            print(f"{case}: {why}", flush=True)


def _wait(process: subprocess.Popen, path: Path, deadline: float) -> str | None:
    """Wait for the process. Return None if it ends by itself, or why it must be ended: its case takes too long, or ""
    if the time is up."""
    while True:
        try:
            process.wait(timeout=1.0)
            return None
        except subprocess.TimeoutExpired:
            running = read(path).get("running")
            if running and time.time() - running["since"] > running["limit"]:
                return f"took more than {running['limit']:.0f} s"
            if time.monotonic() > deadline:
                return ""


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.gpu", description=__doc__)
    try:
        config.check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    if not (config.dry_run or torch.cuda.is_available()):
        print("error: torch finds no CUDA GPU; --dry-run needs none", file=sys.stderr)
        return UNUSABLE
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the measuring process
    path = results_path(config)
    command = [sys.executable, "-m", "benchmarks.gpu_run", *sys.argv[1:], "--out", str(path)]
    return watch(command, path, config.minutes, environment(config.dry_run))


if __name__ == "__main__":
    sys.exit(main())
