"""Clocks that jump, and starts that coincide."""

import io
import re
import sys
import time

from commands import SMALL, start
from conftest import random_images

import checkpoints
from progress import Progress
from run_config import RunConfig


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_and_the_time_left_do_not_heed_the_clock_on_the_wall(tmp_path, monkeypatch):
    clock = time.time
    monkeypatch.setattr(sys, "stdout", Terminal())
    steps = []
    with Progress(RunConfig(), 0, 100, 400, str(tmp_path)) as progress:
        for step, jump in enumerate((0, -3600, 86_400, -(10**9), 0), 1):
            monkeypatch.setattr(time, "time", lambda jump=jump: clock() + jump)
            progress.update(step, 1.0, 0.5, 0.1)
            progress.log_training(step, 1.0, 0.5, 0.1, dict)
        shown = sys.stdout.getvalue()
    steps = re.findall(r"(\d+)/100, left", shown)
    assert [int(step) for step in dict.fromkeys(steps)] == [1, 2, 3, 4, 5]
    left = re.findall(r"left (-?\d+):(\d\d):(\d\d)", shown)
    assert len(left) >= 10
    assert {hours for hours, _, _ in left} == {"0"}


def test_of_two_trainers_started_at_once_one_is_refused_and_the_other_not_disturbed(
    write_cifar10, tmp_path
):
    path = write_cifar10(random_images(80))
    command = (
        *("run_trainer.py", f"--path={path}", f"--ckpt_path={tmp_path / 'run'}", *SMALL),
        *("--num_iterations=40", "--save_per_iterations=5"),
    )
    ended = [(process, *process.communicate()) for process in [start(*command), start(*command)]]
    statuses = {process.returncode: out + err for process, out, err in ended}
    # the second may also come when the first has ended, and then finds nothing to do
    assert sorted(statuses) in ([0], [0, 1])
    if 1 in statuses:
        assert "another trainer is at work" in statuses[1]
    else:
        assert sum("This run is finished" in out for _, out, _ in ended) == 1
    assert checkpoints.newest_intact(str(tmp_path / "run")) == (
        str(tmp_path / "run" / "model.ckpt-40"),
        [],
    )
