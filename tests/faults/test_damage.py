"""Damage to any file of a checkpoint: the run resumes from the previous one and prints why."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

from cifar10_resnet import checkpoints
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.errors import UserError
from cifar10_resnet.training import resume
from cifar10_resnet.training.trainer import Trainer

RUN = RunConfig(
    ModelConfig(num_layers=8), DataConfig("synthetic"), TrainingConfig(batch_size=8, seed=5)
)
FLIPS = 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run's folder with steps 20 and 30, whose values differ. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    trainer = Trainer(RUN)
    for step in (20, 30):
        for variable in trainer.model.variables:
            variable.assign(tf.fill(variable.shape, step / 7))
        trainer.step.assign(step)
        checkpoints.save(trainer.checkpoint, str(folder), step)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def assert_is_skipped(folder: Path, capsys) -> None:
    """Checks that a run resumes from step 20 and names step 30, which the evaluator refuses."""
    run, _, prefix = resume.prepare_run({}, str(folder))
    assert prefix.endswith("/model.ckpt-20")
    assert run == RUN
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Skipped a damaged checkpoint: ")
    assert "/model.ckpt-30" in line
    with pytest.raises(UserError, match=r"model\.ckpt-30"):
        checkpoints.find(str(folder / "model.ckpt-30"))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda file, other: file.write_bytes(b""),
    "cut to a byte": lambda file, other: os.truncate(file, 1),
    "cut to a tenth": lambda file, other: os.truncate(file, file.stat().st_size // 10),
    "cut in half": lambda file, other: os.truncate(file, file.stat().st_size // 2),
    "cut near its end": lambda file, other: os.truncate(file, file.stat().st_size * 19 // 20),
    "a byte short": lambda file, other: os.truncate(file, file.stat().st_size - 1),
    "another step's": lambda file, other: shutil.copy(other, file),
    "missing": lambda file, other: file.unlink(),
    "a folder": lambda file, other: (file.unlink(), file.mkdir()),
    "zeros": lambda file, other: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", checkpoints.SUFFIXES)
def test_a_damaged_file_is_reported_and_the_checkpoint_before_it_used(folder, part, damage, capsys):
    DAMAGES[damage](*(folder / f"model.ckpt-{step}{part}" for step in (30, 20)))
    if (part, damage) in ((".sha256", "missing"), (".sha256", "a byte short")):
        # the values themselves are whole, and are known to be
        assert checkpoints.find(str(folder)).prefix == str(folder / "model.ckpt-30")
    else:
        assert_is_skipped(folder, capsys)


@pytest.mark.parametrize("part", checkpoints.SUFFIXES)
def test_a_file_that_may_not_be_read_is_reported(folder, part, capsys, monkeypatch, as_nobody):
    (folder / f"model.ckpt-30{part}").chmod(0)
    # from within, as the folders above pytest's are closed to anybody else
    monkeypatch.chdir(folder)
    with as_nobody():
        assert_is_skipped(Path("."), capsys)


def test_any_bit_flipped_in_any_file_is_found_or_changes_nothing(folder):
    rng = random.Random(0)
    harmless = 0
    for _ in range(FLIPS):
        file = folder / f"model.ckpt-30{rng.choice(checkpoints.SUFFIXES)}"
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        newest, problems = checkpoints.newest_intact(str(folder))
        if newest.endswith("model.ckpt-30"):
            harmless += 1
            assert file.suffix == ".sha256", "a name or a blank among the digests"
        else:
            assert newest.endswith("model.ckpt-20")
            assert "model.ckpt-30" in problems[0]
        file.write_bytes(whole)
    assert harmless < FLIPS // 6


def test_without_digests_a_flipped_bit_in_the_values_is_found_by_their_own_checksums(folder):
    (folder / "model.ckpt-30.sha256").unlink()
    file = folder / "model.ckpt-30.data-00000-of-00001"
    whole, rng = file.read_bytes(), random.Random(1)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert checkpoints.newest_intact(str(folder))[0].endswith("model.ckpt-20")


def test_a_copy_under_way_never_counts_as_whole(saved, tmp_path):
    rng = random.Random(2)
    names = sorted(os.listdir(saved))
    orders = [names, names[::-1], *(rng.sample(names, len(names)) for _ in range(4))]
    for i, order in enumerate(orders):
        copy = tmp_path / str(i)
        copy.mkdir()
        for name in order:
            data = (saved / name).read_bytes()
            for share in (0, 0.5, 0.99, 1):
                (copy / name).write_bytes(data[: int(len(data) * share)])
                newest, reasons = checkpoints.newest_intact(str(copy))
                if (copy / checkpoints.STATE).exists() and share == 1:
                    assert newest or reasons, "a training would begin anew amid the copies"
                if newest:
                    found = checkpoints.read(newest)
                    step, model = found.step, checkpoints.load(found)
                    assert {float(v) for v in model.trainable_variables[0].numpy().flat} == {
                        float(tf.constant(step / 7))
                    }
        assert checkpoints.find(str(copy)).prefix == str(copy / "model.ckpt-30")


def tampered(folder: Path, step: object, **edited: object) -> str:
    """Writes a checkpoint that is whole, but whose description or step was changed."""
    parts = json.loads(RUN.to_json())
    for part, fields in edited.items():
        parts[part].update(fields)
    description = tf.Variable(json.dumps(parts))
    checkpoint = tf.train.Checkpoint(
        step=tf.Variable(step, dtype=tf.int64), description=description
    )
    return checkpoints.save(checkpoint, str(folder), 10)


@pytest.mark.parametrize(
    ("step", "edited", "why"),
    [
        (10, {"data": {"class_names": ["a", "b", "c"]}}, "3 class names for 10 classes"),
        (10, {"model": {"num_layers": 6_000_002}}, "must be a whole number, 1 to 2,000"),
        (10, {"model": {"num_classes": 10**9}}, "must be a whole number, 2 to 256"),
        (-1, {}, "its step is -1"),
        (10**12, {}, "its step is 1000000000000"),
        ([1, 2], {}, "is damaged"),
    ],
)
def test_a_tampered_description_or_step_is_a_one_line_error(tmp_path, step, edited, why):
    prefix = tampered(tmp_path / "run", step, **edited)
    with pytest.raises(UserError, match=why) as refused:
        checkpoints.find(prefix)
    assert "\n" not in str(refused.value)
