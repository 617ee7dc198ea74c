"""Draws the plots of all experiments from the JSON under results/. `python -m benchmarks.report` calls it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import heads, rank, synthetic_gap, transformer
from .tables import RESULTS, load

PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "heads-ptb-small": heads.plot,
    "heads-wikitext2-small": heads.plot,
    "rank-ptb": rank.plot,
    "synthetic-gap": synthetic_gap.plot,
    "transformer": transformer.plot,
}
"""Names of a JSON file and the plot beside it, and what draws the one from the other."""


def draw(folder: Path = RESULTS) -> list[Path]:
    """Writes every plot to `folder`; returns their paths. Raises FileError."""
    paths = []
    for name, plot in PLOTS.items():
        paths.append(folder / f"{name}.png")
        plot(load(f"{name}.json"), paths[-1])
    return paths
