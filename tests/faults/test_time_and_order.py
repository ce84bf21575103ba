"""Clocks that jump, starts that coincide, and folders that move away."""

import io
import re
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import pytest
from conftest import random_images
from programs import SMALL, start, wait_for

from cifar10_resnet import checkpoints, storage
from cifar10_resnet.config import RunConfig
from cifar10_resnet.errors import UserError
from cifar10_resnet.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_and_the_time_left_do_not_heed_the_clock_on_the_wall(tmp_path, monkeypatch):
    clock, jumps = time.time, (0, -3600, 86_400, -(10**9), 0)
    jumped = [0]
    monkeypatch.setattr("time.time", lambda: clock() + jumped[0])
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Progress(RunConfig(), 0, 100, 400, str(tmp_path)) as progress:
        for step, jumped[0] in enumerate(jumps, 1):
            progress.update(step, 1.0, 0.5, 0.1)
        steps = re.findall(r"(\d+)/100, left", sys.stdout.getvalue())
        assert [int(step) for step in dict.fromkeys(steps)] == [1, 2, 3, 4, 5]
        for step, jumped[0] in enumerate(jumps, 6):
            progress.log_training(step, 1.0, 0.5, 0.1, dict)
        left = re.findall(r"left (-?\d+):(\d\d):(\d\d)", sys.stdout.getvalue())
    assert len(left) >= 10
    assert {hours for hours, _, _ in left} == {"0"}


def test_of_two_trainers_started_at_once_one_is_refused_and_the_other_not_disturbed(
    write_cifar10, tmp_path
):
    path = write_cifar10(random_images(80))
    command = ("run_trainer.py", f"--path={path}", f"--ckpt_path={tmp_path / 'run'}", *SMALL)
    trainers = [start(*command), start(*command)]
    with ThreadPoolExecutor(2) as pool:
        ends = {pool.submit(trainer.wait): trainer for trainer in trainers}
        (first,), _ = wait(ends, return_when=FIRST_COMPLETED)  # the other trains for 64,000 steps
        refused = ends.pop(first)
        (second,) = ends.values()
        wait_for(second, "loss")
        second.send_signal(signal.SIGTERM)
        out, err = second.communicate()
    assert refused.returncode == 1
    assert "in use by another trainer" in refused.communicate()[1]
    assert second.returncode == 128 + signal.SIGTERM, err
    saved = re.search(r"saved as +(\S+)", out)[1]
    assert checkpoints.newest_intact(str(tmp_path / "run")) == (saved, [])


@pytest.mark.parametrize(
    "fault", ["moved", "moved, another run", "deleted", "deleted, another run"]
)
def test_a_trainer_whose_folder_is_gone_ends_and_loses_nothing(fault, write_cifar10, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "run2"
    path = write_cifar10(random_images(80))
    trainer = start("run_trainer.py", f"--path={path}", f"--ckpt_path={run}", *SMALL)
    for _ in range(2):  # The trainer prints the first line before it opens its event file.
        wait_for(trainer, "loss")
    if fault.startswith("moved"):
        run.rename(moved)
    else:
        (run / storage.LOCK).unlink()
    if fault.endswith("another run"):
        run.mkdir(exist_ok=True)
        with storage.lock(run, UserError("taken")):
            out, err = trainer.communicate(timeout=60)
    else:
        out, err = trainer.communicate(timeout=60)
    assert trainer.returncode == 1, out
    (line,) = [line for line in err.splitlines() if "during training" in line]
    if fault == "deleted, another run":
        assert "another trainer uses the new folder" in line
        assert "without saving" in line
        assert checkpoints.list_checkpoints(str(run)) == []
        return
    assert ("was moved" if fault.startswith("moved") else "was deleted") in line
    folder = moved if fault.startswith("moved") else run
    saved = re.search(r"Saved (\S+)\.", line)[1]
    assert checkpoints.newest_intact(str(folder)) == (saved, [])
    assert [run.exists(), moved.exists()] == {
        "moved": [False, True],
        "moved, another run": [True, True],
        "deleted": [True, False],
    }[fault]
    assert not (moved / storage.LOCK).exists()
