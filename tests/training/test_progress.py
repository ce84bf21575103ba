"""The live line on terminals of any width, and the plain lines elsewhere."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import numpy as np
import pytest

from cifar10_resnet.config import RunConfig
from cifar10_resnet.evaluation.metrics import Metrics
from cifar10_resnet.training.progress import Progress

END = "\x03"  # marks the end of what a test reads from a terminal


def metrics(right: int, count: int = 10) -> Metrics:
    labels = np.zeros(count, np.int32)
    predictions = np.where(np.arange(count) < right, 0, 1)
    return Metrics(0.5, 1.0, labels, predictions, np.full(count, 0.9), 10)


@pytest.fixture
def terminal(monkeypatch):
    """Replaces stdout by a terminal. Returns a function that reads its output."""
    here, there = pty.openpty()

    def of(columns: int):
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        monkeypatch.setattr(sys, "stdout", os.fdopen(os.dup(there), "w"))

        def read() -> str:
            print(END, end="", flush=True)
            got = b""
            while not got.endswith(END.encode()):
                got += os.read(here, 1 << 20)
            return got.decode().removesuffix(END)

        return read

    yield of
    os.close(here)
    os.close(there)


@pytest.mark.parametrize(
    ("columns", "told", "dropped"),
    [
        (160, ["loss 1.235", "accuracy 54.3%", "images/s", "epoch 31.25", "lr 0.1"], []),
        (100, ["loss 1.235", "accuracy 54.3%", "images/s", "epoch 31.25"], ["lr"]),
        (80, ["loss 1.235", "accuracy 54.3%", "1,000 images/s"], ["epoch", "lr"]),
        (60, ["loss 1.235"], ["images/s", "epoch", "lr"]),
        (40, ["12500/64000"], ["accuracy", "images/s"]),
    ],
)
def test_the_live_line_keeps_to_its_terminal_and_drops_the_least_important_first(
    terminal, tmp_path, monkeypatch, columns, told, dropped
):
    read, now = terminal(columns), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress(RunConfig(), 12_000, 64_000, 400, str(tmp_path)) as progress:
        assert not progress.is_due()
        now[0] = 64.0  # 500 steps of 128 images: 1,000 images/s
        read()
        progress.update(12_500, 1.23456, 0.54321, 0.1)
        shown = read()
        progress.write("a line of the log")
        log = read()
    drawn = [line for line in re.split(r"[\r\n]", shown) if line.strip()]
    assert len(drawn) == 1
    assert len(drawn[0]) <= columns
    assert re.match(r" 20% #*\.+ ", drawn[0])
    assert " 12500/64000, left 1:49:52" in drawn[0]
    for part in told:
        assert part in drawn[0]
    for part in dropped:
        assert part not in drawn[0]
    # The line of the log is whole, and the live line is drawn again below it.
    lines = [line.strip() for line in re.split(r"[\r\n]+", log)]
    assert "a line of the log" in lines
    assert drawn[0].strip() in lines


@pytest.mark.parametrize(
    ("columns", "last"),
    [(120, "lr 0.1235"), (80, r"images/s \d+"), (60, "accuracy 54.3%")],
)
def test_a_line_of_the_log_is_no_longer_than_its_terminal(terminal, tmp_path, columns, last):
    read = terminal(columns)
    with Progress(RunConfig(), 12_000, 64_000, 400, str(tmp_path)) as progress:
        progress.log_training(12_500, 1.23456, 0.54321, 0.123456, dict)
        lines = [line.strip() for line in re.split(r"[\r\n]+", read())]
    (line,) = (
        line for line in lines if re.match(r"step 12500/64000 left \d+:\d\d:\d\d loss 1.2346", line)
    )
    assert len(line) <= columns
    assert re.search(f"{last}$", line)


def test_elsewhere_nothing_moves(tmp_path, capsys):
    with Progress(RunConfig(), 0, 100, 50, str(tmp_path)) as progress:
        assert not progress.is_due()
        progress.log_training(40, 1.5, 0.25, 0.1, dict)
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"step 40/100 left \d+:\d\d:\d\d loss 1.5000 accuracy 25.0% images/s \d+ "
        r"epoch 0.80 lr 0.1\n",
        out,
    )
    assert err == ""


def test_the_results_are_those_of_the_whole_run_whatever_was_interrupted(tmp_path):
    images = np.zeros([10, 32, 32, 3], np.uint8)
    with Progress(RunConfig(), 0, 100, 50, str(tmp_path)) as progress:
        progress.log_evaluation(10, "test", metrics(right=6))
        progress.log_evaluation(20, "test", metrics(right=8))
        progress.log_evaluation(60, "test", metrics(right=9))
    # resumed from step 40: what came after it never was
    with Progress(RunConfig(), 40, 100, 50, str(tmp_path)) as progress:
        progress.log_training(50, 1.5, 0.25, 0.1, dict)
        progress.log_evaluation(50, "test", metrics(right=7))
        summary = progress.finish(50, "runs/a b/model.ckpt-50", images)
    assert summary["best accuracy"] == "80.00% on test images, step 20"
    assert summary["last accuracy"] == "70.00% on test images, step 50"
    assert summary["training"] == "loss 1.5000, accuracy 25.00% on augmented images, last 10 steps"
    assert summary["saved as"] == "runs/a b/model.ckpt-50"
    assert summary["time"].endswith(" for 10 steps")
    assert str(tmp_path) in summary["curves"]


def test_the_training_loss_in_the_table_is_a_mean_over_200_steps_however_often_they_are_logged(
    tmp_path,
):
    with Progress(RunConfig(), 0, 330, 50, str(tmp_path)) as progress:
        for step, loss in ((100, 8.0), (200, 4.0), (300, 2.0), (330, 1.0)):
            progress.log_training(step, loss, loss / 8, 0.1, dict)
        summary = progress.finish(330, "model.ckpt-330", None)
    # The last 230 steps: (100 x 4 + 100 x 2 + 30 x 1) / 230 = 2.7391, and an eighth is 0.3424.
    assert summary["training"] == "loss 2.7391, accuracy 34.24% on augmented images, last 230 steps"


def test_a_damaged_event_file_of_an_earlier_start_is_no_reason_to_fail_at_the_end(tmp_path):
    (tmp_path / "eval").mkdir()
    record = b"\x08\x00\x00\x00\x00\x00\x00\x00" + b"\xff" * 16
    (tmp_path / "eval" / "events.out.tfevents.0").write_bytes(record)
    with Progress(RunConfig(), 0, 100, 50, str(tmp_path)) as progress:
        progress.log_evaluation(50, "test", metrics(right=7))
        images = np.zeros([10, 32, 32, 3], np.uint8)
        summary = progress.finish(50, "model.ckpt-50", images)
    assert summary["best accuracy"].startswith("70.00%")


def test_a_run_without_evaluations_reports_only_its_training(tmp_path):
    with Progress(RunConfig(), 0, 100, 50, str(tmp_path)) as progress:
        progress.log_training(100, 1.5, 0.25, 0.1, dict)
        assert list(progress.finish(100, "x", None)) == ["training", "time", "saved as", "curves"]
