"""Fuzzes the trainer's flags in a separate process.

Started by test_fuzz.py, in a folder with a small CIFAR-10.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from absl import flags
from fuzzing import fuzzed, result_or_sentence
from hypothesis import example, given
from hypothesis import strategies as st

import run_trainer
from cifar10_resnet.cli.flags import Flags, items_of
from cifar10_resnet.config import training_config

NAMES = sorted(item.name for item in items_of(run_trainer.Settings))
VALUES = st.sampled_from(
    ["nan", "inf", "-inf", "-1", "0", "1", "1e308", "1e-320", "9" * 40, "", "true", "None", "paper"]
) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
FLAGS = st.lists(st.tuples(st.sampled_from(NAMES), VALUES).map(lambda f: f"--{f[0]}={f[1]}"))


class Reached(Exception):
    """All checks before the import of TensorFlow have passed."""


def parse(arguments: list[str]) -> None:
    read = Flags(run_trainer.Settings, ["run_trainer.py", *arguments]).parse()

    def reached(*arguments: object, **keywords: object) -> None:
        given = read.given(run_trainer.Settings)
        raise Reached(given, training_config(given))

    run_trainer.device.start_tensorflow = reached
    run_trainer.main(read)


@fuzzed
@given(FLAGS)
@example(["--train_epochs=inf"])
@example(["--init_lr=nan"])
@example(["--seed=" + "9" * 40])
@example(["--export_dir=\x1b"])
def refused_by_name_or_make_a_run(arguments: list[str]) -> None:
    try:
        result_or_sentence(parse, arguments)
    except flags.Error:
        pass
    except Reached as good:
        ranges, training = good.args
        assert all(np.isfinite(v) for v in ranges.values() if isinstance(v, float))
        assert training.num_iterations >= 1


if __name__ == "__main__":
    refused_by_name_or_make_a_run()
