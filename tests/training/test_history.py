"""Event files: what TensorFlow wrote is read without it, however a run was interrupted."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar10_resnet.errors import UserError
from cifar10_resnet.training.history import read_history


def write(log: Path, writer: str, rows: dict[int, dict[str, float]]) -> Path:
    """A new event file with those scalars of each step."""
    folder = log / writer
    before = set(folder.glob("*"))
    events = tf.summary.create_file_writer(str(folder))
    with events.as_default():
        for step, values in rows.items():
            for tag, value in values.items():
                tf.summary.scalar(tag, value, step=step)
    events.close()
    (file,) = set(folder.glob("*")) - before
    return file


def test_the_scalars_are_those_that_tensorboard_reads(tmp_path):
    rng = np.random.default_rng(0)
    written = {step: {"loss": rng.random(), "accuracy": rng.random()} for step in (10, 20, 25)}
    write(tmp_path, "train", written)
    write(tmp_path, "eval", {20: {"loss": 0.5}})
    history = read_history(str(tmp_path))
    assert [row["step"] for row in history] == [10, 20, 25]
    assert history[1].keys() == {"step", "train_loss", "train_accuracy", "eval_loss"}
    events = EventAccumulator(str(tmp_path / "train"), {"tensors": 0})
    events.Reload()
    for tag in ("loss", "accuracy"):
        expected = {e.step: float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}
        assert {row["step"]: row[f"train_{tag}"] for row in history} == expected


def test_where_a_resumed_run_repeated_steps_the_later_values_count(tmp_path):
    first = write(tmp_path, "train", {10: {"loss": 4.0}, 20: {"loss": 3.0}, 30: {"loss": 2.5}})
    second = write(tmp_path, "train", {20: {"loss": 2.0}, 40: {"loss": 1.0}})
    # as they are named when they were begun at different seconds
    first.rename(first.with_name("events.out.tfevents.1700000000.host.1.0.v2"))
    second.rename(second.with_name("events.out.tfevents.1700000100.host.2.0.v2"))
    losses = {row["step"]: row["train_loss"] for row in read_history(str(tmp_path))}
    assert losses == {10: 4.0, 20: 2.0, 30: 2.5, 40: 1.0}


def test_what_is_not_a_scalar_is_skipped(tmp_path):
    events = tf.summary.create_file_writer(str(tmp_path / "eval"))
    with events.as_default(step=5):
        tf.summary.image("mistakes", np.zeros((2, 4, 4, 3), np.uint8))
        tf.summary.text("command", "python")
        tf.summary.histogram("weights", np.arange(9.0))
        tf.summary.scalar("loss", 0.25)
    events.close()
    assert read_history(str(tmp_path)) == [{"step": 5, "eval_loss": 0.25}]


def test_the_record_that_a_killed_run_left_unfinished_is_left_out(tmp_path):
    file = write(tmp_path, "train", {10: {"loss": 4.0}, 20: {"loss": 3.0}})
    whole = file.read_bytes()
    lengths = set()
    for missing in range(1, 40):
        file.write_bytes(whole[:-missing])
        lengths.add(len(read_history(str(tmp_path))))
    assert lengths == {1}


def test_a_damaged_file_is_refused_with_a_one_line_error(tmp_path):
    file = write(tmp_path, "train", {10: {"loss": 4.0}})
    whole = file.read_bytes()
    of_tensor = whole.index(b"loss") + whole[whole.index(b"loss") :].index(b"\x08\x01") + 1
    for place, damage in ((slice(12, 20), b"\xff" * 8), (slice(of_tensor, of_tensor + 1), b"\0")):
        damaged = bytearray(whole)
        damaged[place] = damage
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="is not an intact event file") as refused:
            read_history(str(tmp_path))
        assert str(file) in str(refused.value)


def test_a_folder_without_event_files_has_no_history(tmp_path):
    (tmp_path / "train").mkdir()
    assert read_history(str(tmp_path)) == []
    assert read_history(str(tmp_path / "[none]")) == []
