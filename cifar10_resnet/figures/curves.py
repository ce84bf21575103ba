"""Draws the learning curves of runs with Matplotlib, in the project's style."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from cifar10_resnet.errors import UserError
from cifar10_resnet.figures import lines
from cifar10_resnet.figures.style import (
    BLUE,
    DASHED,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    picture,
    shortened,
)

TITLES = {
    "loss": "Loss, on a logarithmic axis",
    "error": "Error",
    "accuracy": "Accuracy",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
}

Histories = Mapping[str, Sequence[Mapping[str, float]]]


def curves_figure(histories: Histories, tags: Sequence[str], x: str = "epoch") -> Figure:
    """Returns a plot of the learning curves of runs, by name, as `training.history` reads them.

    `tags` are tags of the event files, or "error". `x` is "epoch" or "step".
    """
    height = max(250, lines.LABEL * len(histories))  # pixels, for one tag
    with picture(
        height=110 + (height + 75) * len(tags),
        title="Learning curves",
        subtitle="Thick lines with markers: evaluations. Dashed lines: training batches",
    ) as figure:
        for place, tag in enumerate(tags, 1):
            axes = figure.add_subplot(len(tags), 1, place)
            ends = _draw_tag(axes, histories, tag, x)
            if not ends:
                advice = " Try --x=step." if x == "epoch" else ""
                raise UserError(
                    f"the event files of these runs say nothing of {tag} over {x}s.{advice}"
                )
            _set_axes(axes, tag, x)
            lines.label_ends(axes, ends, height)
    return figure


def _draw_tag(axes: Axes, histories: Histories, tag: str, x: str) -> list[lines.End]:
    """Draws a tag of all runs, and returns where the lines end."""
    ends = []
    for (name, history), look in zip(histories.items(), _looks(), strict=False):
        trained, tested = (_curve(history, writer, tag, x) for writer in ("train", "eval"))
        point = {"marker": "."} if len(trained[0]) == 1 else {}  # A line needs two points.
        axes.plot(*trained, color=look["color"], **DASHED, **point)
        axes.plot(*tested, markevery=lines.marked(len(tested[0])), **look)
        for over, values in (tested, trained):
            if len(over):
                ends.append(lines.End(shortened(name, 30), over[-1], values[-1], look))
                break
    return ends


def _set_axes(axes: Axes, tag: str, x: str) -> None:
    axes.set_title(TITLES[tag])
    axes.set_xlabel(x)
    last = max(line.get_xdata().max(initial=0) for line in axes.lines)
    axes.set_xlim(0, 1.01 * max(1, last))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if tag == "loss":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}%" if tag in ("error", "accuracy") else "{x:,g}")


def _curve(
    history: Sequence[Mapping[str, float]], writer: str, tag: str, x: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epochs or steps of a tag, and its values. Accuracy and error are in percent."""
    column = f"{writer}_{'accuracy' if tag == 'error' else tag}"
    rows = [row for row in history if column in row]
    over, values = (np.array([row[key] for row in rows]) for key in ("step", column))
    if tag in ("error", "accuracy"):
        values = 100 * (1 - values if tag == "error" else values)
    if x == "epoch":
        epochs = (row["train_epoch"] / row["step"] for row in history if "train_epoch" in row)
        over = over * next(epochs, np.nan)
    finite = np.isfinite(over) & np.isfinite(values)
    return over[finite], values[finite]


def _looks() -> Iterator[dict[str, Any]]:
    """Yields a style for each run: neighbours differ in colour and in marker."""
    colours, markers = (BLUE, ORANGE, GREEN, PURPLE, INK, SKY), "os^Dv*"
    for number in count():
        marker = markers[(number + number // len(colours)) % len(markers)]
        yield lines.look(colours[number % len(colours)], marker)
