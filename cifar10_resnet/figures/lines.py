"""Draws lines with labels at their ends, in the project's style."""

from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import offset_copy

from cifar10_resnet.figures.style import PAPER, SMALL

LABEL = 16  # height of a label with the space below it, in pixels


class End(NamedTuple):
    """The end of a line: its label, its place, and the look of its marker."""

    text: str
    x: float
    y: float
    look: dict[str, Any]


def look(colour: str, marker: str) -> dict[str, Any]:
    """Returns the style of a line with markers. Colour and marker distinguish it from others."""
    return {"color": colour, "marker": marker, "lw": 1.8, "ms": 5.5, "mec": PAPER, "mew": 0.8}


def marked(count: int) -> list[int]:
    """Returns which of `count` points have a marker: about eight and the last one."""
    return [*range(0, count - 1, max(1, count // 8)), count - 1]


def label_ends(axes: Axes, ends: Sequence[End], height: float) -> None:
    """Writes labels to the right of axes that are about `height` pixels high.

    A label is as high as its line ends. Labels that would overlap move apart.
    """
    if not ends:
        return
    heights = (axes.transScale + axes.transLimits).transform([(end.x, end.y) for end in ends])[:, 1]
    beside = offset_copy(axes.transAxes, axes.figure, 14, units="points")
    for end, y in zip(ends, spread(list(heights), LABEL / height), strict=True):
        axes.plot(1, y, transform=beside, clip_on=False, **end.look)
        axes.annotate(
            end.text,
            (1, y),
            (23, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center_baseline",
            fontsize=SMALL,
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Returns places from 0 to 1 near the values, in their order, at least `gap` apart."""
    order = sorted(range(len(values)), key=values.__getitem__)
    gap = min(gap, 1 / max(1, len(values) - 1))
    room = 1 - gap * (len(values) - 1)
    # Each value is lowered by the gaps below it. It stays there if it is no lower than the group
    # before it. Otherwise, it joins that group, whose members share their mean.
    together: list[list[float]] = []
    for below, i in enumerate(order):
        together.append([float(np.clip(values[i] - gap * below, 0, room))])
        while len(together) > 1 and mean(together[-2]) > mean(together[-1]):
            together[-2:] = [together[-2] + together[-1]]
    moved = [mean(group) for group in together for _ in group]
    places = {i: moved[below] + gap * below for below, i in enumerate(order)}
    return [places[i] for i in range(len(values))]
