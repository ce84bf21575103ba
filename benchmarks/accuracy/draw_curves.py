"""Draws the learning curves of the recorded runs, and skips missing runs.

python benchmarks/accuracy/draw_curves.py --results_dir=benchmarks/accuracy --output_dir=files
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import offset_copy

import run_csv
from cifar10_resnet.cli import app
from cifar10_resnet.figures.style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    SMALL,
    picture,
)
from cifar10_resnet.settings import Checked, setting
from cifar10_resnet.terminal import PROJECT

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

HIGHEST_ERROR, LOWEST_ACCURACY = 30, 60  # percent; the axis grows if a run ends near or beyond
PAPERS_ACCURACY = 91.25  # ResNet-20, in the first paper's table 6


class Look(NamedTuple):
    """The look of a run. Colour, lightness and marker distinguish it from others."""

    label: str
    colour: str
    marker: str


LAYERS_20, LAYERS_56, LAYERS_110 = (
    Look("20 layers", ORANGE, "o"),
    Look("56 layers", BLUE, "s"),
    Look("110 layers", INK, "^"),
)
RESIDUAL = {
    "resnet20-fast-seed0": LAYERS_20,
    "resnet56-fast": LAYERS_56,
    "resnet110-fast": LAYERS_110,
}
PLAIN = {"plain20-fast": LAYERS_20, "plain56-fast": LAYERS_56, "plain110-fast": LAYERS_110}
SPEED = {
    "resnet20-paper": Look("paper's schedule", INK, "o"),
    "resnet20-fast-seed2": Look("fast recipe, 41 epochs", BLUE, "s"),
    "resnet20-fast-28-epochs": Look("fast recipe, 28 epochs", ORANGE, "^"),
}

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Settings(Checked):
    results_dir: str = setting(
        str(PROJECT / "benchmarks" / "accuracy"), "Folder of the runs' CSV files", "Folders"
    )
    output_dir: str = setting(str(PROJECT / "files"), "Folder to draw into", "Folders")


def main(flags: "Flags") -> int:
    """Draws the plots."""
    results, output = Path(flags.results_dir), Path(flags.output_dir)
    for title, looks, file in (
        ("Residual networks", RESIDUAL, "resnet.png"),
        ("Plain networks", PLAIN, "plain.png"),
    ):
        draw_errors(read_runs(results, looks, "step"), title, output / file)
    draw_speed(read_runs(results, SPEED, "minutes"), output / "speed.png")
    return 0


class Run(NamedTuple):
    """A run's look, its accuracy, and its columns with `nan` for missing values."""

    look: Look
    columns: dict[str, np.ndarray]
    accuracy: float

    def curve(self, x: str, y: str) -> Curve:
        """Returns two columns, in the rows that have both values."""
        both = np.stack([self.columns[x], self.columns[y]])
        return tuple(both[:, np.isfinite(both).all(axis=0)])


def read_runs(folder: Path, looks: dict[str, Look], x: str) -> list[Run]:
    """Returns the runs that exist and have test accuracies to draw against x."""
    runs = []
    for name, look in looks.items():
        file = folder / f"{name}.csv"
        if not file.exists():
            print(f"left out: {file} is not there")
            continue
        read = run_csv.read(file)
        run = Run(look, read.columns | {"minutes": read.minutes}, read.accuracy)
        if len(run.curve(x, "test_accuracy")[0]) and np.isfinite(run.accuracy):
            runs.append(run)
        else:
            print(f"left out: {file} has no test accuracy")
    return runs


def draw_errors(runs: Sequence[Run], title: str, file: Path) -> None:
    """Draws the errors on training and test images over steps, as in the paper's plot."""
    if not runs:
        print(f"not drawn, for want of runs: {file}")
        return
    subtitle = "Error in percent by step. Thick: test images. Dashed: training batches"
    with picture(file, height=440, title=title, subtitle=subtitle) as figure:
        axes = figure.add_subplot()
        for run in runs:
            steps, accuracy = run.curve("step", "train_accuracy")
            axes.plot(steps, 100 * (1 - accuracy), color=run.look.colour, lw=0.9, ls=(0, (4, 2)))
        text = "{}: {:.1f}%"
        ends = [
            draw_thick(axes, run, "step", lambda accuracy: 100 * (1 - accuracy), text)
            for run in runs
        ]
        highest = max(HIGHEST_ERROR, *(1.5 * end.y for end in ends))
        axes.set(xlabel="step", ylim=(0, min(highest, 100)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        label_ends(axes, ends)


def draw_speed(runs: Sequence[Run], file: Path) -> None:
    """Draws the test accuracy over time."""
    if not runs:
        print(f"not drawn, for want of runs: {file}")
        return
    title = "How soon ResNet-20 is how accurate"
    subtitle = "Test accuracy in percent over minutes of training on two CPU cores"
    with picture(file, height=440, title=title, subtitle=subtitle) as figure:
        axes = figure.add_subplot()
        text = "{}: {:.1f}%, {:,.0f} min"
        ends = [
            draw_thick(axes, run, "minutes", lambda accuracy: 100 * accuracy, text) for run in runs
        ]
        lowest = min(LOWEST_ACCURACY, *(end.y - 5 for end in ends))
        axes.set(xlabel="minutes", ylim=(lowest, max(95, *(end.y + 2 for end in ends))))
        paper = Look(f"ResNet-20 in the paper: {PAPERS_ACCURACY}%", MUTED, "_")
        axes.axhline(PAPERS_ACCURACY, color=paper.colour, lw=0.9, ls=(0, (1, 2)))
        label_ends(axes, [*ends, End(paper, 0, PAPERS_ACCURACY, paper.label)])


class End(NamedTuple):
    """The end of a line, and its label."""

    look: Look
    x: float
    y: float
    text: str


def draw_thick(axes: Axes, run: Run, x: str, y_of: Callable[[Any], Any], text: str) -> End:
    """Draws `y_of` a run's test accuracy as a thick line with markers, and returns its end."""
    x, accuracy = run.curve(x, "test_accuracy")
    y = y_of(accuracy)
    marks = [*range(0, len(x) - 1, max(1, len(x) // 8)), len(x) - 1]
    axes.plot(x, y, lw=1.8, markevery=marks, **marker(run.look))
    # The label has the evaluator's accuracy, as in the table: in fp32, not in the run's precision.
    return End(run.look, x[-1], y[-1], text.format(run.look.label, y_of(run.accuracy), x[-1]))


def marker(look: Look) -> dict[str, Any]:
    edge = {} if look.marker == "_" else {"mec": PAPER, "mew": 0.8}
    return {"color": look.colour, "marker": look.marker, "ms": 5.5, **edge}


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Writes the labels on the right, as high as the lines end, or moved if two are level."""
    right = max(end.x for end in ends)
    axes.set_xlim(0, 1.01 * right)
    bottom, top = axes.get_ylim()
    beside = offset_copy(axes.transData, axes.figure, 14, units="points")
    for end, y in zip(ends, spread([end.y for end in ends], (top - bottom) / 21), strict=True):
        axes.plot(right, y, transform=beside, clip_on=False, **marker(end.look))
        axes.annotate(
            end.text,
            (right, y),
            (20, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=SMALL,
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Returns places near the values, in their order, at least `gap` apart."""
    order = sorted(range(len(values)), key=values.__getitem__)
    # Each value is lowered by the gaps below it. It stays there if it is no lower than the group
    # before it. Otherwise, it joins that group, whose members share their mean.
    together: list[list[float]] = []
    for below, i in enumerate(order):
        together.append([values[i] - gap * below])
        while len(together) > 1 and mean(together[-2]) > mean(together[-1]):
            together[-2:] = [together[-2] + together[-1]]
    moved = [mean(group) for group in together for _ in group]
    places = {i: moved[below] + gap * below for below, i in enumerate(order)}
    return [places[i] for i in range(len(values))]


if __name__ == "__main__":
    app.run(main, Settings)
