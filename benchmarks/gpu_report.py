"""Judge the results of gpu.py against its goals, and plot them."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fused_mos.runtime import files

from .gpu_decode import GOAL

STEP = "forward + backward"
PEERS = {
    "published code": 5,
    "log-sum-exp": 5,
    "log-sum-exp, compiled": 2,
    "five lines, F.linear_cross_entropy": 2,
    "five lines, F.linear_cross_entropy, chunked": 2,
    "five lines, cut-cross-entropy": 2,
    "Liger, mean over rows": 2,
    "F.linear + F.cross_entropy": 1,
    "F.linear + F.cross_entropy, compiled": 1,
    "F.linear_cross_entropy": 1,
    "F.linear_cross_entropy, chunked": 1,
    "cut-cross-entropy": 1,
    "Liger": 1,
}
"""Wanted speedup of a step over each peer, at the shapes of the paper's training and at K = 1."""
KINDS = {
    "fused_mos": STEP,
    "published code": "published",
    "plain PyTorch": "",
    "torch.compile": "compiled",
    "F.linear_cross_entropy": "F.linear_cross",
    "cut-cross-entropy": "cut-cross",
    "Liger": "Liger",
}
"""Bars of the plot, each with a part of its rows' names."""


def goals(result: dict) -> list[dict]:
    """Each goal with its measured value. Goals of steps that were not run are left out."""
    return [{"goal": goal, "value": value, "wanted": wanted, "met": met} for goal, value, wanted, met in _goals(result)]


def _goals(result: dict) -> Iterator[tuple[str, object, str, bool]]:
    for check in ("tests", "memcheck", "racecheck", "synccheck"):
        if check in result:
            yield check, result[check]["summary"], "all pass", result[check]["passed"] is True
    for key, decoding in result.get("decode", {}).items():
        for name, row in decoding["rows"].items():
            if name.endswith(", graph"):
                yield (
                    f"decode {key}: {name}, times the floor",
                    row["over floor"],
                    f"at most {GOAL}",
                    row["over floor"] <= GOAL,
                )
    steps = {
        key: profile["step_ms"]["median"]
        for key, profile in result.get("training", {}).items()
        if key.startswith("ptb ")
    }
    if steps:
        best = min(steps, key=steps.get)
        yield f"training step of {best}, ms", round(steps[best], 2), "below 6", steps[best] < 6
    for key, times in result.get("times", {}).items():
        rows = times["rows"]
        single = times["shape"][1] == 1
        for name, most in (("forward", 1.25), (STEP, 4.5)):
            if "products" in rows[name]:
                value = rows[name]["products"]
                yield f"{key}: {name}, in products", value, f"at most {most}", value <= most
        for name, row in rows.items():
            if (
                "needs products" in row
                and row["peak MiB"] is not None
                and name in ("forward", STEP, f"{STEP}, recomputing")
            ):
                extra = round(row["peak MiB"] - row["kept MiB"], 1)  # ours has its gradients from the start
                yield f"{key}: {name}, MiB beside inputs and gradients", extra, "at most 256", extra <= 256
        if "ms" not in rows[STEP]:
            yield f"{key}: {STEP}", rows[STEP]["failed"], "runs", False
            continue
        for peer, wanted in PEERS.items():
            row = rows.get(peer, {})
            if row.get("failed") == "out of memory":
                yield f"{key}: runs where {peer} is out of memory", "runs", "runs", True
            elif "ms" in row and (single or key.split()[0] in ("ptb", "wikitext2")):
                value = round(row["ms"][0] / rows[STEP]["ms"][0], 2)
                yield f"{key}: times as fast as {peer}", value, f"at least {wanted}", value >= wanted
    if "filter" in result:
        row = result["filter"]["rows"]["trained bfloat16"]
        value = row["products, filtered"]
        yield f"trained model, bfloat16: {STEP} with the filter, in products", value, "at most 3", value <= 3


def _row_of(kind: str, rows: dict[str, dict]) -> dict:
    """The row of one kind of contender, empty if the shape has none."""
    if kind == "plain PyTorch":
        return rows.get("log-sum-exp") or rows["F.linear + F.cross_entropy"]
    return next(
        (row for name, row in rows.items() if KINDS[kind] in name and (kind != "fused_mos" or name == STEP)), {}
    )


def plot(result: dict, path: Path) -> None:
    """Forward + backward of every contender, in products at torch.mm's best rate, by shape and dtype."""
    groups = result["times"]
    figure, axes = plt.subplots(figsize=(1.5 + 2.4 * len(groups), 4.5), layout="constrained")
    for i, kind in enumerate(KINDS):
        places = [group + (i - (len(KINDS) - 1) / 2) * 0.12 for group in range(len(groups))]
        rows = [_row_of(kind, times["rows"]) for times in groups.values()]
        axes.bar(places, [row.get("products", 0) for row in rows], 0.11, label=kind, zorder=2)
        for place, row in zip(places, rows):
            if "failed" in row:
                reason = "out of memory" if row["failed"] == "out of memory" else "not run"
                axes.text(
                    place,
                    axes.get_ylim()[0] + 0.2,
                    reason,
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    color=f"C{i}",
                )
    axes.axhline(3, color="black", linewidth=1, linestyle="--", zorder=3)
    axes.text(len(groups) - 0.5, 3, " floor", va="bottom", ha="right", fontsize=8)
    shapes = [f"{key}\n" + "×".join(f"{size:,}" for size in times["shape"]) for key, times in groups.items()]
    axes.set_xticks(range(len(groups)), shapes, fontsize=8)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("time ÷ one product at torch.mm's best rate")
    axes.set_title(
        f"forward + backward on {result['gpu']}, torch {result['torch']}, triton {result['triton']}", fontsize=10
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
