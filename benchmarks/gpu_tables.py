"""Tables of the documents with the results of benchmarks.gpu, from results/gpu-NAME.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .gpu_cases import OURS, STEP
from .tables import SHAPE_NAMES, mebibytes, table

RESULTS = Path(__file__).parent / "results"
NAMES = SHAPE_NAMES | {"gpt2": "GPT-2, K = 8", "llama": "Llama, K = 1"}
OPERATIONS = {
    STEP: "step, mean",
    "step none": "step, loss per token",
    "forward": "loss alone",
    "log_prob": "`log_prob`",
    "predict": "`predict`",
    "sample": "`sample`",
}


def gpus() -> list[str]:
    return sorted(file.stem for file in RESULTS.glob("gpu-*.json"))


def rows_of(gpu: str, step: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """Measured rows, by case."""
    rows = json.loads((RESULTS / f"{gpu}.json").read_text(encoding="utf-8"))["rows"]
    return {tuple(row["case"]): row for key, row in rows.items() if key.startswith(f"{step} | ") and "case" in row}


def steps(gpu: str) -> str:
    """A training step by contender: the times of the GPU, a replayed graph and an eager call, and memory."""
    rows = {case: row for case, row in rows_of(gpu, "head").items() if case[2] == STEP}
    found = []
    for shape, dtype in dict.fromkeys(case[:2] for case in rows):
        contenders = list(dict.fromkeys(case[3] for case in rows if case[:2] == (shape, dtype)))
        eager = {name: rows.get((shape, dtype, STEP, name, "eager"), {}) for name in contenders}
        if len(contenders) < 2:
            continue
        ours = eager[OURS]
        first = f"{NAMES[shape]}, {dtype}<br>{'×'.join(f'{size:,}' for size in ours['shape'])}"
        for name, row in eager.items():
            if "gpu ms" not in row:
                continue
            replayed = rows.get((shape, dtype, STEP, name, "graph"), {})
            wall = f"{replayed['wall ms'][0]:.2f}" if "wall ms" in replayed else "–"
            times = f"{row['gpu ms'] / ours['gpu ms']:.2f}"
            cells = [f"{row['gpu ms']:.2f}", f"{row['over mm']:.2f}", times, wall, f"{row['wall ms'][0]:.2f}"]
            found.append([first, f"**{name}**" if name == OURS else name, *cells, mebibytes(row)])
            first = ""
    header = ["N × K × D × V", "implementation", "GPU ms", "÷ product", "÷ ours"]
    return table([*header, "replayed, ms", "called, ms", "memory"], found)


def calls(gpu: str) -> str:
    """GPU milliseconds of our calls, and the same as a multiple of the fastest product."""
    rows = {case: row for case, row in rows_of(gpu, "head").items() if case[3:] == (OURS, "eager") and "gpu ms" in row}
    columns = list(dict.fromkeys(case[:2] for case in rows))
    found = []
    for operation, name in OPERATIONS.items():
        of_shape = [rows.get((*column, operation, OURS, "eager")) for column in columns]
        found.append([name, *(f"{row['gpu ms']:.2f} = {row['over mm']:.1f}" if row else "–" for row in of_shape)])
    return table(["GPU ms = products", *(f"{NAMES[shape]}, {dtype}" for shape, dtype in columns)], found)


def training(gpu: str) -> str:
    """Training steps of the recipes."""
    found = []
    for (recipe, precision), row in rows_of(gpu, "training").items():
        if "step ms" not in row:
            continue
        replayed = f"{row['graphs step ms'][0]:.1f}" if "graphs step ms" in row else "–"
        parts = [
            sum(stage["ms"] for name, stage in row["stages"].items() if name.startswith(part))
            for part in ("head", "LSTM", "clipping")
        ]
        cells = [replayed, f"{row['step ms'][0]:.1f}", f"{row['gpu ms']:.1f}", *(f"{part:.1f}" for part in parts)]
        found.append([f"`{recipe}`, {precision}", *cells, f"{row['launches']:,.0f}"])
    header = ["recipe", "replayed, ms", "kernel by kernel, ms", "kernels alone"]
    return table([*header, "head", "LSTM", "clipping, optimizer", "kernel launches"], found)


def decode(gpu: str) -> str:
    """Calls for few tokens, in microseconds and as a multiple of reading the embedding."""
    rows = {case[0]: row for case, row in rows_of(gpu, "decode").items() if "rows" in row}
    names = list(dict.fromkeys(name for row in rows.values() for name in row["rows"] if not name.endswith(", graph")))
    found = []
    for shape, row in rows.items():
        timed = (row["rows"].get(name) for name in names)
        cells = [f"{1e3 * one['ms'][0]:,.0f} = {one['over floor']:.1f}" if one else "–" for one in timed]
        found.append([shape, "×".join(f"{size:,}" for size in row["shape"]), f"{1e3 * row['floor ms']:,.0f}", *cells])
    return table(["µs = times the floor", "N × K × D × V", "floor", *names], found)


OF_A_GPU: dict[str, Callable[[str], str]] = {
    "gpu-steps": steps,
    "gpu-calls": calls,
    "gpu-training": training,
    "gpu-decode": decode,
}
"""By NAME, the table for `<!-- table: NAME gpu-… -->` in a document."""
