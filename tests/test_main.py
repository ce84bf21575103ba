"""The package's list of commands: what it prints, and how it is started from anywhere."""

import re
import subprocess
import sys

from programs import PROJECT, environment

from cifar10_resnet.__main__ import COMMANDS


def answer(*words: str, status: int = 0, **keywords) -> str:
    """Returns what Python prints when it is started with these words."""
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **keywords)
    assert done.returncode == status, done.stdout + done.stderr
    assert (done.stdout == "") == bool(status)
    return done.stdout + done.stderr


def test_without_a_name_each_command_is_listed_with_a_line():
    shown = answer("-m", "cifar10_resnet", cwd=PROJECT)
    lines = dict(re.findall(r"^  (\w+) +(\S.*\.)$", shown, re.M))
    assert list(lines) == list(COMMANDS)
    assert {"export", "classify", "serve", "plot", "launch", "import", "draw"} < lines.keys()
    assert max(len(name) + len(line) for name, line in lines.items()) <= 90
    for asked in ("--help", "-h"):
        assert answer("-m", "cifar10_resnet", asked, cwd=PROJECT) == shown


def test_a_wrong_name_is_answered_with_the_nearest():
    for wrong, near in (("exprot", "export"), ("server", "serve"), ("run_trainer", "train")):
        said = answer("-m", "cifar10_resnet", wrong, "--quiet", status=1, cwd=PROJECT)
        sentence = f"'{wrong}' is not a command. Did you mean {near}?"
        assert said == f"cifar10_resnet: error: {sentence}\n"


def test_the_commands_work_from_any_folder_and_say_how_to_start_the_next(tmp_path):
    package = str(PROJECT / "cifar10_resnet")
    listed = answer("-m", "cifar10_resnet", cwd=tmp_path, env=environment())
    assert answer(package, cwd=tmp_path) == listed.replace(
        "python -m cifar10_resnet", f"python {package}"
    )
    refused = answer(package, "serve", "--saved_model=none", status=1, cwd=tmp_path)
    assert refused.startswith(
        "cifar10_resnet serve: error: --saved_model=none contains no SavedModel. "
    )
    assert f"{package} export`" in refused
    here = answer("-m", "cifar10_resnet", "serve", "--saved_model=none", status=1, cwd=PROJECT)
    assert " -m cifar10_resnet export`" in here


def test_each_command_shows_its_own_help():
    for name, first in (("export", "Exports a network"), ("train", "Trains a ResNet")):
        assert answer("-m", "cifar10_resnet", name, "--help", cwd=PROJECT).startswith(first)
