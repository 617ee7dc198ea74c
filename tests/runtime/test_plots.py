"""What all plots share: ticks that can be read, a legend that covers nothing, colours that can be told apart."""

import itertools

import pytest
import torch
from matplotlib.figure import Figure

from fused_mos.runtime import plots

RANGES = [(38, 260), (71, 330), (0.5, 2_000), (14, 460), (120, 255), (1e-300, 1e300), (100.0, 100.5), (1, 1)]

SEEN = {
    "by most readers": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "without green cones": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "without red cones": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "without blue cones": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
"""What is seen of linear RGB, by Machado, Oliveira and Fernandes (2009), table 1, severity 1."""
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
"""From linear sRGB; the white of D65 is the sum of its columns."""


def lab(colour, seen):
    """CIELAB of #RRGGBB as some eyes see it."""
    srgb = torch.tensor(list(bytes.fromhex(colour[1:]))) / 255
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = torch.tensor(XYZ) @ (torch.tensor(seen) @ linear).clamp(0, 1) / torch.tensor(XYZ).sum(1)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_colours_can_be_told_apart(seen):
    apart = {(a, b): torch.dist(lab(a, seen), lab(b, seen)).item() for a, b in itertools.combinations(plots.COLOURS, 2)}
    assert min(apart.values()) > 15, min(apart, key=apart.get)


def test_heads_have_colours_of_their_own():
    assert set(plots.HEADS.values()) <= set(plots.COLOURS) and len(set(plots.HEADS.values())) == len(plots.HEADS)
    assert plots.head_colour("MoS", 3) == plots.HEADS["mos"]
    assert [plots.head_colour("another", i) for i in (1, 9)] == [plots.COLOURS[1]] * 2


@pytest.mark.parametrize("limits", RANGES)
def test_a_logarithmic_axis_has_ticks_to_read(limits):
    axes = Figure().add_subplot()
    axes.plot([1, 2], limits)
    axes.set_yscale("log")
    plots.log_ticks(axes.yaxis)
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [
        tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1
    ]
    assert 4 <= len(shown) <= 12 and len(set(shown)) == len(shown) and all(shown), shown
    assert not axes.yaxis.get_minorticklocs().size
    if limits[1] < 1e6:
        values = [float(text.replace(",", "")) for text in shown]
        assert values == sorted(values) and low <= values[0] and values[-1] <= high


def test_the_legend_covers_no_panel():
    figure = Figure(layout="constrained")
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.plot([1, 2], [1, 2], label="both")
    panels[1].plot([1, 2], [2, 1], label="one")
    plots.legend_above(figure, *panels, columns=2)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["both", "one"]
    box = legend.get_window_extent()
    assert box.height > 0 and all(axes.get_tightbbox().y1 <= box.y0 for axes in panels)


def test_a_figure_without_labels_has_no_legend():
    figure = Figure(layout="constrained")
    plots.legend_above(figure, figure.add_subplot(), columns=2)
    assert not figure.legends
