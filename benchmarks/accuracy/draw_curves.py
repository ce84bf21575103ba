"""Draws the plots of the recorded runs, and skips missing runs.

python benchmarks/accuracy/draw_curves.py --results_dir=benchmarks/accuracy --output_dir=files
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib.axes import Axes

import run_csv
from cifar10_resnet.cli import app
from cifar10_resnet.figures import lines
from cifar10_resnet.figures.lines import End
from cifar10_resnet.figures.style import (
    ACCENT,
    DASHED,
    INK,
    MUTED,
    SKY,
    SMALL,
    picture,
)
from cifar10_resnet.settings import Checked, setting
from cifar10_resnet.terminal import PROJECT
from run_all import PAPER_ACCURACY

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

HEIGHT, AXES_HEIGHT = 440, 300  # pixels
# The highest percents by others, by number of layers. docs/results.md has the sources.
HIGHEST_ACCURACY = {20: 93.30, 32: 93.53, 44: 94.01, 56: 94.89, 110: 95.88}


class Look(NamedTuple):
    """The look of a run. Colour, lightness and marker distinguish it from others."""

    label: str
    colour: str
    marker: str

    @property
    def style(self) -> dict[str, Any]:
        return lines.look(self.colour, self.marker)


LAYERS_20, LAYERS_56, LAYERS_110 = (
    Look("20 layers", SKY, "o"),
    Look("56 layers", ACCENT, "s"),
    Look("110 layers", INK, "^"),
)
RESIDUAL = {
    "resnet20-fast-seed0": LAYERS_20,
    "resnet56-fast": LAYERS_56,
    "resnet110-fast": LAYERS_110,
}
PLAIN = {"plain20-fast": LAYERS_20, "plain56-fast": LAYERS_56, "plain110-fast": LAYERS_110}
RESIDUAL_BY_DEPTH = Look("residual networks", ACCENT, "o")
PLAIN_BY_DEPTH = Look("plain networks", MUTED, "s")
THIS_PROJECT = Look("this project, 41 epochs", ACCENT, "o")
HIGHEST = Look("highest by others", INK, "^")
PAPER = Look("the paper", MUTED, "s")
BY_DEPTH = ("resnet20-fast-seed0", *(f"resnet{n}-fast" for n in (32, 44, 56, 110)))
DEPTHS = dict.fromkeys(BY_DEPTH, RESIDUAL_BY_DEPTH) | dict.fromkeys(PLAIN, PLAIN_BY_DEPTH)
SPEED = {
    "resnet20-paper": Look("paper's schedule", MUTED, "o"),
    "resnet20-fast-seed2": Look("fast recipe, 41 epochs", INK, "s"),
    "resnet20-fast-28-epochs": Look("fast recipe, 28 epochs", ACCENT, "^"),
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
    for name, looks, draw in (
        ("depth.png", DEPTHS, draw_depths),
        ("others.png", dict.fromkeys(BY_DEPTH, THIS_PROJECT), draw_others),
        (
            "resnet.png",
            RESIDUAL,
            partial(draw_learning, title="Residual networks: deeper is more accurate"),
        ),
        (
            "plain.png",
            PLAIN,
            partial(draw_learning, title="Plain networks: deeper is less accurate"),
        ),
        ("speed.png", SPEED, draw_speed),
    ):
        file = Path(flags.output_dir) / name
        if runs := read_runs(Path(flags.results_dir), looks):
            draw(runs, file=file)
        else:
            print(f"not drawn, because its runs do not exist: {file}")
    return 0


class Run(NamedTuple):
    """A run's name and look, its columns with `nan` for missing values, and its accuracy."""

    name: str
    look: Look
    columns: dict[str, np.ndarray]
    accuracy: float  # the evaluator's, at the end: in fp32, not in the run's precision
    processor: str = ""

    def curve(self, x: str, accuracy: str) -> Curve:
        """Returns the rows that have both values: a column, and an accuracy in percent."""
        both = np.stack([self.columns[x], 100 * self.columns[accuracy]])
        return tuple(both[:, np.isfinite(both).all(axis=0)])


def read_runs(folder: Path, looks: dict[str, Look]) -> list[Run]:
    """Returns the runs that exist and have test accuracies."""
    runs = []
    for name, look in looks.items():
        file = folder / f"{name}.csv"
        if not file.exists():
            print(f"skipped: {file} does not exist")
            continue
        read = run_csv.read(file)
        columns = read.columns | {"minutes": read.minutes, "epoch": read.epochs}
        run = Run(name, look, columns, read.accuracy, read.comments.get("processor", ""))
        if len(run.curve("minutes", "test_accuracy")[0]) and np.isfinite(run.accuracy):
            runs.append(run)
        else:
            print(f"skipped: {file} has no test accuracy")
    return runs


def draw_depths(runs: Sequence[Run], file: Path) -> None:
    """Draws the accuracy at the end by depth: a line of residual and a line of plain networks."""
    title = "Residual networks gain from depth, plain networks lose"
    subtitle = "Test accuracy by number of layers, after 41 epochs of the recipe fast"
    curves = {look: by_depth(runs, look) for look in (RESIDUAL_BY_DEPTH, PLAIN_BY_DEPTH)}
    draw_by_depth(curves, file, title, subtitle)


def draw_others(runs: Sequence[Run], file: Path) -> None:
    """Draws the accuracy at the end by depth: this project's, the paper's and the highest."""
    title = "Residual networks: this project and others"
    subtitle = "Test accuracy by number of layers. The others trained for 182 to 300 epochs"
    curves = {HIGHEST: HIGHEST_ACCURACY, PAPER: PAPER_ACCURACY}
    curves[THIS_PROJECT] = by_depth(runs, THIS_PROJECT)
    draw_by_depth(curves, file, title, subtitle, ylim=(90.5, 96.5), yticks=range(91, 97))


def by_depth(runs: Sequence[Run], look: Look) -> dict[int, float]:
    """Returns the percents of the runs with this look, by number of layers."""
    of_look = [run for run in runs if run.look == look]
    return {int(re.search(r"\d+", run.name)[0]): 100 * run.accuracy for run in of_look}


def draw_by_depth(
    curves: dict[Look, dict[int, float]], file: Path, title: str, subtitle: str, **limits: Any
) -> None:
    """Draws percents by number of layers, written above the first line and below the others."""
    with picture(file, height=HEIGHT, title=title, subtitle=subtitle) as figure:
        axes, ends, above = figure.add_subplot(), [], 8
        set_percent(axes)
        for look, percents in curves.items():
            axes.plot(percents.keys(), percents.values(), **look.style)
            for x, y in percents.items():
                note(axes, f"{y:.1f}%", (x, y), (0, above), ha="center")
            ends += [End(look.label, x, y, look.style) for x, y in list(percents.items())[-1:]]
            above = -16
        axes.set(xlabel="layers", xlim=(14, 114), xticks=[20, 32, 44, 56, 110], **limits)
        lines.label_ends(axes, ends, AXES_HEIGHT)


def draw_learning(runs: Sequence[Run], title: str, file: Path) -> None:
    """Draws the accuracy on training and test images over epochs."""
    subtitle = "Accuracy by epoch. Thick lines: test images. Dashed lines: training batches"
    with picture(file, height=HEIGHT, title=title, subtitle=subtitle) as figure:
        axes, ends = figure.add_subplot(), []
        for run in runs:
            axes.plot(*run.curve("epoch", "train_accuracy"), color=run.look.colour, **DASHED)
            x, y = run.curve("epoch", "test_accuracy")
            axes.plot(x, y, markevery=lines.marked(len(x)), **run.look.style)
            text = f"{run.look.label}: {100 * run.accuracy:.1f}%"
            ends.append(End(text, x[-1], 100 * run.accuracy, run.look.style))
        axes.set(xlabel="epoch", xlim=(0, 1.01 * max(end.x for end in ends)))
        set_percent(axes)
        lines.label_ends(axes, ends, AXES_HEIGHT)


def draw_speed(runs: Sequence[Run], file: Path) -> None:
    """Draws the test accuracy over time."""
    title = "ResNet-20: test accuracy over training time"
    subtitle = "On two CPU cores. Accuracy varies until the learning rate is low"
    # The lines end close together, so each label has its own place next to its line's end.
    beside = ((0, 8, "right"), (9, 3, "left"), (-56, 16, "left"))
    places = dict(zip(SPEED.values(), beside, strict=True))
    with picture(file, height=HEIGHT, title=title, subtitle=subtitle) as figure:
        axes = figure.add_subplot()
        for run in runs:
            x, y = run.curve("minutes", "test_accuracy")
            axes.plot(x, y, markevery=lines.marked(len(x)), **run.look.style)
            text = f"{run.look.label}: {100 * run.accuracy:.1f}% after {x[-1]:,.0f} min"
            if maker := re.match(r"\w+", run.processor):
                text += f" ({maker[0]})"
            right, up, ha = places[run.look]
            note(axes, text, (x[-1], y[-1]), (right, up), ha=ha, color=run.look.colour)
        last = max(line.get_xdata().max() for line in axes.lines)
        axes.axhline(PAPER_ACCURACY[20], color=MUTED, lw=0.9, ls=(0, (1, 2)))
        text = f"dotted: the paper's ResNet-20, {PAPER_ACCURACY[20]}%"
        note(axes, text, (last, PAPER_ACCURACY[20]), (0, -14), ha="right", color=MUTED)
        set_percent(axes)
        axes.set(xlabel="minutes", xlim=(0, 1.01 * last), ylim=(30, 105))


def note(axes: Axes, text: str, place: tuple[float, float], beside: tuple, **style: Any) -> None:
    """Writes a small text next to a point, at a distance in points."""
    axes.annotate(
        text,
        place,
        beside,
        textcoords="offset points",
        fontsize=SMALL,
        annotation_clip=False,
        **style,
    )


def set_percent(axes: Axes) -> None:
    """Makes an axis of accuracies, which is the same in all plots."""
    axes.set(ylim=(0, 105), yticks=range(0, 101, 20))
    axes.yaxis.set_major_formatter("{x:g}%")


if __name__ == "__main__":
    app.run(main, Settings)
