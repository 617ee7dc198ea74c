"""The plots of experiments, from their committed results."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import plots
from experiments.tables import RESULTS


def test_all_pictures_are_drawn_from_their_results(tmp_path):
    paths = plots.draw(tmp_path)
    assert {path.name for path in paths} == {path.name for path in RESULTS.glob("*.png")}
    for path in paths:
        assert imread(path).shape == imread(RESULTS / path.name).shape, f"python -m benchmarks.report draws {path.name}"


@pytest.mark.parametrize("name", ["heads-ptb-small", "heads-wikitext2-small"])
def test_a_part_of_the_heads_is_drawn(name, tmp_path):
    """As while the others are still being trained."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    result["heads"] = dict(list(result["heads"].items())[:1])
    plots.PLOTS[name](result, tmp_path / "one.png")
    assert imread(tmp_path / "one.png").shape[0] > 100
