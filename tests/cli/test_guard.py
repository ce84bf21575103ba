"""How programs end: also if nobody reads what they print, or if nothing can be printed at all."""

import os
import signal
import subprocess
import sys

import pytest
from programs import PROGRAMS, PROJECT, start

TRAINER = f"{sys.executable} {PROJECT}/run_trainer.py"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_whose_reader_goes_ends_quietly(program):
    read, write = os.pipe()
    os.close(read)
    process = start(program, "--help", stdout=write)
    os.close(write)
    assert process.communicate(timeout=60) == (None, "")
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("closed", "flags", "status", "printed"),
    [
        (">&-", "--help", 0, ""),
        ("2>&-", "--help", 0, "Trains a ResNet"),
        ("2>&-", "--recipe=none", 1, ""),
        (">&-", "--recipe=none", 1, "run_trainer.py: error: "),
        (">&- 2>&-", "--recipe=none", 1, ""),
        ("<&-", "--recipe=none", 1, "run_trainer.py: error: "),
    ],
)
def test_a_closed_stream_loses_what_is_printed_there_and_nothing_else(
    closed, flags, status, printed
):
    command = f"{TRAINER} {flags} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert (done.stdout + done.stderr).startswith(printed)
    assert bool(done.stdout + done.stderr) == bool(printed)
    assert "Traceback" not in done.stderr


def test_a_training_whose_streams_are_closed_saves_what_it_learned(tmp_path):
    flags = "--use_synthetic_data --num_layers=8 --batch_size=8 --max_train_steps=2"
    command = f"{TRAINER} {flags} --ckpt_path={tmp_path} >&- 2>&- <&-"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "model.ckpt-2.index").exists()


SLOW_PROGRAM = """
import sys, time
from cifar10_resnet import storage
from cifar10_resnet.cli.guard import exits_with_a_sentence

@exits_with_a_sentence
def main(path):
    with storage.new_folder(path):
        print("writing", flush=True)
        time.sleep(60)

sys.exit(main(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_stopped_tidies_up_and_ends_with_a_one_line_error(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PROGRAM, str(tmp_path / "new")],
        **{"cwd": PROJECT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    assert process.stdout.readline() == "writing\n"
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == "-c: interrupted before any work was lost. Run the same command again.\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("absl", "status", "sentence"),
    [
        (
            "raise ModuleNotFoundError(name='absl')",
            1,
            "error: absl is not installed. Enter the environment: . .venv/bin/activate",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
            130,
            "interrupted before any work was lost. Run the same command again.",
        ),
    ],
    ids=["missing", "interrupted"],
)
def test_a_start_that_cannot_import_its_libraries_ends_with_a_one_line_error(
    tmp_path, program, absl, status, sentence
):
    (tmp_path / "absl.py").write_text(absl)
    process = start(program, "--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    shown, error = process.communicate(timeout=60)
    assert (process.returncode, shown) == (status, "")
    assert sentence in error
    assert error.count("\n") == 1
