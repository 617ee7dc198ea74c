"""Times the gradient filter on a trained model, on a GPU."""

import json
from pathlib import Path

import torch

from experiments.gradient_filter import measure_run

from .gpu_device import DEVICE, DRY_RUN
from .gpu_timing import products


def measure(name: str, run: Path, data: Path | None) -> dict:
    """The row of the filter on a run's model: exact and filtered steps, relative to the fastest product."""
    data = data or Path(json.loads((run / "config.json").read_text())["data"])
    result = measure_run(run, data, 2 if DRY_RUN else 20, DEVICE, {"bfloat16": torch.bfloat16})
    fastest = min(products(result["shape"], torch.bfloat16).values())
    for row in result["rows"].values():
        for what in ("exact", "filtered"):
            row[f"over mm, {what}"] = round(1e3 * row[f"seconds, {what}"] / fastest, 3)
    return result | {"mm ms": fastest}
