"""Learning curves, plotted as users plot them."""

from pathlib import Path

import pytest
import tensorflow as tf
from PIL import Image
from programs import PROJECT, error_of, run, run_code


def write_events(folder: Path, scale: float) -> None:
    for writer in ("train", "eval"):
        events = tf.summary.create_file_writer(str(folder / writer))
        with events.as_default():
            for step in (10, 20, 30):
                tf.summary.scalar("loss", scale / step, step=step)
                tf.summary.scalar("accuracy", 1 - scale / 10 / step, step=step)
                tf.summary.scalar("epoch", step / 100, step=step)
        events.close()


WITHOUT_TENSORFLOW = """
import sys
from cifar10_resnet.commands import plot
from cifar10_resnet.cli.flags import Flags
flags = Flags(plot.Settings, ["plot", "--run=a", "--run=b/run", "--output=out.png"])
assert plot.main(flags.parse()) == 0
assert "tensorflow" not in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""


def test_curves_are_drawn_without_tensorflow(tmp_path):
    write_events(tmp_path / "a" / "log", 3)
    write_events(tmp_path / "b" / "run", 4)  # a --train_log_path
    run_code(WITHOUT_TENSORFLOW, cwd=tmp_path, env={"PYTHONPATH": str(PROJECT)})
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 1800


def test_runs_of_one_name_are_listed_apart_by_their_folders(tmp_path):
    for name in ("a/x/log", "b/x/log", "b/y/log"):
        write_events(tmp_path / name, 3)
    runs = ("--run=a/x", "--run=b/x/log", "--run=b/y/")
    flags = (*runs, "--output=c.svg", "--tag=loss", "--x=epoch")
    assert run("plot", *flags, cwd=tmp_path).stdout == "drew c.svg\n"
    words = [f"<!-- {name} -->" for name in ("a/x", "b/x", "b/y", "epoch", "Learning curves")]
    drawn = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in words)
    assert "<!-- error -->" not in drawn


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--run is missing. Pass a run folder (repeat the flag to compare runs)."),
        (["--run=none"], "--run=none does not exist"),
        (["--run=empty"], "--run=empty contains no learning curves"),
        (["--run=a", "--run=empty"], "--run=empty contains no learning curves"),
        (["--run=a", "--run=./a/log"], "the same run twice"),
        (["--run=a", "--output=c.pdf"], "it must be a file that ends in .png or .svg."),
        (["--run=a", "--output=none/c.png"], "its folder does not exist"),
        (["--run=a", "--tag=learning_rate"], "say nothing of learning_rate"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_one_line_error(tmp_path, flags, told):
    write_events(tmp_path / "a" / "log", 3)
    (tmp_path / "empty" / "log" / "train").mkdir(parents=True)
    assert told in error_of("plot", *flags, cwd=tmp_path)
    assert not list(tmp_path.glob("c*"))
