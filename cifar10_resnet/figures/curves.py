"""Draws the learning curves of runs with Matplotlib, in the project's style."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from cifar10_resnet.errors import UserError
from cifar10_resnet.figures.style import (
    BLUE,
    DASHED,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SKY,
    picture,
    shortened,
)


def curves_figure(
    histories: Mapping[str, Sequence[Mapping[str, float]]], tags: Sequence[str], x: str = "step"
) -> Figure:
    """Returns a plot of the learning curves of runs, by name, as `training.history` reads them.

    `tags` are tags of the event files, or "error". `x` is "step" or "epoch".
    """
    rows = -(-len(tags) // 2)
    looks = dict(zip(histories, _looks(), strict=False))
    with picture(
        height=105 + 350 * rows + 20 * -(-len(histories) // 3),
        title="Learning curves",
        subtitle="Dashed on training batches, with markers in evaluations",
    ) as figure:
        for place, tag in enumerate(tags, 1):
            axes = figure.add_subplot(rows, min(2, len(tags)), place)
            for name, history in histories.items():
                axes.plot(*_curve(history, "train", tag, x), color=looks[name]["color"], **DASHED)
                over, values = _curve(history, "eval", tag, x)
                axes.plot(over, values, markevery=max(1, len(over) // 8), **looks[name])
            if not any(np.isfinite(line.get_xydata()).all(axis=1).any() for line in axes.lines):
                raise UserError(f"the event files of these runs say nothing of {tag} over {x}s.")
            axes.set_title(tag.replace("_", " "))
            axes.set_xlabel(x)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=x == "step"))
            axes.xaxis.set_major_formatter("{x:,.0f}" if x == "step" else "{x:g}")
            if tag in ("loss", "error"):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}%" if tag in ("error", "accuracy") else "{x:g}")
        lines = [Line2D([], [], label=shortened(name, 40), **looks[name]) for name in histories]
        figure.legend(handles=lines, loc="outside lower left", ncols=3, borderaxespad=1.6)
    return figure


def _curve(
    history: Sequence[Mapping[str, float]], writer: str, tag: str, x: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps or epochs of a tag, and its values. Accuracy and error are in percent."""
    column = f"{writer}_{'accuracy' if tag == 'error' else tag}"
    rows = [row for row in history if column in row]
    over, values = (np.array([row[key] for row in rows]) for key in ("step", column))
    if tag in ("error", "accuracy"):
        values = 100 * (1 - values if tag == "error" else values)
    if x == "epoch":
        epochs = (row["train_epoch"] / row["step"] for row in history if "train_epoch" in row)
        over = over * next(epochs, np.nan)
    return over, values


def _looks() -> Iterator[dict[str, Any]]:
    """Yields a style for each run: a new colour and, from the seventh run on, a new marker too."""
    for marker, colour in cycle(product("os^Dv*", (BLUE, ORANGE, GREEN, PURPLE, INK, SKY))):
        yield {"color": colour, "lw": 1.6, "marker": marker, "ms": 5, "mec": PAPER, "mew": 0.6}
