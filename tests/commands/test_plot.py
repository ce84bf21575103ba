"""Learning curves, plotted as users plot them."""

import os
from pathlib import Path

import pytest
import tensorflow as tf
from conftest import words_in
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
    flags = (*runs, "--output=c.svg", "--tag=loss")
    assert run("plot", *flags, cwd=tmp_path).stdout == "drew c.svg\n"
    words = [f"<!-- {name} -->" for name in ("a/x", "b/x", "b/y", "epoch", "Learning curves")]
    drawn = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in words)
    assert "<!-- Accuracy -->" not in drawn


def test_a_folder_of_runs_is_drawn_with_a_line_for_each_run_in_it(tmp_path):
    for name in ("runs/plain8", "runs/resnet8", "other"):
        write_events(tmp_path / name / "log", 3)
    (tmp_path / "runs" / "photos").mkdir()  # not a run
    run("plot", "--run=runs", "--run=other", "--output=c.png", cwd=tmp_path)
    labels = {"plain8", "resnet8", "other", "photos", "runs"} & set(words_in(tmp_path / "c.png"))
    assert labels == {"plain8", "resnet8", "other"}


def test_the_plot_is_a_pdf_if_the_file_ends_so_and_is_the_same_each_time(tmp_path):
    write_events(tmp_path / "a" / "log", 3)
    environment = os.environ | {"MPLBACKEND": "unknown"}  # Nothing is shown on a screen.
    for file in ("one.pdf", "two.PDF", ".pdf"):
        run("plot", "--run=a", f"--output={file}", cwd=tmp_path, env=environment)
    drawn = (tmp_path / "one.pdf").read_bytes()
    assert drawn.startswith(b"%PDF-")
    assert drawn == (tmp_path / "two.PDF").read_bytes() == (tmp_path / ".pdf").read_bytes()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--run is missing. Pass a run folder, or a folder of run folders (repeatable)."),
        (["--run=none"], "--run=none does not exist"),
        (["--run=empty"], "--run=empty contains no learning curves"),
        (["--run=a", "--run=empty"], "--run=empty contains no learning curves"),
        (["--run=a", "--run=./a/log"], "the same run twice"),
        (["--run=.", "--run=a"], "the same run twice"),
        (["--run=a", "--output=c.gif"], "it must be a file that ends in .png, .svg or .pdf."),
        (["--run=a", "--output=none/c.png"], "its folder does not exist"),
        (["--run=a", "--tag=learning_rate"], "say nothing of learning_rate"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_one_line_error(tmp_path, flags, told):
    write_events(tmp_path / "a" / "log", 3)
    (tmp_path / "empty" / "log" / "train").mkdir(parents=True)
    assert told in error_of("plot", *flags, cwd=tmp_path)
    assert not list(tmp_path.glob("c*"))
