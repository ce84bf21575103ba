"""Evaluates checkpoints and prints accuracy, loss and calibration.

python run_evaluator.py --path=cifar-10-batches-bin --ckpt_path=runs/resnet20
"""

import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone

from absl import flags

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.cli import flags as command_line
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.data import dataset
from cifar10_resnet.device import resolve_data_format, start_tensorflow
from cifar10_resnet.terminal import table

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(command_line)
flags.DEFINE_string("ckpt_path", None, "A checkpoint's prefix, or a folder: its newest checkpoint.")
flags.DEFINE_alias("model_dir", "ckpt_path")
flags.DEFINE_enum(
    "split", "test", ["train", "holdout", "test"], "Images to score; train is without the holdout."
)
flags.DEFINE_bool("all_checkpoints", False, "Score every checkpoint of the folder in turn.")
flags.DEFINE_integer(
    "batch_size", 500, "Images at a time; changes nothing but speed.", lower_bound=1
)
flags.DEFINE_string("output_json", None, "File to write the figures to.")
flags.DEFINE_string("report", None, "HTML file to write the figures to, with pictures.")
flags.DEFINE_string("plot_dir", None, "Folder to write the pictures to, as PNG files.")
for name in (*command_line.DATA_FLAGS, *command_line.NETWORK_FLAGS):
    FLAGS.set_default(name, None)  # the checkpoint tells
flags.mark_flag_as_required("ckpt_path")

FLAG_GROUPS = {
    "What to score": ("ckpt_path", "all_checkpoints"),
    "On which images": ("path", *command_line.DATA_FLAGS, "split"),
    "Network, checked against the checkpoint": command_line.NETWORK_FLAGS,
    "Output": ("output_json", "report", "plot_dir", "quiet", "verbose"),
    "Computing": ("device", "data_format", "dtype", "loss_scale", "batch_size"),
}


@flags.multi_flags_validator(
    ["all_checkpoints", "report", "plot_dir"],
    "--report and --plot_dir show one checkpoint: give them without --all_checkpoints",
)
def _one_is_shown(values: dict[str, object]) -> bool:
    return not (values["all_checkpoints"] and (values["report"] or values["plot_dir"]))


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    for file in (FLAGS.output_json, FLAGS.report):
        if file:
            storage.refuse_unwritable_file(file)
    if FLAGS.plot_dir:
        storage.make_folder(FLAGS.plot_dir)
    data = dataset.find_asked(FLAGS.path, FLAGS.dataset)
    if FLAGS.report or FLAGS.plot_dir:
        # Imported early: if Matplotlib is missing, that is told before the evaluation.
        import cifar10_resnet.figures.style  # noqa: F401

    device = start_tensorflow(FLAGS.device, FLAGS.verbose)
    from cifar10_resnet import checkpoints
    from cifar10_resnet.evaluation import evaluator

    newest = checkpoints.find(FLAGS.ckpt_path)
    prefixes = [newest]
    if FLAGS.all_checkpoints:
        prefixes = [prefix for _, prefix in checkpoints.list_checkpoints(os.path.dirname(newest))]
        for prefix in prefixes:
            checkpoints.verify(prefix)
    data_format = resolve_data_format(FLAGS.data_format, FLAGS.dtype, device)
    scores = []
    with command_line.quiet_work() as stdout:
        for scored in evaluator.score_checkpoints(
            prefixes,
            data,
            FLAGS.split,
            data_format,
            FLAGS.dtype,
            FLAGS.batch_size,
            command_line.given_network() | command_line.given_flags(command_line.DATA_FLAGS),
        ):
            if FLAGS.verbose:
                print(table(scored.run.settings().items()))
            print(scored.line() if FLAGS.quiet else scored.report(), file=stdout, flush=True)
            scores.append(scored.as_json())
    if FLAGS.output_json:
        told = scores if FLAGS.all_checkpoints else scores[0]
        storage.new_file(FLAGS.output_json, (json.dumps(told, indent=2) + "\n").encode())
    if FLAGS.report or FLAGS.plot_dir:
        with command_line.quiet_work():
            _draw(scored, f"{FLAGS.dtype}, {data_format}, on a {device.upper()}")
    return 0


def _draw(scored, computed_in: str) -> None:
    """Writes the pictures of an evaluation, and the page that shows them."""
    from cifar10_resnet.figures.evaluation import evaluation_figures
    from cifar10_resnet.figures.style import figure_to_png

    names = scored.run.data.class_names
    figures = evaluation_figures(scored.metrics, scored.images, names)
    pictures = {name: figure_to_png(figure) for name, figure in figures.items()}
    if FLAGS.plot_dir:
        for name, picture in pictures.items():
            file = os.path.join(FLAGS.plot_dir, f"{name}.png")
            storage.new_file(file, picture)
            print(f"drew {file}")
    if FLAGS.report:
        import numpy as np
        import tensorflow as tf

        from cifar10_resnet.evaluation import report

        made = {
            "evaluated": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join(["python", *sys.argv]),
            "computed in": computed_in,
            "versions": f"Python {platform.python_version()}, TensorFlow {tf.__version__}, "
            f"NumPy {np.__version__}",
            "machine": platform.platform(),
        }
        page = report.html(scored, pictures, made)
        storage.new_file(FLAGS.report, page.encode())
        print(f"wrote {FLAGS.report}")


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS)
