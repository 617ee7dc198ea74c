"""Plot a machine's times from its JSON under results/machines/. (Other plots are made by the scripts that measure.)"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fused_mos.runtime import files

from .tables import MACHINES, OURS, rows_of

AXES = {
    "experts": (1, "experts K"),
    "vocabulary": (3, "words V"),
    "features": (2, "features D"),
    "tokens": (0, "tokens N"),
}
"""Figures of test_head.py: the index of the size among N, K, D, V that grows, and its label."""
COLOURS = {OURS: "tab:blue", "published code": "tab:red", "five lines, F.linear_cross_entropy": "tab:orange"}


def head_axes(machine: str) -> None:
    """A training step's time along each of N, K, D and V, with the floor."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
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
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        ticks = [place for place, _ in floor]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=20 if ticks[-1] > 5_000 else 0)
        panel.minorticks_off()
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels())}
    panels[0, 0].legend(handles.values(), handles, fontsize=8)
    with files.replacing(MACHINES / f"{machine}.png") as partial:
        figure.savefig(partial, dpi=130, format="png")
    plt.close(figure)
