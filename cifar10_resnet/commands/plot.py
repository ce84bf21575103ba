"""Plots learning curves.

python -m cifar10_resnet plot --run=runs
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
        help="Run folder, or a folder of run folders (repeatable)", group="Curves"
    )
    tag: tuple[str, ...] = setting(
        ("loss", "accuracy"), "Quantity to plot (repeatable)", "Curves", choices=TAGS
    )
    x: str = setting("epoch", "Horizontal axis", "Curves", choices=("epoch", "step"))
    output: str = setting(
        "curves.png",
        "File to write: .png, .svg or .pdf",
        "Output",
        pattern=r"(?is).*\.(png|svg|pdf)",
        meaning="a file that ends in .png, .svg or .pdf",
    )


def main(flags: "Flags") -> int:
    """Draws the curves of all runs into one file."""
    from cifar10_resnet.training.history import read_history  # It imports TensorBoard.

    storage.refuse_unwritable_file(flags.output)

    found = [pair for run in flags.run for pair in _histories(run, read_history)]
    names = [
        # A folder's name may contain bytes that are not text. No font can show them.
        name.encode(errors="backslashreplace").decode()
        for name in _names([run for run, _ in found])
    ]
    histories = dict(zip(names, (history for _, history in found), strict=True))

    # Matplotlib is slow to import, so mistakes are reported first.
    from cifar10_resnet.figures.curves import curves_figure
    from cifar10_resnet.figures.style import encode, ending

    figure = curves_figure(histories, flags.tag, flags.x)
    storage.new_file(flags.output, encode(figure, ending(flags.output)))
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


def _histories(folder: str, read: Callable) -> list[tuple[str, list[dict[str, float]]]]:
    """Returns a run folder with its history, or each run in a folder with its history."""
    if not os.path.isdir(folder):
        why = "does not exist. Pass a run folder, such as runs/resnet20."
        raise UserError(why, "run", folder)
    if history := _history(folder, read):
        return [(folder, history)]
    inside = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    if found := [(run, history) for run in inside if (history := _history(run, read))]:
        return found
    why = "contains no learning curves. Pass a run folder, such as runs/resnet20."
    raise UserError(why, "run", folder)


def _history(run: str, read: Callable) -> list[dict[str, float]]:
    """Returns a run's history. `run` is its folder, or the folder of its event files."""
    return read(os.path.join(run, "log")) or read(run)


if __name__ == "__main__":
    app.run(main, Settings)
