"""Plots learning curves.

python -m cifar10_resnet plot --run=runs/resnet20 --run=runs/plain20
"""

import itertools
import os

from absl import flags

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.errors import UserError
from cifar10_resnet.training.history import read_history

KINDS = ("png", "svg")
TAGS = ("loss", "error", "accuracy", "learning_rate", "images_per_second")

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("run", None, "Folder of a run, or of its event files; repeatable.")
flags.DEFINE_string("output", "curves.png", "Picture to write: .png or .svg.")
flags.DEFINE_multi_enum("tag", ["loss", "error"], TAGS, "What to draw; repeatable.")
flags.DEFINE_enum("x", "step", ["step", "epoch"], "What to draw it over.")
flags.mark_flag_as_required("run")

FLAG_GROUPS = {"What to draw": ("run", "tag", "x"), "Where to": ("output",)}


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    kind = os.path.splitext(FLAGS.output)[1][1:].lower()
    if kind not in KINDS:
        raise UserError(f"--output={FLAGS.output} must end in .png or .svg.")
    storage.refuse_unwritable_file(FLAGS.output)

    histories = dict(zip(_names(FLAGS.run), map(_history, FLAGS.run), strict=True))

    # Matplotlib is slow to import, so mistakes are told before.
    from cifar10_resnet.figures.curves import curves_figure
    from cifar10_resnet.figures.style import encode

    figure = curves_figure(histories, FLAGS.tag, FLAGS.x)
    storage.new_file(FLAGS.output, encode(figure, kind))
    print(f"drew {FLAGS.output}")
    return 0


def _names(runs: list[str]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    paths = [os.path.realpath(run).removesuffix(os.sep + "log").split(os.sep) for run in runs]
    if len(set(map(tuple, paths))) < len(paths):
        raise UserError("--run names the same run twice.")
    for parts in itertools.count(1):
        names = [os.sep.join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names


def _history(run: str) -> list[dict[str, float]]:
    if not os.path.isdir(run):
        raise UserError(f"there is no folder {run}: name one that run_trainer.py wrote with --run.")
    for log_path in (os.path.join(run, "log"), run):
        if history := read_history(log_path):
            return history
    raise UserError(
        f"there are no curves in {run}: name a run's --ckpt_path or its --train_log_path, which "
        "holds the folders train and eval with TensorBoard's event files."
    )


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS)
