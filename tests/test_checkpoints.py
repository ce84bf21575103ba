"""Checkpoints: whole or not there, damage is found, and what comes back is what was saved."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import contents

from cifar10_resnet import checkpoints
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.errors import UserError
from cifar10_resnet.training import run_folder
from cifar10_resnet.training.trainer import Trainer
from resnet_model import ResNet

RUN = RunConfig(
    ModelConfig(num_layers=8, batch_norm_decay=0.9),
    DataConfig(holdout=7),
    TrainingConfig(num_iterations=100, batch_size=8, seed=5),
)
PARTS = (".index", ".data-00000-of-00001", ".sha256")
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
STEPS = (10, 20, 30)


def stirred_trainer(seed: int) -> Trainer:
    """Returns a trainer in which all variables differ."""
    trainer = Trainer(RUN)
    rng = np.random.default_rng(seed)
    for variable in [*trainer.model.variables, *trainer.optimizer.slots.values()]:
        variable.assign(rng.uniform(0.1, 1.0, variable.shape))
    return trainer


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return stirred_trainer(seed=0)


@pytest.fixture(scope="module")
def saved(trainer, tmp_path_factory) -> Path:
    """A folder with a checkpoint of each of STEPS. Not to be changed: `folder` is a copy."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    weight = trainer.model.trainable_variables[0]
    for step in STEPS:
        weight.assign_add(tf.ones_like(weight))
        trainer.step.assign(step)
        checkpoints.save(trainer.checkpoint, str(directory), step)
    return directory


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def tiny() -> tf.train.Checkpoint:
    """For what does not depend on what is saved."""
    return tf.train.Checkpoint(v=tf.Variable(np.arange(100.0)))


def prefix_of(folder: Path, step: int) -> str:
    return str(folder / f"model.ckpt-{step}")


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints.list_checkpoints(str(folder))]


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as refused:
        function(*args)
    return str(refused.value)


# --- Saving ---------------------------------------------------------------------------------------


def test_a_save_leaves_a_checkpoint_its_digests_and_the_state_file_and_nothing_else(folder):
    expected = [f"model.ckpt-{step}{part}" for step in STEPS for part in PARTS]
    assert sorted(os.listdir(folder)) == sorted([*expected, "checkpoint"])


def test_the_digests_are_a_list_that_sha256sum_checks(folder):
    for step in STEPS:
        command = ["sha256sum", "--check", "--strict", f"model.ckpt-{step}.sha256"]
        checked = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        assert checked.stdout.count(": OK\n") == 2


def test_save_returns_the_prefix_and_makes_the_folder(tiny, tmp_path):
    directory = tmp_path / "runs" / "one"
    prefix = checkpoints.save(tiny, str(directory), 3)
    assert prefix == prefix_of(directory, 3)
    assert checkpoints.newest_intact(str(directory)) == (prefix, [])


def test_tensorflow_finds_the_newest_also_after_the_folder_moved(folder, tmp_path):
    assert tf.train.latest_checkpoint(str(folder)) == prefix_of(folder, 30)
    moved = folder.rename(tmp_path / "elsewhere")
    assert tf.train.latest_checkpoint(str(moved)) == prefix_of(moved, 30)
    assert checkpoints.find(str(moved)).prefix == prefix_of(moved, 30)


def test_steps_are_ordered_as_numbers(tiny, tmp_path):
    for step in (9, 100, 1000):
        checkpoints.save(tiny, str(tmp_path), step)
    assert steps_in(tmp_path) == [9, 100, 1000]
    assert tf.train.latest_checkpoint(str(tmp_path)) == prefix_of(tmp_path, 1000)


@pytest.mark.parametrize(
    ("max_to_keep", "kept"),
    [(-1, [1, 2, 3, 4, 5]), (2, [4, 5]), (1, [5]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])],
)
def test_the_newest_few_are_kept_and_a_negative_number_keeps_all(tiny, tmp_path, max_to_keep, kept):
    for step in range(1, 6):
        checkpoints.save(tiny, str(tmp_path), step, max_to_keep)
    assert steps_in(tmp_path) == kept
    files = [f"model.ckpt-{step}{part}" for step in kept for part in PARTS]
    assert sorted(os.listdir(tmp_path)) == sorted([*files, "checkpoint"])
    state = tf.train.get_checkpoint_state(str(tmp_path))
    assert list(state.all_model_checkpoint_paths) == [prefix_of(tmp_path, step) for step in kept]


@pytest.mark.parametrize("max_to_keep", [1, 2])
def test_what_was_just_saved_outlives_a_newer_damaged_one(tiny, tmp_path, max_to_keep):
    # after falling back from a damaged step 1000 to step 500, the next save may well be step 600
    for step in (500, 1000):
        checkpoints.save(tiny, str(tmp_path), step)
    os.truncate(prefix_of(tmp_path, 1000) + ".data-00000-of-00001", 5)
    saved = checkpoints.save(tiny, str(tmp_path), 600, max_to_keep)
    newest, _ = checkpoints.newest_intact(str(tmp_path))
    assert newest == saved


def test_a_damaged_checkpoint_is_replaced_by_saving_its_step_again(folder, trainer):
    os.truncate(prefix_of(folder, 30) + ".index", 7)
    trainer.step.assign(30)
    checkpoints.save(trainer.checkpoint, str(folder), 30)
    assert checkpoints.newest_intact(str(folder)) == (prefix_of(folder, 30), [])


def test_an_intact_checkpoint_that_came_in_from_elsewhere_is_not_deleted_by_a_save(folder, tiny):
    before = contents(folder)
    text = refusal(checkpoints.save, tiny, str(folder), 15, 1)
    assert f"{prefix_of(folder, 20)} appeared while this run was at step 15" in text
    assert contents(folder) == before


def test_the_same_run_saves_the_same_bytes_wherever_and_whenever(trainer, tmp_path):
    folders = tmp_path / "one", tmp_path / "a" / "longer path"
    for folder in folders:
        checkpoints.save(trainer.checkpoint, str(folder), 10)
    first, second = (contents(folder) for folder in folders)
    assert first == second
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_a_save_that_cannot_write_says_so_and_leaves_the_others(folder, trainer):
    before = contents(folder)
    # A file has the name of the folder in which a save works.
    (folder / ".saving").write_bytes(b"")
    text = refusal(checkpoints.save, trainer.checkpoint, str(folder), 40)
    assert prefix_of(folder, 40) in text
    assert "File exists" in text
    (folder / ".saving").unlink()
    assert contents(folder) == before


# --- Interrupted saves ----------------------------------------------------------------------------


@pytest.fixture
def moments(tmp_path, monkeypatch) -> Iterator[list[Path]]:
    """Copies of `tmp_path / "run"` as a kill would leave it before each change of its files."""
    taken: list[Path] = []

    def before(name: str):
        change = getattr(os, name)

        def changing(*args, **kwargs):
            taken.append(tmp_path / "moments" / f"{len(taken)}-{name}")
            shutil.copytree(tmp_path / "run", taken[-1])
            return change(*args, **kwargs)

        return changing

    with monkeypatch.context() as patches:
        for name in ("replace", "rename", "remove", "unlink", "fsync"):
            patches.setattr(os, name, before(name))
        yield taken


@pytest.mark.parametrize("max_to_keep", [-1, 1])
@pytest.mark.parametrize("older", ["intact", "none", "damaged at this step"])
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_one_whole(
    tiny, tmp_path, moments, older, max_to_keep
):
    run = tmp_path / "run"
    run.mkdir()
    expected_old = None
    if older != "none":
        checkpoints.save(tiny, str(run), 10)
        expected_old = 10
    if older == "damaged at this step":
        checkpoints.save(tiny, str(run), 20)
        os.truncate(prefix_of(run, 20) + ".data-00000-of-00001", 5)
    before, damaged = len(moments), contents(run)
    tiny.v.assign_add(tf.ones_like(tiny.v))
    checkpoints.save(tiny, str(run), 20, max_to_keep)
    kills = [*moments[before:], run]

    found = []
    for moment in kills:
        newest, _ = checkpoints.newest_intact(str(moment))
        found.append(newest and int(newest.rpartition("-")[2]))
        if newest:
            kept = tf.train.load_checkpoint(newest).get_tensor("v/.ATTRIBUTES/VARIABLE_VALUE")
            assert kept[0] == (1 if found[-1] == 20 else 0)
    assert set(found) == {expected_old, 20}
    assert found == sorted(found, key=lambda step: step == 20), "once it is there, it stays"
    # TensorFlow does not notice an index with another checkpoint's data.
    for moment in kills:
        now = contents(moment)
        for step, prefix in checkpoints.list_checkpoints(str(moment)):
            files = [f"model.ckpt-{step}{part}" for part in PARTS]
            untouched = all(now.get(file) == damaged.get(file) for file in files)
            if not (step == 20 and untouched):
                checkpoints.verify(prefix)


def test_after_a_kill_the_next_save_tidies_up_and_works(tiny, tmp_path, moments):
    (tmp_path / "run").mkdir()
    checkpoints.save(tiny, str(tmp_path / "run"), 20)
    for moment in list(moments):
        prefix = checkpoints.save(tiny, str(moment), 20, 1)
        assert checkpoints.newest_intact(str(moment)) == (prefix, [])
        files = [f"model.ckpt-20{part}" for part in PARTS]
        assert sorted(os.listdir(moment)) == sorted([*files, "checkpoint"])


@pytest.mark.parametrize("call", range(4))
def test_a_save_that_fails_half_way_is_a_one_line_error_and_leaves_an_intact_checkpoint(
    tiny, tmp_path, monkeypatch, call
):
    old = checkpoints.save(tiny, str(tmp_path), 10)
    calls = []
    replace = os.replace

    def failing(*args):
        calls.append(args)
        if len(calls) == call + 1:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patches:
        patches.setattr(os, "replace", failing)
        text = refusal(checkpoints.save, tiny, str(tmp_path), 20, 1)
    assert prefix_of(tmp_path, 20) in text
    assert "No space left on device" in text
    newest, problems = checkpoints.newest_intact(str(tmp_path))
    assert newest in (old, prefix_of(tmp_path, 20))
    assert all("model.ckpt-20 is incomplete" in why for why in problems)
    checkpoints.verify(old)
    assert not (tmp_path / ".saving").exists()


# --- What is inside -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors(saved, trainer) -> dict[str, object]:
    reader = tf.train.load_checkpoint(prefix_of(saved, 30))
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}


def keys_that_hold(tensors: dict[str, object], value: np.ndarray) -> list[str]:
    return [
        key
        for key, tensor in tensors.items()
        if isinstance(tensor, np.ndarray) and np.array_equal(tensor, value)
    ]


def test_each_variable_of_the_network_is_saved_once(tensors, trainer):
    for variable in trainer.model.variables:
        assert len(keys_that_hold(tensors, variable.numpy())) == 1, variable.name
    others = [key for key in tensors if "momentum" not in key and key.startswith("model/")]
    assert len(others) == len(trainer.model.variables)


def test_each_trainable_variable_has_one_momentum_and_nothing_else_has(tensors, trainer):
    slots = [key for key in tensors if "momentum" in key]
    trainable = trainer.model.trainable_variables
    assert len(slots) == len(trainable)
    assert sorted(tensors[key].shape for key in slots) == sorted(tuple(v.shape) for v in trainable)
    for slot in trainer.optimizer.slots.values():
        (key,) = keys_that_hold(tensors, slot.numpy())
        assert "momentum" in key


def test_statistics_mean_and_step_are_found_by_their_names(tensors, trainer):
    model = trainer.model
    assert "mean" in keys_that_hold(tensors, model.image_mean.numpy())[0]
    trainable = {variable.ref() for variable in model.trainable_variables}
    statistics = [v for v in model.variables if v.ref() not in trainable]
    statistics = [v for v in statistics if v is not model.image_mean]
    expected = {keys_that_hold(tensors, v.numpy())[0] for v in statistics}
    assert len(expected) == len(statistics) > 0
    assert {key for key in tensors if "moving_" in key} == expected
    (step,) = [key for key in tensors if "step" in key]
    assert int(tensors[step]) == 30


def test_the_description_is_the_runs_own_and_the_only_text(tensors):
    texts = {k: v for k, v in tensors.items() if isinstance(v, bytes) and k != OBJECT_GRAPH}
    ((key, text),) = texts.items()
    assert "description" in key
    assert text.decode() == RUN.to_json()
    assert set(json.loads(text)) == {"model", "data", "training"}


def test_nothing_else_is_inside(tensors, trainer):
    # the network, its momentum, the step, the description, TensorFlow's own graph of objects
    expected = len(trainer.model.variables) + len(trainer.model.trainable_variables) + 3
    assert len(tensors) == expected


# --- Damage ---------------------------------------------------------------------------------------


def assert_skipped(folder: Path, named: str) -> None:
    """Checks that the checkpoint of step 30 is named as damaged, and step 20 is used."""
    prefix = prefix_of(folder, 30)
    for path in (prefix, str(folder), prefix + ".data-00000-of-00001"):
        text = refusal(checkpoints.find, path)
        assert prefix in text
        assert named in text
    newest, (reason,) = checkpoints.newest_intact(str(folder))
    assert newest == prefix_of(folder, 20)
    assert reason == text


@pytest.mark.parametrize("part", PARTS[:2])
def test_the_last_byte_missing_or_one_too_many_is_found(folder, part):
    file = prefix_of(folder, 30) + part
    whole = Path(file).read_bytes()
    for damaged in (whole[:-1], whole + b"\0"):
        Path(file).write_bytes(damaged)
        assert_skipped(folder, os.path.basename(file))


@pytest.mark.parametrize("part", PARTS)
def test_any_flipped_bit_is_found(folder, part):
    file = Path(prefix_of(folder, 30) + part)
    whole = file.read_bytes()
    # Only the digits of the digests: a changed blank between them does no harm.
    reach = 64 if part == ".sha256" else len(whole)
    rng = np.random.default_rng(4)
    for place, bit in zip(rng.integers(0, reach, 10), rng.integers(0, 8, 10), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        assert_skipped(folder, "model.ckpt-30")
    file.write_bytes(whole)
    assert checkpoints.find(str(folder)).prefix == prefix_of(folder, 30)


def test_missing_data_are_found(folder):
    os.remove(prefix_of(folder, 30) + ".data-00000-of-00001")
    for path in (folder, prefix_of(folder, 30), prefix_of(folder, 30) + ".index"):
        assert "model.ckpt-30.data-00000-of-00001 is missing" in refusal(
            checkpoints.find, str(path)
        )
    newest, reasons = checkpoints.newest_intact(str(folder))
    assert newest == prefix_of(folder, 20)
    assert "missing" in reasons[0]


def test_a_checkpoint_without_its_index_is_refused_by_name_and_skipped(folder):
    os.remove(prefix_of(folder, 30) + ".index")
    text = refusal(checkpoints.find, prefix_of(folder, 30))
    assert "model.ckpt-30.index is missing" in text
    newest, (reason,) = checkpoints.newest_intact(str(folder))
    assert newest == prefix_of(folder, 20)
    assert "model.ckpt-30.index is missing" in reason


def test_several_damaged_ones_are_all_skipped_with_their_reasons(folder):
    for step in (20, 30):
        os.truncate(prefix_of(folder, step) + ".data-00000-of-00001", 100)
    newest, reasons = checkpoints.newest_intact(str(folder))
    assert newest == prefix_of(folder, 10)
    assert len(reasons) == 2
    assert "model.ckpt-30" in reasons[0]
    assert "model.ckpt-20" in reasons[1]


def test_where_none_is_intact_none_is_given(folder):
    for step in STEPS:
        os.truncate(prefix_of(folder, step) + ".index", 0)
    newest, reasons = checkpoints.newest_intact(str(folder))
    assert newest is None
    assert len(reasons) == 3


def test_a_folder_that_is_empty_or_missing_has_no_newest_and_no_complaints(tmp_path):
    assert checkpoints.newest_intact(str(tmp_path)) == (None, [])
    assert checkpoints.newest_intact(str(tmp_path / "nowhere")) == (None, [])


def test_a_checkpoint_without_digests_is_accepted_where_the_rest_is_whole(folder):
    os.remove(prefix_of(folder, 30) + ".sha256")
    assert checkpoints.find(str(folder)).prefix == prefix_of(folder, 30)
    assert checkpoints.newest_intact(str(folder)) == (prefix_of(folder, 30), [])
    found = checkpoints.read(prefix_of(folder, 30))
    run, step = found.run, found.step
    assert (run, step) == (RUN, 30)


def test_without_digests_a_flipped_bit_of_the_values_is_found_on_restoring(folder):
    prefix = prefix_of(folder, 30)
    os.remove(prefix + ".sha256")
    file = Path(prefix + ".data-00000-of-00001")
    whole = file.read_bytes()
    other = Trainer(RUN)
    for place in np.random.default_rng(8).integers(0, len(whole), 4):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        assert prefix in refusal(checkpoints.restore, other.checkpoint, prefix)


def test_without_digests_a_cut_off_index_cannot_be_read(folder):
    prefix = prefix_of(folder, 30)
    os.remove(prefix + ".sha256")
    os.truncate(prefix + ".index", os.path.getsize(prefix + ".index") // 2)
    assert prefix in refusal(checkpoints.read, prefix)


# --- Finding --------------------------------------------------------------------------------------


def test_a_prefix_any_of_its_files_or_the_folder_name_a_checkpoint(folder):
    for part in ("", *PARTS):
        assert checkpoints.find(prefix_of(folder, 20) + part).prefix == prefix_of(folder, 20)
    assert checkpoints.find(str(folder)).prefix == prefix_of(folder, 30)
    assert checkpoints.find(f"{folder}/").prefix == prefix_of(folder, 30)


def test_a_relative_path_is_enough(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert checkpoints.find("model.ckpt-10").prefix == "model.ckpt-10"
    assert checkpoints.find(".") == checkpoints.SavedRun("./model.ckpt-30", RUN, 30, True)


def test_a_path_without_a_checkpoint_is_named(folder):
    for path in (folder / "nowhere", folder / "model.ckpt-15", folder / "model.ckpt-15.index"):
        text = refusal(checkpoints.find, str(path))
        assert "does not exist" in text
        assert str(path).removesuffix(".index") in text


@pytest.mark.parametrize("file", [None, "notes.txt", "ckpt-1.index", "model.ckpt-best.index"])
def test_a_folder_without_a_checkpoint_is_named(tmp_path, file):
    if file:
        (tmp_path / file).write_bytes(b"x")
    text = refusal(checkpoints.find, str(tmp_path))
    assert "no checkpoint" in text
    assert str(tmp_path) in text
    assert checkpoints.list_checkpoints(str(tmp_path)) == []


def test_folders_that_tensorflow_would_take_for_a_pattern_are_refused_before_training(tmp_path):
    for name in ("run [1]", "run*", "run?"):
        directory = tmp_path / name
        with (
            pytest.raises(UserError, match="Use another folder"),
            run_folder.lock(str(directory)),
        ):
            pass
        assert not directory.exists()
        with pytest.raises(UserError, match="Use another folder"):
            checkpoints.find(str(directory))


def test_a_tensorflow_checkpoint_of_something_else_is_refused(tiny, tmp_path):
    prefix = tiny.write(str(tmp_path / "other"))
    text = refusal(checkpoints.read, prefix)
    assert prefix in text
    assert "another program wrote this checkpoint" in text


@pytest.mark.parametrize(
    "description", ["", "nonsense", "{}", "[]", '{"model": {}, "data": {}}', RUN.to_json()[:-9]]
)
def test_a_description_that_does_not_describe_a_run_is_refused(tmp_path, description):
    other = tf.train.Checkpoint(description=tf.Variable(description), step=tf.Variable(1))
    text = refusal(checkpoints.read, other.write(str(tmp_path / "other")))
    assert "description" in text


def test_without_digests_a_checkpoint_that_is_still_being_copied_is_skipped(folder):
    for part, share in ((".data-00000-of-00001", 0.6), (".index", 0.9)):
        copy = Path(shutil.copytree(folder, folder.with_name(f"copy{part}")))
        os.remove(prefix_of(copy, 30) + ".sha256")
        file = prefix_of(copy, 30) + part
        os.truncate(file, int(os.path.getsize(file) * share))
        assert "still being copied" in refusal(checkpoints.find, prefix_of(copy, 30))
        newest, (reason,) = checkpoints.newest_intact(str(copy))
        assert newest == prefix_of(copy, 20)
        assert "model.ckpt-30" in reason


@pytest.mark.parametrize("left", [(".data-00000-of-00001", ".sha256"), (".sha256",)])
def test_what_a_kill_while_deleting_or_saving_has_left_goes_with_the_next_save(folder, tiny, left):
    for part in set(PARTS) - set(left):
        os.remove(prefix_of(folder, 10) + part)
    checkpoints.save(tiny, str(folder), 40)
    assert not list(folder.glob("model.ckpt-10*"))
    assert steps_in(folder) == [20, 30, 40]


def test_a_file_that_is_no_checkpoint_at_all_is_refused(tmp_path):
    for part in PARTS[:2]:
        (tmp_path / f"other{part}").write_bytes(b"something else entirely")
    assert str(tmp_path / "other") in refusal(checkpoints.read, str(tmp_path / "other"))


# --- Restoring ------------------------------------------------------------------------------------


def values(variables) -> list[bytes]:
    return [variable.numpy().tobytes() for variable in variables]


def test_a_restored_run_is_bit_identical_to_the_saved_one(trainer, tmp_path):
    trainer.step.assign(12345678901)  # does not fit 32 bits
    prefix = checkpoints.save(trainer.checkpoint, str(tmp_path), 1)
    other = stirred_trainer(seed=1)
    assert values(other.model.variables) != values(trainer.model.variables)
    checkpoints.restore(other.checkpoint, prefix)
    assert values(other.model.variables) == values(trainer.model.variables)
    assert list(other.optimizer.slots) == list(trainer.optimizer.slots)
    assert values(other.optimizer.slots.values()) == values(trainer.optimizer.slots.values())
    assert int(other.step) == 12345678901
    # and saved again, it is the same file
    again = checkpoints.save(other.checkpoint, str(tmp_path / "again"), 1)
    for part in PARTS:
        assert Path(again + part).read_bytes() == Path(prefix + part).read_bytes()


class Part(tf.Module):
    """A part that some checkpoints contain."""

    def __init__(self, value: float):
        self.value = tf.Variable(value)


def test_an_optional_part_is_restored_if_the_file_contains_it(trainer, saved, tmp_path):
    more = tf.train.Checkpoint(trainer.checkpoint, part=Part(1.0))
    with_part = checkpoints.save(more, str(tmp_path), 1)
    for prefix, value in ((prefix_of(saved, 30), 5.0), (with_part, 1.0)):
        other, part = stirred_trainer(seed=1), Part(5.0)
        checkpoints.restore(other.checkpoint, prefix, {"part": part})
        assert values(other.model.variables) == values(trainer.model.variables)
        assert float(part.value) == value
    assert "cannot be restored" in refusal(checkpoints.restore, other.checkpoint, with_part)


@pytest.mark.parametrize(
    ("data_format", "dtype"),
    [("channels_last", "fp32"), ("channels_first", "fp32"), ("channels_first", "bf16")],
)
def test_a_checkpoint_fits_every_layout_and_precision(saved, trainer, data_format, dtype):
    model = checkpoints.load(checkpoints.read(prefix_of(saved, 30)), data_format, dtype)
    shape = model.num_layers, model.num_classes, model.norms[0].decay
    assert shape == (RUN.model.num_layers, RUN.model.num_classes, RUN.model.batch_norm_decay)
    assert values(model.variables) == values(trainer.model.variables)
    assert all(variable.dtype == tf.float32 for variable in model.variables)


def test_a_run_in_another_layout_resumes_from_the_same_checkpoint(saved, trainer, tmp_path):
    other = Trainer(RUN, "channels_first", "bf16")
    checkpoints.restore(other.checkpoint, prefix_of(saved, 30))
    again = checkpoints.save(other.checkpoint, str(tmp_path), 30)
    for part in PARTS:
        assert Path(again + part).read_bytes() == Path(prefix_of(saved, 30) + part).read_bytes()


def test_a_network_that_is_restored_gives_the_same_logits(tmp_path):
    trainer = Trainer(RUN)
    prefix = checkpoints.save(trainer.checkpoint, str(tmp_path), 0)
    images = np.random.default_rng(0).normal(0, 60, [3, 32, 32, 3]).astype(np.float32)
    expected = trainer.model(images).numpy()
    np.testing.assert_array_equal(
        checkpoints.load(checkpoints.read(prefix))(images).numpy(), expected
    )


def test_the_run_and_its_step_are_read_without_building_anything(saved):
    for step in STEPS:
        assert checkpoints.read(prefix_of(saved, step)).step == step


def test_another_network_than_the_saved_one_is_not_restored(saved):
    for other in (ResNet(num_layers=14), ResNet(num_layers=8, num_classes=3)):
        text = refusal(checkpoints.restore_model, other, prefix_of(saved, 30))
        assert "cannot be restored" in text
        assert prefix_of(saved, 30) in text


def test_a_run_is_not_restored_from_a_checkpoint_of_only_its_network(trainer, tmp_path):
    alone = tf.train.Checkpoint(model=trainer.model).write(str(tmp_path / "alone"))
    assert "cannot be restored" in refusal(checkpoints.restore, Trainer(RUN).checkpoint, alone)


def test_a_checkpoint_with_more_than_the_run_is_not_restored_as_one(trainer, tmp_path):
    parts = {"model": trainer.model, "momentum": trainer.optimizer.slots, "step": trainer.step}
    more = {"description": tf.Variable(RUN.to_json()), "average": tf.Variable(1.0)}
    prefix = tf.train.Checkpoint(**parts, **more).write(str(tmp_path / "more"))
    assert "cannot be restored" in refusal(checkpoints.restore, Trainer(RUN).checkpoint, prefix)
