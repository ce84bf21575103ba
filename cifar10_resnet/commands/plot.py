"""Plots learning curves.

python -m cifar10_resnet plot --run=runs/resnet20 --run=runs/plain20
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.errors import UserError
from cifar10_resnet.settings import Checked, setting

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

TAGS = ("loss", "error", "accuracy", "learning_rate", "images_per_second")


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    run: tuple[str, ...] = setting(
        help="Run folder (repeat the flag to compare runs)", group="Curves"
    )
    tag: tuple[str, ...] = setting(
        ("loss", "error"), "Quantity to plot (repeatable)", "Curves", choices=TAGS
    )
    x: str = setting("step", "Horizontal axis", "Curves", choices=("step", "epoch"))
    output: str = setting(
        "curves.png",
        "File to write: .png or .svg",
        "Output",
        pattern=r"(?is).*\.(png|svg)",
        meaning="a file that ends in .png or .svg",
    )


def main(flags: "Flags") -> int:
    """Draws the curves of all runs into one file."""
    from cifar10_resnet.training.history import read_history  # It imports TensorBoard.

    kind = os.path.splitext(flags.output)[1][1:].lower()
    storage.refuse_unwritable_file(flags.output)

    histories = dict(
        zip(_names(flags.run), (_history(run, read_history) for run in flags.run), strict=True)
    )

    # Matplotlib is slow to import, so mistakes are reported first.
    from cifar10_resnet.figures.curves import curves_figure
    from cifar10_resnet.figures.style import encode

    figure = curves_figure(histories, flags.tag, flags.x)
    storage.new_file(flags.output, encode(figure, kind))
    print(f"drew {flags.output}")
    return 0


def _names(runs: Sequence[str]) -> list[str]:
    """Returns the folders' names, with as much of their paths as makes them unique."""
    paths = [os.path.realpath(run).removesuffix(os.sep + "log").split(os.sep) for run in runs]
    if len(set(map(tuple, paths))) < len(paths):
        raise UserError("--run names the same run twice.")
    for parts in itertools.count(1):
        names = [os.sep.join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names


def _history(run: str, read_history: Callable) -> list[dict[str, float]]:
    if not os.path.isdir(run):
        raise UserError("does not exist. Pass a run folder, such as runs/resnet20.", "run", run)
    for log_path in (os.path.join(run, "log"), run):
        if history := read_history(log_path):
            return history
    why = "contains no learning curves. Pass a run folder, such as runs/resnet20."
    raise UserError(why, "run", run)


if __name__ == "__main__":
    app.run(main, Settings)
