"""A run's folder: its name, its lock, and what --clean deletes and what it leaves."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf
from conftest import contents

from cifar10_resnet import checkpoints
from cifar10_resnet.errors import UserError
from cifar10_resnet.options import Options
from cifar10_resnet.training import run_folder
from cifar10_resnet.training.summaries import FILE_SUFFIX

PARTS = (".index", ".data-00000-of-00001", ".sha256")


@pytest.fixture
def tiny() -> tf.train.Checkpoint:
    return tf.train.Checkpoint(v=tf.Variable([1.0]))


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A run folder with three checkpoints."""
    for step in (10, 20, 30):
        checkpoints.save(tiny, str(tmp_path / "run"), step)
    return tmp_path / "run"


def prefix_of(folder: Path, step: int) -> str:
    return str(folder / f"model.ckpt-{step}")


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as refused:
        function(*args)
    return str(refused.value)


# --- Its name -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "resnet20"),
        ({"num_layers": 56, "shortcut_connections": False, "recipe": "fast"}, "plain56-fast"),
        ({"dataset": "cifar100", "coarse_labels": True}, "resnet20-cifar100-coarse"),
        ({"dataset": "synthetic", "recipe": "paper"}, "resnet20-synthetic"),
        ({"num_layers": 164, "bottleneck": True, "resnet_version": 1}, "resnet164-bottleneck-v1"),
    ],
)
def test_each_kind_of_run_has_a_folder_of_its_own(given, name):
    options = run_folder.settle(Options(), given)
    assert options.ckpt_path == os.path.join("runs", name)
    assert options.train_log_path == os.path.join("runs", name, "log")


def test_a_network_that_was_pretrained_gives_its_name_to_the_folder(tmp_path):
    for pretrained in (tmp_path, tmp_path / "model.ckpt-5"):
        options = Options(pretrained_model_checkpoint_path=str(pretrained))
        for given, kind in (({}, "transfer"), ({"fine_tune": True}, "fine-tune")):
            settled = run_folder.settle(options, given)
            assert settled.ckpt_path == os.path.join("runs", f"{tmp_path.name}-{kind}")


def test_an_export_that_the_run_would_fill_is_refused(tmp_path):
    run = tmp_path / "run"
    for path in (run, tmp_path, run / "log" / ".."):
        options = Options(ckpt_path=str(run), train_log_path=str(run / "log"), export_dir=str(path))
        with pytest.raises(UserError, match="is invalid: it contains"):
            run_folder.refuse_export(options)
    run_folder.refuse_export(dataclasses.replace(options, export_dir=str(run / "exported")))


def test_folders_that_are_named_stay_and_a_wrong_depth_is_still_refused():
    options = run_folder.settle(Options(ckpt_path="a", train_log_path="b"), {})
    assert (options.ckpt_path, options.train_log_path) == ("a", "b")
    with pytest.raises(UserError, match="num_layers=21 is invalid"):
        run_folder.settle(Options(ckpt_path="a"), {"num_layers": 21})


# --- The lock -------------------------------------------------------------------------------------

# Takes the lock as another trainer does, without its slow imports. Then waits for input.
HOLDER = """
import fcntl, os, sys
os.makedirs(sys.argv[1], exist_ok=True)
file = open(os.path.join(sys.argv[1], ".lock"), "w")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("refused", flush=True)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    """Another process that holds, or was refused, the lock of `tmp_path / "run"`."""
    started = []

    def start() -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / "run")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1], started[-1].stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_trainer_is_refused_until_the_first_was_killed(holder, tmp_path):
    directory = str(tmp_path / "run")
    process, answer = holder()
    assert answer == "held"
    with pytest.raises(UserError) as refused, run_folder.lock(directory):
        pass
    assert f"ckpt_path={directory} is in use by another trainer" in str(refused.value)
    process.kill()
    process.wait()
    with run_folder.lock(directory):
        assert holder()[1] == "refused", "now the lock is ours"
        with pytest.raises(UserError), run_folder.lock(directory):
            pass
    assert holder()[1] == "held", "and now it is free"


def test_a_lock_is_given_back_when_its_holder_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), run_folder.lock(str(tmp_path)):
        raise ZeroDivisionError
    with run_folder.lock(str(tmp_path)):
        pass


def test_the_lock_of_a_moved_folder_does_not_release_the_folder_that_takes_its_name(
    holder, tmp_path
):
    run = tmp_path / "run"
    with run_folder.lock(str(run)) as held:
        assert (held.is_in_place(), held.folder()) == (True, str(run))
        run.rename(tmp_path / "moved")
        assert (held.is_in_place(), held.is_replaced()) == (False, False)
        assert held.folder() == str(tmp_path / "moved")
        assert holder()[1] == "held", "the name is free"
        assert held.is_replaced()
    assert not (tmp_path / "moved" / ".lock").exists()
    assert holder()[1] == "refused"


def test_the_lock_makes_the_folder_and_removes_what_a_killed_save_left(tmp_path):
    saving = tmp_path / "runs" / "one" / ".saving"
    saving.mkdir(parents=True)
    (saving / "model.ckpt-10.index").write_bytes(b"x")
    with run_folder.lock(str(saving.parent)):
        assert not saving.exists()
    with run_folder.lock(str(tmp_path / "runs" / "two" / "deeper")):
        assert (tmp_path / "runs" / "two" / "deeper").is_dir()


def test_a_refused_trainer_leaves_the_other_trainers_save_unchanged(holder, tmp_path):
    holder()
    half_saved = tmp_path / "run" / ".saving" / "model.ckpt-10.index"
    half_saved.parent.mkdir()
    half_saved.write_bytes(b"x")
    with pytest.raises(UserError), run_folder.lock(str(tmp_path / "run")):
        pass
    assert half_saved.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError) as refused, run_folder.lock(str(directory)):
            pass
        assert f"{directory} cannot be written: " in str(refused.value)


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, monkeypatch, as_nobody):
    (tmp_path / "run").mkdir(mode=0o555)
    # from within, as the folders above pytest's are closed to anybody else
    monkeypatch.chdir(tmp_path / "run")
    with as_nobody(), pytest.raises(UserError) as refused, run_folder.lock("."):
        pass
    assert str(refused.value).startswith(". cannot be written: Permission denied. ")


def test_a_run_folder_that_has_become_read_only_is_refused_before_training(
    tmp_path, monkeypatch, as_nobody
):
    (tmp_path / "run").mkdir()
    # The lock of a trainer that was killed may still be written to, the folder may not.
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".lock").chmod(0o666)
    (tmp_path / "run").chmod(0o555)
    monkeypatch.chdir(tmp_path / "run")
    with as_nobody(), pytest.raises(UserError) as refused, run_folder.lock("."):
        pass
    assert str(refused.value).startswith(". cannot be written: Permission denied. ")


# --- Cleaning -------------------------------------------------------------------------------------


def test_clean_deletes_checkpoints_and_summaries_and_nothing_else(folder, tmp_path):
    logs = tmp_path / "logs"
    others = [folder / "notes.txt", folder / "model.ckpt-notes.txt", folder / "sub" / "x.index"]
    others += [logs / "train" / "plot.png", logs / "events.out.tfevents.1", logs / "eval" / "a"]
    others += [logs / "train" / "events.out.tfevents.3.host.1.v2"]  # another program's
    ours = [
        logs / part / f"events.out.tfevents.{i}.host.1{FILE_SUFFIX}"
        for part in ("train", "eval")
        for i in (1, 2)
    ]
    for file in others + ours:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    run_folder.clean(str(folder), str(logs))
    left = [file for top in (folder, logs) for file in top.rglob("*") if file.is_file()]
    assert sorted(left) == sorted(others)


def test_clean_deletes_damaged_and_half_moved_checkpoints_too(folder, tmp_path):
    os.truncate(prefix_of(folder, 10) + ".data-00000-of-00001", 0)
    os.remove(prefix_of(folder, 20) + ".data-00000-of-00001")
    os.remove(prefix_of(folder, 30) + ".index")
    run_folder.clean(str(folder), str(tmp_path / "logs"))
    assert os.listdir(folder) == []


def test_a_new_run_is_refused_the_curves_of_another(folder, tmp_path):
    curves = str(folder / "log")
    (folder / "log" / "train").mkdir(parents=True)
    (folder / "log" / "train" / f"events.out.tfevents.1{FILE_SUFFIX}").touch()
    for log_path in (curves, os.path.join(str(folder), "..", folder.name, "log")):
        with pytest.raises(UserError, match="it contains the curves of another run"):
            run_folder.refuse_other_curves(str(tmp_path / "new"), log_path)
    # These are a run's own, which was killed before its first save.
    run_folder.refuse_other_curves(str(folder), curves)
    run_folder.refuse_other_curves(str(folder), str(tmp_path / "empty"))


def test_clean_refuses_a_folder_with_a_checkpoint_that_somebody_else_wrote(folder, tiny, tmp_path):
    tiny.write(prefix_of(folder, 99))
    logs = tmp_path / "logs"
    (logs / "train").mkdir(parents=True)
    (logs / "train" / f"events.out.tfevents.1{FILE_SUFFIX}").write_bytes(b"x")
    before, logs_before = contents(folder), contents(logs)
    text = refusal(run_folder.clean, str(folder), str(logs))
    assert str(folder) in text
    assert "model.ckpt-99" in text
    assert contents(folder) == before
    assert contents(logs) == logs_before


@pytest.mark.parametrize(
    "what", ["another program's checkpoint", "another program's summaries", "documents", "a folder"]
)
def test_clean_refuses_a_folder_in_which_nothing_is_of_a_run(tiny, tmp_path, what):
    if what == "documents":
        (tmp_path / "thesis.txt").write_text("years of work")
    elif what == "a folder":
        (tmp_path / "photos").mkdir()
    elif what == "another program's summaries":
        (tmp_path / "log" / "train").mkdir(parents=True)
        (tmp_path / "log" / "train" / "events.out.tfevents.1.host.1.v2").write_bytes(b"x")
        (tmp_path / "log" / "plugins" / "profile" / "1").mkdir(parents=True)
        (tmp_path / "log" / "plugins" / "profile" / "1" / "host.xplane.pb").write_bytes(b"x")
    else:
        tiny.save(str(tmp_path / "other"))
        assert (tmp_path / "checkpoint").exists()
    before = contents(tmp_path)
    with run_folder.lock(str(tmp_path)):
        text = refusal(run_folder.clean, str(tmp_path), str(tmp_path / "log"))
    assert "--clean deletes only runs of this program" in text
    assert contents(tmp_path) == before
    assert what != "a folder" or (tmp_path / "photos").is_dir()


def test_clean_of_a_run_that_was_stopped_before_its_first_save_works(tmp_path):
    (tmp_path / "log" / "train").mkdir(parents=True)
    (tmp_path / "log" / "train" / f"events.out.tfevents.1{FILE_SUFFIX}").write_bytes(b"x")
    run_folder.clean(str(tmp_path), str(tmp_path / "log"))
    assert not list((tmp_path / "log" / "train").iterdir())
    with run_folder.lock(str(tmp_path / "new")):
        run_folder.clean(str(tmp_path / "new"), str(tmp_path / "new" / "log"))


def test_clean_leaves_a_copy_under_another_name_unchanged(folder, tmp_path):
    copies = [shutil.copy(prefix_of(folder, 30) + p, folder / f"model.ckpt-best{p}") for p in PARTS]
    run_folder.clean(str(folder), str(tmp_path))
    assert sorted(folder.iterdir()) == sorted(copies)


def test_clean_of_a_folder_that_is_missing_or_empty_is_no_mistake(tmp_path):
    run_folder.clean(str(tmp_path), str(tmp_path))
    run_folder.clean(str(tmp_path / "nowhere"), str(tmp_path / "no logs"))
    assert list(tmp_path.iterdir()) == []


def test_clean_resumes_where_it_was_interrupted(folder, tmp_path):
    logs = folder / "log"
    for writer in ("train", "eval"):
        (logs / writer).mkdir(parents=True)
    for path in folder.glob("*"):
        if path.is_file():
            path.unlink()
    run_folder.clean(str(folder), str(logs))
    (logs / "train" / "somebody's.txt").touch()
    assert "deletes only runs" in refusal(run_folder.clean, str(folder), str(logs))


def test_a_start_that_is_refused_leaves_no_folder_and_no_lock_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(UserError, match="no data"), run_folder.lock(str(tmp_path / name)):
            raise UserError("no data")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []
