"""Workers end with their launcher, and the launcher with its workers."""

import os

from programs import (
    start,
)

from cifar10_resnet.commands import launch

# shows that it runs by keeping a FIFO open
IDLE_WORKER = (
    "import sys, time; f = open(sys.argv[1], 'w'); print(file=f, flush=True); time.sleep(99)"
)


def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    os.mkfifo(tmp_path / "there")
    (tmp_path / "worker.py").write_text(IDLE_WORKER)
    launcher = start("launch", "--", tmp_path / "worker.py", tmp_path / "there")
    with open(tmp_path / "there") as workers:
        assert [workers.readline(), workers.readline()] == ["\n", "\n"]
        launcher.kill()
        assert workers.read() == "", "which is there once all have closed it"
    launcher.communicate()


def test_the_launcher_ends_the_others_where_one_fails_and_with_its_status(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(
        "import json, os, sys, time\n"
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        "sys.exit(3) if index == 1 else time.sleep(99)\n"
    )
    monkeypatch.setattr(launch, "PATIENCE", 0.1)
    assert launch.launch([str(tmp_path / "worker.py")], 3) == 3
