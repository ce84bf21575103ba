"""The native kernels are built once, privately, and whole; and nobody needs them."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import PROJECT, SMALL, error_of, run, run_code

from cifar10_resnet.errors import UserError
from cifar10_resnet.native import build

TRAIN = ("run_trainer.py", "--use_synthetic_data", "--max_train_steps=3", *SMALL)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cifar10_resnet"


@pytest.fixture
def compiler(tmp_path, monkeypatch, cache) -> Callable[[str], Path]:
    """Writes a shell script and makes it the compiler; returns the file that counts its calls."""

    def write(script: str) -> Path:
        file, calls = tmp_path / "compiler", tmp_path / "calls"
        # The word after -o is the file to write.
        find = 'while [ "$1" != -o ]; do shift; done; out=$2\n'
        file.write_text(f"#!/bin/sh\n{find}echo called >> {calls}\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setenv("CXX", str(file))
        return calls

    return write


def test_it_is_built_once_and_found_again(compiler, cache, capsys):
    calls = compiler('echo library > "$out"')
    file = build.library()
    assert Path(file).read_text() == "library\n"
    assert build.library() == file
    assert calls.read_text() == "called\n"
    assert capsys.readouterr().out.count("Building the native kernels") == 1
    assert sorted(os.listdir(cache)) == sorted([".lock", Path(file).name])


def test_a_start_that_finds_it_built_waits_for_nobody(compiler, cache):
    compiler('echo library > "$out"')
    file = build.library()
    with build._locked(cache):  # as a program does that builds for another compiler
        code = "from cifar10_resnet.native import build; print(build.library())"
        assert run_code(code, timeout=60).stdout.strip() == file


def test_only_the_user_may_enter_the_folder(compiler, cache):
    compiler('echo library > "$out"')
    build.library()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
def test_a_folder_that_others_may_enter_is_not_used(compiler, cache, mode):
    calls = compiler('echo library > "$out"')
    cache.mkdir(parents=True)
    cache.chmod(mode)
    with pytest.raises(build.CannotBuild, match=r"not a folder that only you may use"):
        build.library()
    assert not calls.exists()


def test_a_link_is_not_used_as_the_folder(compiler, cache, tmp_path):
    calls = compiler('echo library > "$out"')
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(build.CannotBuild, match=r"not a folder that only you may use"):
        build.library()
    assert not calls.exists()


def test_a_failure_is_remembered_and_new_only_once(compiler, cache):
    calls = compiler('echo half > "$out"; echo "kernels.cc:1: error: no such thing" >&2; exit 1')
    told = []
    for _ in range(3):
        with pytest.raises(build.CannotBuild, match=r"error: no such thing") as caught:
            build.library()
        told.append(caught.value.is_new)
    assert told == [True, False, False]
    assert calls.read_text() == "called\n"
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob("*.part"))


def test_another_compiler_tensorflow_or_processor_gets_a_library_of_its_own(
    compiler, cache, monkeypatch
):
    compiler('echo library > "$out"')
    first = build.library()
    compiler('echo another > "$out"')
    second = build.library()
    monkeypatch.setattr(build, "processor", lambda: "another processor")
    assert len({first, second, build.library()}) == 3


def test_programs_that_start_together_build_it_once(compiler, cache):
    calls = compiler('sleep 0.5; echo library > "$out"')
    code = "from cifar10_resnet.native import build; print(build.library())"
    together = [
        subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    files = {process.communicate()[0].split()[-1] for process in together}
    assert len(files) == 1
    assert calls.read_text() == "called\n"


def test_a_failure_that_cannot_be_recorded_is_still_the_compilers(compiler, monkeypatch):
    compiler("exit 1")

    def on_a_full_disk(path: Path, content: bytes) -> None:
        raise UserError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr("cifar10_resnet.storage.new_file", on_a_full_disk)
    for _ in range(2):
        with pytest.raises(build.CannotBuild, match="compiler failed: no reason") as refused:
            build.library()
        assert refused.value.is_new


def test_a_build_that_is_killed_leaves_nothing_that_looks_whole(compiler, cache):
    compiler('echo half > "$out"; kill -9 $PPID')
    code = "from cifar10_resnet.native import build; build.library()"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == -9
    assert not list(cache.glob("*.so"))
    compiler('echo library > "$out"')
    assert Path(build.library()).read_text() == "library\n"


# --- The trainer ----------------------------------------------------------------------------------


def test_without_a_compiler_training_works_and_says_nothing(tmp_path, cache):
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = run(*TRAIN, f"--ckpt_path={tmp_path / 'run'}", env=environment)
    assert "native" not in done.stdout + done.stderr
    why = r"--native=on is not possible: there is no C\+\+ compiler \(no-such-compiler\)\."
    assert re.search(why, error_of(*TRAIN, f"--ckpt_path={tmp_path / 'other'}", "--native=on",
                                   env=environment))  # fmt: skip


def test_a_compiler_that_fails_is_told_once_and_training_works(tmp_path, compiler):
    compiler("exit 1")
    first, second = (run(*TRAIN, f"--ckpt_path={tmp_path / name}") for name in ("a", "b"))
    assert first.stderr.count("Training without native kernels: ") == 1
    assert second.stderr == ""


def test_a_library_that_tensorflow_cannot_load_is_not_used(tmp_path, compiler):
    compiler('echo nonsense > "$out"')
    run(*TRAIN, f"--ckpt_path={tmp_path / 'run'}")
    err = error_of(*TRAIN, f"--ckpt_path={tmp_path / 'other'}", "--native=on")
    assert "--native=on is not possible: TensorFlow cannot load them" in err
