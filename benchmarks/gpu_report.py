"""Tables, plots and goals of the rows that benchmarks.gpu measures."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fused_mos.runtime import files

from .gpu_cases import CHECKS, OURS, STEP
from .gpu_results import Results
from .gpu_sweep import table as sweep_table

DECODE_GOAL = 1.3
"""Goal for the time of decoding relative to reading the embedding, in bfloat16."""
OVER_MM = {"forward": 1.25, STEP: 4.5}
"""Goals for the GPU time of our calls relative to the fastest product."""
EXTRA_MIB = 256
SPEEDUP = {
    "published code": 5,
    "log-sum-exp": 5,
    "log-sum-exp, compiled": 2,
    "five lines, F.linear_cross_entropy": 2,
    "five lines, F.linear_cross_entropy, chunked": 2,
    "five lines, cut-cross-entropy": 2,
    "five lines, Liger": 2,
}
"""Goals for the speedup of a step over each baseline. It is 1 for others, which are all at K = 1."""


def line(key: str, row: dict) -> str:
    """The line that the terminal shows for a row."""
    if reason := row.get("failed") or row.get("unavailable"):
        return f"{key}: {reason}"
    if "over mm" in row:
        memory = "" if row["peak MiB"] is None else f", {row['peak MiB']:,.0f} MiB"
        ours = f", {row['times ours'][0]:.2f} times ours" if "times ours" in row else ""
        return (
            f"{key}: GPU {row['gpu ms']:.3f} ms = {row['over mm']:.2f} mm, wall {row['wall ms'][0]:.3f}, host "
            f"{row['host ms'][0]:.3f}, {row['launches']:.0f} launches{memory}{ours}"
        )
    if "step ms" in row:
        return (
            f"{key}: {row['step ms'][0]:.2f} ms a step, {_replayed(row)}{row['words/s']:,} words/s, head "
            f"{row['head share']:.0%}, LSTM {row['LSTM share']:.0%}, idle {row['idle share']:.0%}"
        )
    if "summary" in row:
        return f"{key}: {row['summary']}"
    if "key" in row:
        return f"{key}: {row['key']}, {row['ms before'][0]:.3f} -> {row['ms'][0]:.3f} ms with {tuple(row['tile'])}"
    return f"{key}: " + ", ".join(f"{name} {_decoded(values)}" for name, values in row["rows"].items())


def _replayed(row: dict) -> str:
    return f"as a graph {row['graphs step ms'][0]:.2f}, " if "graphs step ms" in row else ""


def _decoded(values: dict) -> str:
    return f"{values['over floor']:.2f} floors" if "over floor" in values else str(values)


# ---------------------------------------------------------------------------------------------------------------- goals


def goals(rows: dict[str, dict]) -> list[dict]:
    """Each goal with its measured value. Goals of cases that were not measured are left out."""
    return [{"goal": goal, "value": value, "wanted": wanted, "met": met} for goal, value, wanted, met in _goals(rows)]


def _goals(rows: dict[str, dict]) -> Iterator[tuple[str, object, str, bool]]:
    for key, row in rows.items():
        step, *parts = key.split(" | ")
        if step == "checks" and parts[0] in CHECKS and "summary" in row:
            yield parts[0], row["summary"], "all pass", row["passed"] is True
        elif step == "decode":
            for name, values in row.get("rows", {}).items():
                if name.endswith(", graph"):
                    value = values["over floor"]
                    yield f"{key}: {name}, in floors", value, f"at most {DECODE_GOAL}", value <= DECODE_GOAL
        elif step == "filter" and "rows" in row:
            value = row["rows"]["trained bfloat16"]["over mm, filtered"]
            yield "trained model, bfloat16: a step with the filter, in mm", value, "at most 3", value <= 3
        elif step == "head":
            yield from _head_goals(rows, key, row, *parts)
    steps = {
        key: row.get("graphs step ms", row["step ms"])[0]
        for key, row in rows.items()
        if key.startswith("training | ptb ") and "step ms" in row
    }
    if steps:
        best = min(steps, key=steps.__getitem__)
        yield f"{best}, ms", steps[best], "below 6", steps[best] < 6


def _head_goals(
    rows: dict[str, dict], key: str, row: dict, shape: str, dtype: str, operation: str, contender: str, mode: str
) -> Iterator[tuple[str, object, str, bool]]:
    if contender == OURS:
        if "failed" in row:
            yield key, row["failed"], "runs", False
        elif mode == "eager":
            if most := OVER_MM.get(operation):
                yield f"{key}, in mm", row["over mm"], f"at most {most}", row["over mm"] <= most
            if operation in ("forward", STEP, "step none"):
                extra = round(row["peak MiB"] - row["kept MiB"], 1)  # ours holds its gradients from the start
                yield f"{key}, MiB beside results", extra, f"at most {EXTRA_MIB}", extra <= EXTRA_MIB
    elif mode == "eager" and "times ours" in row:
        wanted = SPEEDUP.get(contender, 1)
        value = row["times ours"][0]
        yield f"{shape} {dtype}: times as fast as {contender}", value, f"at least {wanted}", value >= wanted
    elif row.get("failed") == "out of memory" and OURS in rows.get(key.replace(contender, OURS), {}).get("case", ()):
        yield f"{shape} {dtype}: runs where {contender} is out of memory", "runs", "runs", True


# --------------------------------------------------------------------------------------------------------------- tables


def head_table(rows: dict[str, dict]) -> str:
    """A Markdown table of the head's rows."""
    header = (
        "shape",
        "products",
        "call",
        "by",
        "GPU ms",
        "÷ mm",
        "wall ms",
        "host ms",
        "launches",
        "MiB",
        "time ÷ ours",
    )
    lines = [header, ("---",) * len(header)]
    for row in rows.values():
        if len(row.get("case", ())) != 5:
            continue
        shape, dtype, operation, contender, mode = row["case"]
        first = (shape, dtype, operation if mode == "eager" else f"{operation}, {mode}", contender)
        if "gpu ms" not in row:
            lines.append((*first, row.get("failed") or row["unavailable"], *[""] * (len(header) - 5)))
            continue
        memory = "" if row["peak MiB"] is None else f"{row['peak MiB']:,.0f}"
        ours = "{:.2f} ({:.2f}–{:.2f})".format(*row["times ours"]) if "times ours" in row else ""
        numbers = (row["gpu ms"], row["over mm"], row["wall ms"][0], row["host ms"][0])
        lines.append((*first, *(f"{number:.3f}" for number in numbers), f"{row['launches']:.0f}", memory, ours))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---------------------------------------------------------------------------------------------------------------- plots


def plot(rows: dict[str, dict], title: str, path: Path) -> None:
    """The mean step of every contender at each shape in bfloat16: GPU time in products, and wall time."""
    steps: dict[str, dict[str, dict]] = {}
    for row in rows.values():
        if len(row.get("case", ())) == 5 and "gpu ms" in row:
            shape, dtype, operation, contender, mode = row["case"]
            if operation == STEP and dtype == "bfloat16":
                name = contender if mode == "eager" else f"{contender}, {mode}"
                steps.setdefault(shape, {})[name] = row
    if not steps:
        return
    figure, axes = plt.subplots(
        2, len(steps), squeeze=False, figsize=(1.5 + 3.4 * len(steps), 8.5), layout="constrained"
    )
    for column, (shape, contenders) in zip(axes.T, steps.items()):
        names = sorted(contenders, key=lambda name: contenders[name]["gpu ms"], reverse=True)
        colours = ["C0" if name.startswith(OURS) else "C7" for name in names]
        column[0].barh(names, [contenders[name]["over mm"] for name in names], color=colours)
        column[0].axvline(3, color="black", linewidth=1, linestyle="--")  # the three products
        column[0].set_xlabel("GPU time ÷ fastest product")
        column[0].set_title(f"{shape}\n" + "×".join(f"{size:,}" for size in next(iter(contenders.values()))["shape"]))
        column[1].barh(names, [contenders[name]["wall ms"][0] for name in names], color=colours)
        column[1].set_xlabel("wall time, ms")
        for one in column:
            one.tick_params(axis="y", labelsize=7)
            one.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_training(rows: dict[str, dict], title: str, path: Path) -> None:
    """Plot where the time of each recipe's step goes."""
    found = {key.removeprefix("training | "): row for key, row in rows.items() if "stages" in row}
    if not found:
        return
    stages = list(dict.fromkeys(stage for row in found.values() for stage in row["stages"]))
    height = max(1.5 + 0.5 * len(found), 0.6 + 0.18 * len(stages))  # the legend has a line per stage
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    left = dict.fromkeys(found, 0.0)
    for i, stage in enumerate(stages):
        widths = [row["stages"].get(stage, {"ms": 0.0})["ms"] for row in found.values()]
        axes.barh(list(found), widths, left=list(left.values()), label=stage, color=plt.get_cmap("tab20")(i % 20))
        left = {name: start + width for (name, start), width in zip(left.items(), widths)}
    axes.set_yticks(
        range(len(found)), [f"{name}\nidle {row['idle share']:.0%}" for name, row in found.items()], fontsize=8
    )
    axes.set_xlabel("ms of a step")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def finish(results: Results) -> None:
    """Write goals, table and plots of the rows, and print what the terminal has not shown yet."""
    rows, path = results.rows, results.path
    results.save(goals=goals(rows))
    for goal in results.content["goals"]:
        print(f"{'met ' if goal['met'] else 'OPEN'}  {goal['goal']}: {goal['value']} (wanted {goal['wanted']})")
    title = "{gpu}, torch {torch}, triton {triton}, {commit}".format(**results.content)
    files.write_text(path.with_suffix(".md"), f"{title}\n\n{head_table(rows)}\n")
    plot(rows, title, path.with_suffix(".png"))
    plot_training(rows, title, path.with_name(f"{path.stem}-training.png"))
    swept: Iterable[dict] = [row for key, row in rows.items() if key.startswith("sweep")]
    if swept:
        print("faster tiles, as entries of configurations.py:")
        sweep_table(swept)
    print(f"wrote {path}", flush=True)
