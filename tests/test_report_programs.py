"""`run_evaluator.py --report` and `plot_runs.py` as their users run them."""

import json
from pathlib import Path

import pytest
import tensorflow as tf
from conftest import random_images
from PIL import Image
from programs import PROJECT, error_of, run, run_code

from cifar10_resnet import checkpoints
from cifar10_resnet.config import ModelConfig, RunConfig
from cifar10_resnet.training.trainer import Trainer


def write_events(folder: Path, scale: float) -> None:
    for writer in ("train", "eval"):
        events = tf.summary.create_file_writer(str(folder / writer))
        with events.as_default():
            for step in (10, 20, 30):
                tf.summary.scalar("loss", scale / step, step=step)
                tf.summary.scalar("accuracy", 1 - scale / 10 / step, step=step)
                tf.summary.scalar("epoch", step / 100, step=step)
        events.close()


# --- The evaluator's report -----------------------------------------------------------------------


def test_the_evaluator_writes_its_report_and_its_pictures(tmp_path, write_cifar10):
    write_cifar10(test=random_images(40))
    checkpoint = Trainer(RunConfig(ModelConfig(num_layers=8))).checkpoint
    checkpoints.save(checkpoint, str(tmp_path / "run"), 0)
    wanted = ("--report=r.html", "--plot_dir=new/plots", "--output_json=s.json")
    command = ("run_evaluator.py", "--ckpt_path=run", f"--path={tmp_path}", *wanted)
    out = run(*command, cwd=tmp_path).stdout
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    score = json.loads((tmp_path / "s.json").read_text())
    for told in (f"{100 * score['accuracy']:.2f} %", *wanted, tf.__version__, "fp32"):
        assert told in page
    assert 0 <= score["expected_calibration_error"] <= 1
    assert score["accuracy_interval"][0] <= score["accuracy"] <= score["accuracy_interval"][1]
    pictures = sorted(path.name for path in (tmp_path / "new" / "plots").iterdir())
    assert pictures == [
        *("class_accuracy.png", "confusion_matrix.png", "mistakes.png", "reliability.png"),
    ]
    for name in pictures:
        assert f"drew new/plots/{name}" in out
        with Image.open(tmp_path / "new" / "plots" / name) as picture:
            assert picture.width == 1800
    assert "wrote r.html" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        *("cifar-10-batches-bin", "run", "r.html", "s.json", "new"),
    }


def test_files_that_cannot_be_written_are_refused_before_the_evaluation(tmp_path):
    (tmp_path / "file").touch()
    for flag, told in (
        ("--report=none/r.html", "folder that does not exist"),
        ("--report=.", "is a folder"),
        ("--output_json=none/s.json", "folder that does not exist"),
        ("--plot_dir=file", "cannot create the folder file"),
    ):
        # nothing is at --ckpt_path either, which would be told later
        assert told in error_of("run_evaluator.py", "--ckpt_path=none", flag, cwd=tmp_path)


def test_a_report_is_of_one_checkpoint(tmp_path):
    flags = ("--ckpt_path=.", "--all_checkpoints", "--report=r.html")
    refused = error_of("run_evaluator.py", *flags, cwd=tmp_path)
    assert "--report and --plot_dir show one checkpoint" in refused


# --- Learning curves ------------------------------------------------------------------------------

WITHOUT_TENSORFLOW = """
import sys
import plot_runs
from absl import app, flags
flags.FLAGS(["plot_runs.py", "--run=a", "--run=b/run", "--output=out.png"])
assert plot_runs.main(["plot_runs.py"]) == 0
assert "tensorflow" not in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""


def test_curves_are_drawn_without_tensorflow(tmp_path):
    write_events(tmp_path / "a" / "log", 3)
    write_events(tmp_path / "b" / "run", 4)  # a --train_log_path
    run_code(WITHOUT_TENSORFLOW, cwd=tmp_path, env={"PYTHONPATH": str(PROJECT)})
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 1800


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("a/x/log", "b/x/log", "b/y/log"):
        write_events(tmp_path / name, 3)
    runs = ("--run=a/x", "--run=b/x/log", "--run=b/y/")
    flags = (*runs, "--output=c.svg", "--tag=loss", "--x=epoch")
    assert run("plot_runs.py", *flags, cwd=tmp_path).stdout == "drew c.svg\n"
    words = [f"<!-- {name} -->" for name in ("a/x", "b/x", "b/y", "epoch", "Learning curves")]
    drawn = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert all(word in drawn for word in words)
    assert "<!-- error -->" not in drawn


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--run=none"], "there is no folder none"),
        (["--run=empty"], "there are no curves in empty"),
        (["--run=a", "--run=empty"], "there are no curves in empty"),
        (["--run=a", "--run=./a/log"], "the same run twice"),
        (["--run=a", "--output=c.pdf"], "must end in .png or .svg"),
        (["--run=a", "--output=none/c.png"], "folder that does not exist"),
        (["--run=a", "--tag=learning_rate"], "say nothing of learning_rate"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(tmp_path, flags, told):
    write_events(tmp_path / "a" / "log", 3)
    (tmp_path / "empty" / "log" / "train").mkdir(parents=True)
    assert told in error_of("plot_runs.py", *flags, cwd=tmp_path)
    assert not list(tmp_path.glob("c*"))
