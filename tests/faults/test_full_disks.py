"""A full or read-only disk is a one-line error, and existing files stay."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import contents
from downloads import batch, replacing, run_script, sha256
from PIL import Image
from programs import PROJECT, SMALL, Workers, assert_lost, error_of, run

from cifar10_resnet import checkpoints, storage
from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.errors import UserError
from cifar10_resnet.serving import export
from cifar10_resnet.training.progress import Progress
from cifar10_resnet.training.trainer import Trainer

FULL = "No space left on device"


class Disk:
    """A separate file system in memory."""

    def __init__(self, path: Path, size: str):
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "none", str(path))

    def fill(self, spare: int = 0) -> None:
        """Leaves at most `free` bytes free."""
        with open(self.path / "ballast", "wb", buffering=0) as ballast:
            free = os.statvfs(self.path)
            os.posix_fallocate(ballast.fileno(), 0, free.f_bavail * free.f_bsize - spare)

    def remount(self, options: str) -> None:
        self._mount("-o", f"remount,{options}", str(self.path))

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def make_disk(tmp_path) -> Iterator[Callable[..., Disk]]:
    """Makes small disks; skips where this user may not mount one."""
    made: list[Disk] = []

    def make(size: str = "1m", name: str = "disk") -> Disk:
        try:
            made.append(Disk(tmp_path / name, size))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no tmpfs can be mounted here, which takes root: {error}")
        return made[-1]

    yield make
    for disk in made:
        subprocess.run(["umount", str(disk.path)], check=True)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(RunConfig(ModelConfig(num_layers=8), training=TrainingConfig(batch_size=8)))


@pytest.fixture(scope="module")
def prefix(trainer, tmp_path_factory) -> str:
    return checkpoints.save(trainer.checkpoint, str(tmp_path_factory.mktemp("saved")), 10)


# --- The trainer and the evaluator ----------------------------------------------------------------


def test_a_run_that_fills_the_disk_resumes_once_there_is_room(make_disk, write_cifar10):
    data, disk = make_disk("4m", "data"), make_disk("3m")
    path = write_cifar10(parent=data.path)
    data.remount("ro")  # Training images are only read.
    folder = disk.path / "run"
    command = (
        *("run_trainer.py", f"--path={path}", f"--ckpt_path={folder}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=5", "--max_ckpts=-1"),
    )
    error = error_of(*command)
    assert FULL in error
    assert "run the same command" in error
    saved, problems = checkpoints.newest_intact(str(folder))
    assert saved
    assert problems == []
    assert not (folder / ".saving").exists()

    disk.remount("ro")
    before = contents(folder)
    refused = run(*command, status=1)
    assert "Read-only file system" in refused.stderr
    assert refused.stdout == "", "it has not begun to train"
    disk.remount("rw,size=64m")
    assert contents(folder) == before
    again = run(*command)
    assert f"Resuming from {saved} at step {checkpoints.read(saved).step}." in again.stdout
    assert checkpoints.find(str(folder)).prefix == str(folder / "model.ckpt-60")

    disk.remount("ro")
    before = contents(folder)
    scored = run("run_evaluator.py", f"--path={path}", f"--ckpt_path={folder}")
    assert "step 60" in scored.stdout
    assert contents(folder) == before


def test_a_save_that_does_not_fit_leaves_the_last_checkpoint_as_it_was(make_disk, trainer):
    disk = make_disk("2m")
    saved = checkpoints.save(trainer.checkpoint, str(disk.path), 10)
    before = contents(disk.path)
    size = sum(map(len, before.values()))
    # not a block, half of the values, all of them but not the index
    for spare in (0, size // 2, size - 8192):
        disk.fill(spare)
        with pytest.raises(
            UserError, match=rf"model\.ckpt-20 cannot be saved: .*{FULL}"
        ) as refused:
            checkpoints.save(trainer.checkpoint, str(disk.path), 20)
        assert "{{" not in str(refused.value)
        os.remove(disk.path / "ballast")
        assert contents(disk.path) == before
        assert checkpoints.newest_intact(str(disk.path)) == (saved, [])
        assert not (disk.path / ".saving").exists()


def test_a_chief_whose_disk_fills_up_says_so_and_its_workers_whom_they_lost(
    make_disk, write_cifar10
):
    disk = make_disk("3m")
    workers = Workers(
        2,
        [
            *("run_trainer.py", f"--path={write_cifar10()}", f"--ckpt_path={disk.path / 'run'}"),
            *(*SMALL, "--num_iterations=200", "--save_per_iterations=5", "--max_ckpts=-1"),
        ],
    )
    (status, error), other = workers.ends()
    assert status == 1
    assert re.fullmatch(rf"run_trainer.py: error: \S+ cannot be saved: .*{FULL}.*\n", error), error
    assert_lost(other, 0)
    assert checkpoints.newest_intact(str(disk.path / "run"))[0]


def test_summaries_that_do_not_fit_stop_the_run_with_a_one_line_error(make_disk):
    disk = make_disk("256k")
    disk.fill()
    with (
        pytest.raises(UserError, match=rf"/log cannot be written: .*{FULL}"),
        Progress(RunConfig(), 0, 10, 400, str(disk.path / "log")) as progress,
    ):
        progress.log_training(1, 1.0, 0.5, 0.1, dict)
    os.remove(disk.path / "ballast")

    def train() -> None:
        with Progress(RunConfig(), 0, 10_000, 400, str(disk.path / "log")) as progress:
            disk.fill(4096)
            for step in range(1, 2000):
                progress.log_training(step, 1.0, 0.5, 0.1, dict)

    with pytest.raises(UserError, match=FULL):
        train()


def test_an_output_that_does_not_fit_ends_with_a_one_line_error():
    program = "from cifar10_resnet.cli.guard import exits_with_a_sentence\n"
    program += "@exits_with_a_sentence\ndef main():\n    {}\nexit(main())"
    for line in ("print(1, flush=True)", "import os; os.write(1, b'1')"):
        with open("/dev/full", "w") as full:
            ended = subprocess.run(
                [sys.executable, "-c", program.format(line)],
                cwd=PROJECT,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert ended.returncode == 1
        assert ended.stderr == (
            f"-c: error: the output cannot be written: {FULL}. Check the free space and the "
            "permissions, or use another path.\n"
        )


def test_figures_that_do_not_fit_leave_the_earlier_ones(make_disk):
    disk = make_disk()
    file = str(disk.path / "scores.json")
    storage.new_file(file, b"{}")
    disk.fill()
    before = contents(disk.path)
    with pytest.raises(UserError, match=rf"scores\.json cannot be written: {FULL}"):
        storage.new_file(file, bytes(400_000))
    assert contents(disk.path) == before


# --- Exports and data -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [export.export_saved_model, export.export_tflite])
def test_an_export_that_does_not_fit_leaves_nothing(make_disk, prefix, form, capfd):
    disk = make_disk()
    disk.fill(100_000)
    with pytest.raises(UserError, match=rf"cannot be written: .*{FULL}") as refused:
        form(checkpoints.read(prefix), str(disk.path / "exported"))
    assert "{{" not in str(refused.value)
    assert os.listdir(disk.path) == ["ballast"]


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("spare", [0, 4096, 40_000])
def test_plots_that_do_not_fit_leave_nothing(make_disk, tmp_path, spare):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(15):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    disk = make_disk()
    flags = [f"--image_dir={tmp_path / 'photos'}", f"--data_dir={disk.path / 'photos-bin'}"]
    disk.fill(spare)
    assert FULL in error_of("import", *flags)
    assert os.listdir(disk.path) == ["ballast"]
    os.remove(disk.path / "ballast")
    run("import", *flags)


@pytest.mark.parametrize("spare", [0, 100_000])
def test_generated_data_that_do_not_fit_leave_nothing(make_disk, spare, capsys):
    disk = make_disk()
    flags = ["--synthetic", "--synthetic_train_images=200", "--synthetic_test_images=10"]
    flags.append(f"--data_dir={disk.path}")
    disk.fill(spare)
    assert run_script(*flags) == 1
    assert FULL in one_line(capsys)
    assert os.listdir(disk.path) == ["ballast"]
    os.remove(disk.path / "ballast")
    assert run_script(*flags) == 0
    disk.remount("ro")
    assert run_script(*flags) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["archive", "data"])
def test_a_download_that_does_not_fit_resumes_once_there_is_room(
    make_disk, tmp_path, where, capsys, monkeypatch
):
    archive = replacing("test_batch.bin", batch(6, 60))
    (tmp_path / "a.tar.gz").write_bytes(archive)
    url = (tmp_path / "a.tar.gz").as_uri()
    disk = make_disk()
    flags = [f"--data_dir={disk.path}", f"--url={url}", f"--sha256={sha256(archive)}"]
    disk.fill(len(archive) // 2 if where == "archive" else len(archive) + 40_000)
    assert run_script(*flags) == 1
    error = one_line(capsys)
    assert FULL in error
    assert "run the same command again" in error
    left = [name for name in os.listdir(disk.path) if name != "ballast"]
    assert re.fullmatch(r"\['cifar-10-binary\.tar\.gz\.part'\]", str(left))
    os.remove(disk.path / "ballast")
    assert run_script(*flags) == 0
    assert os.listdir(disk.path) == ["cifar-10-batches-bin"]
