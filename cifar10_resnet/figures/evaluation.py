"""Draws the plots of an evaluation with Matplotlib, in the project's style."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cifar10_resnet.evaluation.metrics import (
    MATRIX_LEGEND,
    MISTAKES_SHOWN,
    NUM_BINS,
    Metrics,
    accuracy_by_class,
    calibration,
    shades_of,
    wilson_interval,
)
from cifar10_resnet.figures.style import (
    BLUE,
    DASHED,
    INK,
    MUTED,
    PAPER,
    SKY,
    SMALL,
    VERMILLION,
    picture,
    shortened,
    tint,
)

PIXEL = 0.72  # points, at the style's 100 pixels per inch
SMALLEST = 4.5  # points; readable, because files have twice the pixels

MISTAKES_IN_A_ROW = 8


def evaluation_figures(
    metrics: Metrics, images: np.ndarray, names: Sequence[str]
) -> dict[str, Figure]:
    """Returns the plots of an evaluation. The keys are file names without their ending."""
    matrix = metrics.confusion_matrix
    return {
        "confusion_matrix": confusion_matrix_figure(matrix, names),
        "class_accuracy": class_accuracy_figure(matrix, names),
        "calibration": calibration_figure(metrics.confidences, metrics.correct),
        "mistakes": mistakes_figure(metrics, images, names),
    }


def confusion_matrix_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Returns a plot of `matrix[i, j]`, the number of images of class i with prediction j."""
    classes = len(names)
    width, height = 760 / classes, np.clip(700 / classes, 3, 46)  # pixels per cell
    with picture(
        height=200 + classes * height, title="Confusion matrix", subtitle=MATRIX_LEGEND
    ) as figure:
        axes, shades = figure.add_subplot(), shades_of(matrix)
        colours = np.where(np.eye(classes)[..., None], to_rgb(BLUE), to_rgb(VERMILLION))
        pixels = 1 - shades[..., None] * (1 - colours)
        axes.imshow(pixels, aspect="auto", interpolation="nearest")
        axes.grid(False)
        if height >= 24:
            for row, column in zip(*np.nonzero(matrix), strict=True):
                axes.text(
                    column,
                    row,
                    f"{matrix[row, column]:,}",
                    color=PAPER if shades[row, column] > 0.6 else INK,
                    fontsize=SMALL,
                    ha="center",
                    va="center_baseline",
                )
        longest = max(map(len, names)) * 0.62 * SMALL / PIXEL
        _name_ticks(axes, "y", names, height)
        _name_ticks(axes, "x", names, width, rotation=90 if longest > width else 0)
        axes.set(xlabel="predicted", ylabel="true")
    return figure


def class_accuracy_figure(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Returns a plot of each class's accuracy, from the best to the worst."""
    shares, counts = accuracy_by_class(matrix), matrix.sum(axis=1)
    order = np.argsort(-shares, kind="stable")  # classes without images come last
    row = np.clip(700 / len(names), 13, 26)  # in pixels
    overall = np.trace(matrix) / counts.sum()
    with picture(
        height=160 + len(names) * row,
        title="Accuracy by class",
        subtitle=f"With 95% intervals. Dashed: {overall:.1%}, the accuracy on all images",
    ) as figure:
        axes = figure.add_subplot()
        places = np.arange(len(names))
        counted = np.where(counts, counts, np.nan)[order]
        low, high = wilson_interval(np.diag(matrix)[order], counted)
        axes.hlines(places, low, high, color=SKY, lw=2.5)
        axes.plot(shares[order], places, "o", color=BLUE, ms=5)
        axes.axvline(overall, color=MUTED, **DASHED)
        for place, i in enumerate(order):
            text = f"{shares[i]:.1%} of {counts[i]:,}" if counts[i] else "no images"
            axes.text(
                *(1.01, place, text),
                transform=axes.get_yaxis_transform(),
                fontsize=SMALL - 1,
                va="center_baseline",
            )
        _name_ticks(axes, "y", [names[i] for i in order], row)
        _percent_ticks(axes, "x", np.nanmin(low))
        axes.set(ylim=(len(names) - 0.4, -0.6))
        axes.grid(False, axis="y")
    return figure


def calibration_figure(confidences: np.ndarray, correct: np.ndarray) -> Figure:
    """Returns a plot of the accuracy and the number of images in each bin of confidence.

    It is narrow, so a telephone shows its text large enough.
    """
    found = calibration(confidences, correct)
    edges = np.linspace(0, 1, NUM_BINS + 1)
    middles, width = (edges[1:] + edges[:-1]) / 2, 0.9 / NUM_BINS
    counted = np.where(found.counts, found.counts, np.nan)
    with picture(width=420, height=540, title="Accuracy by confidence") as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=MUTED, **DASHED)
        upper.bar(middles, np.nan_to_num(found.accuracies), width, color=SKY, label="accuracy")
        interval = wilson_interval(found.accuracies * counted, counted)
        upper.vlines(middles, *interval, color=INK, lw=1, label="95% interval")
        ends = middles - width / 2, middles + width / 2
        upper.hlines(found.confidences, *ends, color=VERMILLION, lw=2, label="mean confidence")
        upper.set_ylabel("accuracy")
        _percent_ticks(upper, "y")

        lower.bar(middles, found.counts, width, color=tint(BLUE, 0.5))
        lower.set(yscale="log", ylim=(0.5, 2 * found.counts.max()))
        lower.yaxis.set_major_formatter("{x:,.0f}")
        lower.set(ylabel="images", xlabel="confidence")
        handles, labels = upper.get_legend_handles_labels()
        below = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.5)}
        lower.legend(handles, labels, ncols=3, columnspacing=1.2, handlelength=1.4, **below)
        _percent_ticks(lower, "x", edges[np.flatnonzero(found.counts)[0]])
        for axes in (upper, lower):
            axes.grid(False, axis="x")
    return figure


def mistakes_figure(metrics: Metrics, images: np.ndarray, names: Sequence[str]) -> Figure:
    """Returns a plot of up to MISTAKES_SHOWN mistakes, the most confident first."""
    shown = metrics.most_confident_mistakes(MISTAKES_SHOWN)
    rows = -(-len(shown) // MISTAKES_IN_A_ROW)
    title = f"{len(shown)} most confident mistakes" if rows else "No mistakes"
    subtitle = f"All {metrics.num_images:,} predictions are correct"
    if rows:
        subtitle = (
            f"Of {np.count_nonzero(~metrics.correct):,} mistakes. "
            "Above: prediction and confidence. Below: true class."
        )
    with picture(height=100 + 154 * rows, title=title, subtitle=subtitle) as figure:
        for place, i in enumerate(shown, 1):
            axes = figure.add_subplot(rows, MISTAKES_IN_A_ROW, place, xticks=[], yticks=[])
            axes.imshow(images[i], interpolation="nearest")
            axes.spines[:].set_visible(False)
            classes = metrics.predictions[i], metrics.labels[i]
            predicted, true = (shortened(names[c], 16) for c in classes)
            small = {"fontsize": SMALL - 1}
            above = f"{predicted}\n{100 * metrics.confidences[i]:.0f}%"
            axes.set_title(above, loc="center", pad=3, color=VERMILLION, **small)
            axes.set_xlabel(true, labelpad=3, color=INK, **small)
    return figure


def _name_ticks(
    axes: Axes, axis: str, names: Sequence[str], room: float, rotation: float = 0
) -> None:
    """Labels the ticks of an axis, each `room` pixels wide. Shrinks or skips labels to fit."""
    size = SMALL if axis == "x" and not rotation else min(SMALL, 0.95 * room * PIXEL)
    every = int(np.ceil(SMALLEST / size))
    places = range(0, len(names), every)
    labels = [shortened(names[i], 24) for i in places]
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_ticks(places, labels, fontsize=max(size, SMALLEST), rotation=rotation)
    axes.tick_params(axis=axis, length=0)


def _percent_ticks(axes: Axes, axis: str, least: float = 0) -> None:
    """Labels an axis in percent, from the last multiple of 10% below `least`."""
    axes.set(**{f"{axis}lim": (np.floor(10 * min(least, 0.9) + 1e-6) / 10, 1)})
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_formatter(PercentFormatter(1, decimals=0, symbol="%"))
