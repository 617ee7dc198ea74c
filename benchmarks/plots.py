"""Plots of speed and memory from the JSON under results/machines/: a training step beside its peers, for README.md, and
each machine's times along N, K, D and V. (Other plots are made by the scripts that measure.)"""

import textwrap
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fused_mos.runtime import plots

from .tables import MACHINES, OURS, SHAPE_NAMES, recorded, rows_of

README_MACHINE = "amd-epyc-family-25-model-17-avx512_bf16-2-threads"
"""The machine whose training step README.md shows."""
STEP_PLOT = MACHINES.parent / "training-step.png"
"""Where the bar chart is."""

CONTENDERS = {
    OURS: OURS,
    "five lines, cut-cross-entropy": "cut-cross-entropy,\nfive lines",
    "five lines, F.linear_cross_entropy, chunked": "F.linear_cross_entropy,\nchunked, five lines",
    "log-sum-exp, compiled": "log-sum-exp,\ntorch.compile",
    "published code": "the paper's\npublished code",
}
"""Contenders of the bar chart, and their labels: the strongest peers in time and in memory, and where everybody
starts."""
SHAPES = ("ptb", "wikitext2", "lm1b")
DTYPES = {"float32": ("#0072B2", "#6B6B6B"), "bfloat16": ("#7FC4EC", "#C4C4C4")}
"""Bars by dtype: their colours for ours and for peers."""
LONGEST = 2.5
"""A contender's bar ends, with a mark, at this many times the longest bar of the next slowest contender: one slow peer
would flatten all the others."""


def step_bars(machine: str) -> Figure:
    """Bars of the time and memory that a training step of the head takes by contender, for three shapes. Contenders
    that could not run have a dash, and the reason below."""
    cases = rows_of(machine, "shapes")
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    panels = figure.subplots(2, len(SHAPES), sharey=True)
    for column, case in zip(panels.T, SHAPES):
        found = {dtype: cases.get((case, dtype, "training step"), {}) for dtype in DTYPES}
        some = next((row for rows in found.values() for row in rows.values()), None)
        sizes = " × ".join(f"{size:,}" for size in some["shape"]) if some else "not measured"
        column[0].set_title(f"{SHAPE_NAMES[case]}\n{sizes}", fontsize=9)
        _bars(column[0], found, lambda row: row["ms"][0] if "ms" in row else None)
        _bars(column[1], found, lambda row: row.get("peak MiB"))
    for axes, label in zip(panels[:, 0], ("time, ms", "memory beside the inputs, MiB")):
        axes.set_ylabel(label)
        axes.set_yticks(range(len(CONTENDERS)), CONTENDERS.values(), fontsize=8)
        axes.get_yticklabels()[0].set_fontweight("bold")
    panels[0, 0].set_ylim(len(CONTENDERS) - 0.5, -0.5)  # ours on top, in all panels
    title = "Forward and backward of the head, N × K × D × V; {device}, {instruction set}, {threads} threads"
    plots.legend_above(figure, panels[0, 0], columns=len(DTYPES), title=title.format(**recorded(machine)))
    notes = [textwrap.fill(note, 150, subsequent_indent="  ") for note in _missing(cases)]
    figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize=7)
    return figure


def _bars(axes: Axes, rows: dict[str, dict[str, dict]], value_of: Callable[[dict], float | None]) -> None:
    """Bars of the values of dtype -> contender -> row, each with its value at the end; a dash where there is none."""
    values = {(dtype, name): value_of(rows[dtype].get(name, {})) for dtype in DTYPES for name in CONTENDERS}
    longest = sorted(max(values[dtype, name] or 0 for dtype in DTYPES) for name in CONTENDERS)
    limit = min(longest[-1], LONGEST * longest[-2] or longest[-1]) or 1
    for i, name in enumerate(CONTENDERS):
        weight = "bold" if name == OURS else "normal"
        for place, dtype in zip((i - 0.2, i + 0.2), DTYPES):
            value = values[dtype, name] or 0
            end, text = min(value, limit), f"{value:,.0f}" if value else "–"
            axes.barh(place, end, height=0.38, color=DTYPES[dtype][name != OURS])
            axes.text(end, place, f" » {text}" if value > limit else f" {text}", va="center", size=7.5, weight=weight)
    for dtype, (_, colour) in DTYPES.items():
        axes.barh(0, 0, color=colour, label=f"{dtype} ({OURS}: blue)")
    axes.set_xlim(0, 1.28 * limit)  # room for the numbers
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _missing(cases: dict[tuple[str, str, str], dict[str, dict]]) -> list[str]:
    """A line for each reason why bars are missing, with the contenders that it holds for and the cases."""
    places: dict[tuple[str, str], list[str]] = {}  # of a reason and a contender
    for case in SHAPES:
        for dtype in DTYPES:
            rows = cases.get((case, dtype, "training step"), {})
            for name, label in CONTENDERS.items():
                if "ms" not in rows.get(name, {}):
                    reason = rows.get(name, {}).get("failed", "not measured")
                    places.setdefault((reason, label.replace("\n", " ")), []).append(f"{SHAPE_NAMES[case]} {dtype}")
    labels: dict[tuple[str, str], list[str]] = {}  # of a reason and cases
    for (reason, label), where in places.items():
        labels.setdefault((reason, ", ".join(where)), []).append(label)
    return [f"– {'; '.join(which)} ({where}): {reason}." for (reason, where), which in labels.items()]


# ---------------------------------------------------------------------------------------------------- along N, K, D, V

AXES = {
    "experts": (1, "experts K"),
    "vocabulary": (3, "words V"),
    "features": (2, "features D"),
    "tokens": (0, "tokens N"),
}
"""Figures of test_head.py: the index of the size among N, K, D, V that grows, and its label."""
COLOURS = {OURS: "#0072B2", "published code": "#D55E00", "five lines, F.linear_cross_entropy": "#E69F00"}


def head_axes(machine: str) -> None:
    """A training step's time along each of N, K, D and V, with the floor."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel, (name, (axis, label)) in zip(panels.flat, AXES.items()):
        cases = [rows for rows in rows_of(machine, name).values() if "ms" in rows.get(OURS, {})]
        if not cases:
            panel.set_axis_off()  # this machine was not asked for it
            continue
        for contender, colour in COLOURS.items():
            points = [
                (rows[contender]["shape"][axis], rows[contender]["ms"])
                for rows in cases
                if "ms" in rows.get(contender, {})
            ]
            if not points:
                continue
            places, (median, least, most) = [x for x, _ in points], zip(*(ms for _, ms in points))
            panel.plot(places, median, marker="o", markersize=4, color=colour, label=contender)
            panel.fill_between(places, least, most, color=colour, alpha=0.2, linewidth=0)
        floor = [(rows[OURS]["shape"][axis], rows[OURS]["ms"][0] / rows[OURS]["over floor"]) for rows in cases]
        panel.plot(*zip(*floor), color="black", linestyle="--", linewidth=1, label="floor: three products")
        fixed = ", ".join(
            f"{letter} = {size:,}" for i, (letter, size) in enumerate(zip("NKDV", cases[0][OURS]["shape"])) if i != axis
        )
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="ms", title=fixed)
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3, linewidth=0.5)
        ticks = [place for place, _ in floor]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=20 if ticks[-1] > 5_000 else 0)
        panel.minorticks_off()
        plots.log_ticks(panel.yaxis)
    plots.legend_above(figure, *panels.flat, columns=len(COLOURS) + 1)
    plots.save(figure, MACHINES / f"{machine}.png")
