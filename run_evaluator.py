"""Scores checkpoints of a ResNet. `python run_evaluator.py --help` lists the flags."""

import contextlib
import json
import os

from absl import app, flags

import command_line
from device import start_tensorflow
from errors import UserError, exits_with_a_sentence

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
flags.mark_flag_as_required("ckpt_path")


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if FLAGS.output_json and not os.path.isdir(os.path.dirname(FLAGS.output_json) or "."):
        raise UserError(f"--output_json={FLAGS.output_json} is in a folder that does not exist.")

    device = start_tensorflow(FLAGS.device)
    import checkpoints
    import evaluation
    from resnet_model import resolve_data_format

    newest = checkpoints.find(FLAGS.ckpt_path)
    prefixes = [newest]
    if FLAGS.all_checkpoints:
        prefixes = [prefix for _, prefix in checkpoints.list_checkpoints(os.path.dirname(newest))]
        for prefix in prefixes:
            checkpoints.verify(prefix)
    scores = []
    for scored in evaluation.score_checkpoints(
        prefixes,
        FLAGS.path,
        FLAGS.split,
        resolve_data_format(FLAGS.data_format, FLAGS.dtype, device),
        FLAGS.dtype,
        FLAGS.batch_size,
        command_line.given_network() | command_line.given_flags(command_line.DATA_FLAGS),
    ):
        print(scored.report(), flush=True)
        scores.append(scored.as_json())
    if FLAGS.output_json:
        _write_json(FLAGS.output_json, scores if FLAGS.all_checkpoints else scores[0])
    return 0


def _write_json(file: str, value: object) -> None:
    try:
        with open(file + ".new", "w") as new:
            json.dump(value, new, indent=2)
            new.write("\n")
        os.replace(file + ".new", file)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(file + ".new")
        raise UserError(f"cannot write {file}: {error.strerror}.") from error


if __name__ == "__main__":
    app.run(main)
