"""The logs of a run: metrics.jsonl, TensorBoard events and a learning curve."""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime import files, plots
from ..runtime.text import show
from .settings import NUMBER

BLOCK = 1 << 16
"""Bytes to read at once when searching for the end of a line."""


def perplexity(loss: float) -> float:
    """exp of a mean NLL in nats, or infinity if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def tag(kind: str, name: str) -> str:
    """Where TensorBoard shows a number: it sorts groups by name, so loss and perplexity come before the group "run"."""
    return {"loss": f"loss/{kind}", "ppl": f"perplexity/{kind}"}.get(name, f"run/{kind}/{name}")


class MetricsLog:
    """Appends records to metrics.jsonl, and the same numbers to TensorBoard.

    Args:
        folder: of the run.
        offset: length of metrics.jsonl at the checkpoint from which the run continues. Anything after it is cut off, so
            that no step appears twice. A shorter file keeps its complete lines, with a warning about the lost ones.
        step: of that checkpoint.
    """

    def __init__(self, folder: Path, offset: int = 0, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second that --help can spare

        self._path = folder / "metrics.jsonl"
        with files.explained(self._path):
            self._file = self._path.open("ab+")
            kept = _end_of_lines(self._file, min(offset, self._file.seek(0, os.SEEK_END)))
            self._file.truncate(kept)
            files.sync_folder(folder)
        if kept < offset:
            show(f"warning: {self._path} has lost {offset - kept:,} bytes of this run", file=sys.stderr)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if offset else None)

    def write(self, kind: str, step: int, **values: Any) -> None:
        with files.explained(self._path):
            self._file.write(files.to_json({"kind": kind, "step": step, **values}).encode() + b"\n")
            self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(tag(kind, name), value, step)

    def sync(self) -> int:
        """Flushes everything to disk and returns the length of metrics.jsonl."""
        with files.explained(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._events.flush()
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _end_of_lines(file: BinaryIO, end: int) -> int:
    """Returns the offset after the last complete line within the first `end` bytes."""
    while end:
        start = max(0, end - BLOCK)
        file.seek(start)
        if newline := file.read(end - start).rfind(b"\n") + 1:
            return start + newline
        end = start
    return 0


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl, skipping damaged lines. Raises FileError."""
    path, records = folder / "metrics.jsonl", []
    files.check_regular(path)
    with files.explained(path), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(RecursionError, ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and record.keys() >= {"kind", "step"}]


def _points(metrics: list[dict[str, Any]], kind: str, x: str) -> list[tuple[float, float]]:
    """Returns (x, perplexity) of all records of a kind that have both as finite numbers."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and NUMBER.holds(value)

    return [(m[x], m["ppl"]) for m in metrics if m["kind"] == kind and is_number(m.get(x)) and is_number(m.get("ppl"))]


def plot_learning_curves(folders: dict[str, Path], path: Path) -> None:
    """Plots training and validation perplexity against epochs to a PNG, one colour per run; runs are named by their
    heads. Raises FileError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, folder) in enumerate(folders.items()):
        metrics, colour = read_metrics(folder), plots.head_colour(label, i)
        train, valid = _points(metrics, "train", "epoch_fraction"), _points(metrics, "valid", "epoch")
        if train:
            axes.plot(*zip(*train), color=colour, alpha=0.35, linewidth=1, label=f"{label}, training (with dropout)")
        if valid:
            axes.plot(*zip(*valid), color=colour, marker="o", markersize=4, label=f"{label}, validation")
        averaging = _points([m for m in metrics if m.get("averaging") is True], "valid", "epoch")
        if averaging and averaging[0][0] > 1:
            start = averaging[0][0] - 1
            axes.axvline(start, color=colour, linestyle=":", linewidth=1, label=f"{label}, averaging starts")
    axes.set_yscale("log")
    plots.log_ticks(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    plots.legend_above(figure, axes, columns=max(2, len(folders)))
    plots.save(figure, path)
