"""Evaluates checkpoints and prints accuracy, loss and calibration.

python run_evaluator.py --path=cifar-10-batches-bin --ckpt_path=runs/resnet20
"""

import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import tell
from cifar10_resnet.config import DataConfig, ModelConfig
from cifar10_resnet.data import dataset
from cifar10_resnet.device import resolve_data_format, slowness, start_tensorflow
from cifar10_resnet.errors import UserError
from cifar10_resnet.options import Options, checkpoint
from cifar10_resnet.settings import Checked, same, setting
from cifar10_resnet.terminal import command, quietly, table

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags
    from cifar10_resnet.evaluation.metrics import Scored

WHAT, IMAGES, OUTPUT = "Checkpoints", "Images", "Output"
CHECKED = {"group": "Network, checked against the checkpoint", "shown": "the checkpoint's"}


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    ckpt_path: str = checkpoint(group=WHAT)
    all_checkpoints: bool = setting(False, "Evaluate every checkpoint in the folder", WHAT)
    path: str | None = same(Options, "path", group=IMAGES)
    dataset: str = same(DataConfig, "dataset", group=IMAGES)
    coarse_labels: bool = same(DataConfig, "coarse_labels", group=IMAGES, shown="the checkpoint's")
    split: str = setting(
        "test",
        "Images to evaluate (train: without the holdout)",
        IMAGES,
        choices=("train", "holdout", "test"),
    )
    num_layers: int = same(ModelConfig, "num_layers", **CHECKED)
    shortcut_connections: bool = same(ModelConfig, "shortcut_connections", **CHECKED)
    bottleneck: bool = same(ModelConfig, "bottleneck", **CHECKED)
    resnet_version: int = same(ModelConfig, "resnet_version", **CHECKED)
    output_json: str | None = setting(None, "Write the results to this JSON file", OUTPUT)
    report: str | None = setting(None, "Write an HTML report to this file", OUTPUT)
    plot_dir: str | None = setting(None, "Write the plots to this folder as PNG files", OUTPUT)
    quiet: bool = same(Options, "quiet", group=OUTPUT)
    verbose: bool = same(Options, "verbose", group=OUTPUT)
    device: str = same(Options, "device")
    data_format: str = same(Options, "data_format")
    dtype: str = same(Options, "dtype")
    batch_size: int = setting(
        500, "Images per batch (affects only speed)", "Device and precision", least=1, most=10_000
    )


def main(flags: "Flags") -> int:
    """Evaluates the checkpoint, or all in the folder, and prints and writes the results."""
    if flags.quiet and flags.verbose:
        raise UserError("--quiet and --verbose contradict. Use one of them.")
    if flags.all_checkpoints and (flags.report or flags.plot_dir):
        raise UserError("--report and --plot_dir show one checkpoint. Remove --all_checkpoints.")
    for file in (flags.output_json, flags.report):
        if file:
            storage.refuse_unwritable_file(file)
    if flags.plot_dir:
        storage.make_folder(flags.plot_dir)
    data = dataset.find_asked(flags.path, flags.dataset)
    if flags.report or flags.plot_dir:
        # Imported early, so a missing Matplotlib is reported before the evaluation.
        import cifar10_resnet.figures.style  # noqa: F401

    device = start_tensorflow(flags.device, flags.verbose)
    from cifar10_resnet import checkpoints
    from cifar10_resnet.evaluation import evaluator

    if flags.all_checkpoints:
        saved, problems = checkpoints.find_all(flags.ckpt_path)
    else:
        saved, problems = [checkpoints.find(flags.ckpt_path)], []
    for problem in problems:
        tell(problem)
    data_format = resolve_data_format(flags.data_format, flags.dtype)
    scores = []
    with quietly(flags.quiet) as stdout:
        if slow := slowness(flags.dtype, device):
            print(slow, flush=True)
        for scored in evaluator.score_checkpoints(
            saved,
            data,
            flags.split,
            data_format,
            flags.dtype,
            flags.batch_size,
            flags.given(ModelConfig, DataConfig),
        ):
            if flags.verbose:
                print(table(scored.run.settings().items()))
            print(scored.line() if flags.quiet else scored.report(), file=stdout, flush=True)
            scores.append(scored.as_json())
    if flags.output_json:
        results = scores if flags.all_checkpoints else scores[0]
        storage.new_file(flags.output_json, (json.dumps(results, indent=2) + "\n").encode())
        if not flags.quiet:
            print(f"wrote {flags.output_json}")
    if flags.report or flags.plot_dir:
        with quietly(flags.quiet):
            _draw(flags, scored, f"{flags.dtype}, {data_format}, on a {device.upper()}")
    return 1 if problems else 0


def _draw(flags: "Flags", scored: "Scored", computed_in: str) -> None:
    """Writes the plots of an evaluation, and the report that shows them."""
    from cifar10_resnet.figures.evaluation import evaluation_figures
    from cifar10_resnet.figures.style import figure_to_png

    names = scored.run.data.class_names
    figures = evaluation_figures(scored.metrics, scored.images, names)
    plots = {name: figure_to_png(figure) for name, figure in figures.items()}
    if flags.plot_dir:
        for name, plot in plots.items():
            file = os.path.join(flags.plot_dir, f"{name}.png")
            storage.new_file(file, plot)
            print(f"drew {file}")
    if flags.report:
        import numpy as np
        import tensorflow as tf

        from cifar10_resnet.evaluation import report

        lines = command("run_evaluator.py"), *map(shlex.quote, sys.argv[1:])
        made = {
            "command": " \\\n    ".join(lines),
            "evaluated": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "computed in": computed_in,
            "versions": f"Python {platform.python_version()}, TensorFlow {tf.__version__}, "
            f"NumPy {np.__version__}",
            "machine": platform.platform(),
        }
        page = report.html(scored, plots["calibration"], made)
        storage.new_file(flags.report, page.encode(errors="backslashreplace"))
        print(f"wrote {flags.report}")


if __name__ == "__main__":
    app.run(main, Settings)
