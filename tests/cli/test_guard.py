"""How programs end: also if nobody reads what they print, or if nothing can be printed at all."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from programs import PROGRAMS, PROJECT, error_of, run, start, without_tensorflow

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


# --- Names that the output's encoding lacks -------------------------------------------------------

ASCII = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
PHOTOS, DATA, RUN, CAT, DOG = "写真", "資料", "走行", "猫", "犬"
NOT_UTF8 = os.fsdecode(b"\xff\xfe")


@pytest.fixture(scope="module")
def japanese(tmp_path_factory) -> Path:
    """A folder of photos, and a run on them. Nothing in them is ASCII."""
    top = tmp_path_factory.mktemp("names")
    for name in (CAT, DOG):
        (top / PHOTOS / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (32, 32), (i, 9, 9)).save(top / PHOTOS / name / f"{i}.png")
    flags = (f"--image_dir={top / PHOTOS}", f"--data_dir={top / DATA}")
    imported = run("import", *flags, env=ASCII).stdout
    assert r"\u732b" in imported
    assert r"--path=" + str(top) + r"/\u8cc7\u6599" in imported
    trained = run(
        *("run_trainer.py", f"--path={top / DATA}", "--num_layers=8", "--num_iterations=2"),
        *(f"--ckpt_path={top / RUN}", "--epochs_between_evals=1"),
        env=ASCII,
    ).stdout
    assert rf"{top}/\u8d70\u884c/model.ckpt-2" in trained
    return top


def test_every_program_prints_names_that_are_not_ascii(japanese):
    path, saved = f"--path={japanese / DATA}", f"--ckpt_path={japanese / RUN}"
    odd = japanese / f"odd{NOT_UTF8}"
    outputs = (f"--report={odd}.html", f"--output_json={odd}.json", f"--plot_dir={odd}")
    scored = run("run_evaluator.py", path, saved, *outputs, env=ASCII).stdout
    assert r"\u732b" in scored
    assert rf"wrote {japanese}/odd\udcff\udcfe.json" in scored
    exported = japanese / "出力"
    run("export", saved, f"--export_dir={exported}", env=ASCII)
    photo = japanese / PHOTOS / CAT / "0.png"
    assert r"\u732b" in run("classify", f"--saved_model={exported}", photo, env=ASCII).stdout
    copy = shutil.copytree(japanese / RUN, japanese / f"copy{NOT_UTF8}")
    run("plot", f"--run={copy}", f"--run={japanese / RUN}",
        f"--output={odd}.png", env=ASCII)  # fmt: skip


def test_paths_that_are_not_utf8_work_or_are_refused_in_a_sentence(tmp_path):
    odd = f"{tmp_path}/odd{NOT_UTF8}"
    data = ("--synthetic_train_images=20", "--synthetic_test_images=5", f"--data_dir={odd}")
    run("cifar10_download_and_extract.py", "--synthetic", *data)
    for flag in ("--ckpt_path", "--train_log_path", "--export_dir"):
        flags = ("--use_synthetic_data", f"--ckpt_path={tmp_path / 'run'}", f"{flag}={odd}")
        refused = error_of("run_trainer.py", *flags, env=without_tensorflow(tmp_path))
        assert "?? is invalid: TensorFlow needs a path in UTF-8." in refused
    for program, flag in (
        ("run_evaluator.py", "--ckpt_path"),
        ("export", "--export_dir=new --ckpt_path"),
        ("classify", "photo.png --ckpt_path"),
    ):
        refused = error_of(program, *flag.split()[:-1], f"{flag.split()[-1]}={odd}", cwd=tmp_path)
        assert "TensorFlow needs a path in UTF-8" in refused
