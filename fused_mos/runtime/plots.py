"""What all plots share: colours, ticks of logarithmic axes, a legend that covers nothing, and how a figure is saved.

matplotlib is imported when a plot is drawn, since most commands draw none.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from . import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008). The last is too pale for a thin line."""

HEADS = {"softmax": "#000000", "moc": "#E69F00", "mos": "#0072B2", "softmax-wide": "#CC79A7"}
"""The colour of each head, the same in all plots."""

STEPS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
"""Ticks of a decade, coarsest first."""


def head_colour(name: str, index: int) -> str:
    """The colour of a head by its name in any case; for another line, the one that belongs to its index."""
    return HEADS.get(name.lower(), COLOURS[index % len(COLOURS)])


def log_ticks(axis: "Axis", least: int = 4) -> None:
    """Gives a logarithmic axis the coarsest of `STEPS` that puts at least `least` labelled ticks into its range. A
    range too narrow for all of them gets evenly spaced ticks. Call it once everything is drawn."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    low, high = sorted(axis.get_view_interval())
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    decades = range(first, last + 1, 1 + (last - first) // 10)
    axis.set_minor_locator(NullLocator())
    for steps in STEPS:
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= least:
            axis.set_ticks(ticks, [f"{tick:,.10g}" for tick in ticks])
            return
    axis.set_major_locator(MaxNLocator(least + 1))
    axis.set_major_formatter(ScalarFormatter(useOffset=False))


def legend_above(figure: "Figure", *panels: "Axes", columns: int, title: str | None = None) -> None:
    """One legend for all panels, above them, where it covers no line. The figure's layout must be "constrained", and
    its title belongs here: constrained layout would draw a suptitle over the legend."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    if found:
        style = {"ncols": columns, "frameon": False, "fontsize": "small", "title": title, "title_fontsize": "small"}
        figure.legend(found.values(), found.keys(), loc="outside upper center", **style)


def save(figure: "Figure", path: Path, dpi: int = 130) -> None:
    """Writes the figure to a PNG, complete or not at all. Raises FileError."""
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")
