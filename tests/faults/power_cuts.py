"""Cuts the power after the programs have written each kind of output, and within a save.

    python tests/faults/power_cuts.py

Each output goes to an ext4 file system inside a file, mounted by loop. A copy of that file is the
disk as a power cut leaves it: it contains only what the system has written by then. The drill
copies the file at once and up to 9 seconds later, mounts the copy and compares. This needs root.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import numpy as np  # noqa: E402
from downloads import batch, replacing, sha256  # noqa: E402
from PIL import Image  # noqa: E402
from programs import SMALL, run  # noqa: E402

from cifar10_resnet import checkpoints, storage  # noqa: E402

DELAYS = (0, 1, 5, 9)  # seconds; ext4 writes its journal after 5, and data after 30
NETWORK = PROJECT / "files" / "pretrained" / "resnet20"
# Nothing promises that the last curves survive. Their files grow as the run does.
UNPROMISED = "log"


class Disk:
    """An ext4 file system inside a file."""

    def __init__(self, folder: Path, mib: int = 48):
        self.path, self._image, self._folder = folder / "disk", folder / "image", folder
        self.path.mkdir()
        _call("truncate", f"--size={mib}M", self._image)
        _call("mkfs.ext4", "-q", self._image)
        _call("mount", "-o", "loop", self._image, self.path)

    def close(self) -> None:
        _call("umount", self.path)

    def copy(self, name: str = "copy") -> Path:
        """Returns a copy of the disk as a power cut would leave it now."""
        _call("cp", "--sparse=always", self._image, self._folder / name)
        return self._folder / name


def _call(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


@contextlib.contextmanager
def mounted(copy: Path) -> Iterator[Path]:
    """Mounts a copy of a disk, which first repairs it from its journal."""
    place = copy.with_name(f"{copy.name}-mounted")
    place.mkdir()
    _call("mount", "-o", "loop", copy, place)
    try:
        yield place
    finally:
        _call("umount", place)
        place.rmdir()
        copy.unlink()


@contextlib.contextmanager
def new_disk(folder: Path) -> Iterator[Disk]:
    folder.mkdir()
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.close()
        shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Returns all files of a disk with their bytes, except those without a promise."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {n: file.read_bytes() for n, file in files.items() if UNPROMISED not in Path(n).parts}


# --- Every kind of output -------------------------------------------------------------------------


def make_sources(folder: Path) -> Path:
    """Makes what the programs below read: data, photos, an archive and a run with curves."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    (folder / "archive.tar.gz").write_bytes(replacing("test_batch.bin", batch(6, 60)))
    run(
        *("cifar10_download_and_extract.py", "--synthetic", f"--data_dir={folder}"),
        *("--synthetic_train_images=200", "--synthetic_test_images=50"),
    )
    return folder


def photos(source: Path, disk: Path) -> None:
    run("import", f"--image_dir={source / 'photos'}", f"--data_dir={disk / 'new' / 'photos-bin'}")


def synthetic_images(source: Path, disk: Path) -> None:
    sizes = ("--synthetic_train_images=200", "--synthetic_test_images=50")
    run("cifar10_download_and_extract.py", "--synthetic", f"--data_dir={disk / 'new'}", *sizes)


def download(source: Path, disk: Path) -> None:
    archive = source / "archive.tar.gz"
    run(
        *("cifar10_download_and_extract.py", f"--data_dir={disk / 'new'}", "--keep_archive"),
        *(f"--url={archive.as_uri()}", f"--sha256={sha256(archive.read_bytes())}"),
    )


def training(source: Path, disk: Path) -> None:
    """A run with two checkpoints, which exports its network."""
    run(
        *("run_trainer.py", f"--path={source}", *SMALL, "--num_iterations=4"),
        *("--save_per_iterations=2", f"--ckpt_path={disk / 'new' / 'run'}"),
        f"--export_dir={disk / 'exports' / 'saved-model'}",
    )


def evaluation(source: Path, disk: Path) -> None:
    """Results, a report and plots."""
    run(
        *("run_evaluator.py", f"--path={source}", f"--ckpt_path={network_of(source)}"),
        *(f"--output_json={disk / 'results.json'}", f"--report={disk / 'report.html'}"),
        f"--plot_dir={disk / 'new' / 'plots'}",
    )


def network_of(source: Path) -> Path:
    """Returns a small run on the synthetic images, trained when it is first needed."""
    if not (source / "run").exists():
        run(
            *("run_trainer.py", f"--path={source}", *SMALL, "--num_iterations=10"),
            f"--ckpt_path={source / 'run'}",
        )
    return source / "run"


def curves(source: Path, disk: Path) -> None:
    run("plot", f"--run={network_of(source)}", f"--output={disk / 'curves.png'}")


def diagram(source: Path, disk: Path) -> None:
    run("draw", "--num_layers=8", *(f"--output={disk / name}" for name in ("a.pdf", "a.png")))


def litert(source: Path, disk: Path) -> None:
    run("export", f"--ckpt_path={NETWORK}", f"--export_dir={disk / 'lite'}", "--format=tflite")


def json_file(source: Path, disk: Path) -> None:
    """A file that is replaced."""
    storage.new_file(disk / "results.json", bytes(10_000))
    storage.new_file(disk / "results.json", b"new" * 10_000)


OUTPUTS = (
    *(photos, synthetic_images, download, training, evaluation),
    *(curves, diagram, litert, json_file),
)


def differences(
    write: Callable[[Path, Path], None], source: Path, folder: Path, delays: tuple[int, ...]
) -> list[str]:
    """Writes one kind of output, cuts the power after each delay, and returns what differs."""
    with new_disk(folder) as disk:
        write(source, disk.path)
        began = time.monotonic()
        copies = {}
        for delay in delays:
            time.sleep(max(0, began + delay - time.monotonic()))
            copies[delay] = disk.copy(f"after-{delay}")
        expected, found = contents(disk.path), []
        assert expected, f"{write.__name__} wrote nothing"
        for delay, copy in copies.items():
            with mounted(copy) as place:
                left = contents(place)
            found += [
                f"{delay} s: {name} has {len(left.get(name, b''))} of {len(content)} bytes"
                for name, content in expected.items()
                if left.get(name) != content
            ]
        return found


# --- Within a save --------------------------------------------------------------------------------


def steps_after_cuts(trainer, folder: Path) -> list[int]:
    """Saves step 20 after step 10, and cuts the power before every change and sync.

    Returns the step of the newest intact checkpoint after each cut.
    """
    copies = []

    def cutting(function: Callable) -> Callable:
        def cut_then_call(*arguments, **keywords):
            copies.append(disk.copy(f"cut-{len(copies)}"))
            return function(*arguments, **keywords)

        return cut_then_call

    with new_disk(folder) as disk:
        run_folder = disk.path / "run"
        storage.make_folders(run_folder)
        checkpoints.save(trainer.checkpoint, str(run_folder), 10, 1)
        expected = contents(disk.path)
        with contextlib.ExitStack() as patches:
            for name in ("fsync", "replace", "remove", "rmdir"):
                patches.enter_context(mock.patch.object(os, name, cutting(getattr(os, name))))
            checkpoints.save(trainer.checkpoint, str(run_folder), 20, 1)
        copies.append(disk.copy("at-the-end"))
        expected |= contents(disk.path)
        steps = []
        for copy in copies:
            with mounted(copy) as place:
                prefix, _ = checkpoints.newest_intact(str(place / "run"))
                step = int(prefix.rpartition("-")[2]) if prefix else 0
                for suffix in checkpoints.SUFFIXES:
                    name = f"run/{checkpoints.NAME}-{step}{suffix}"
                    assert (place / name).read_bytes() == expected[name], name
            steps.append(step)
        return steps


def main() -> None:
    from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig
    from cifar10_resnet.training.trainer import Trainer

    failed = []
    with tempfile.TemporaryDirectory() as top:
        source = make_sources(Path(top))
        network_of(source)
        for write in OUTPUTS:
            found = differences(write, source, Path(top) / "disks", DELAYS)
            failed += found
            print(f"{write.__name__:<20}{len(DELAYS)} cuts  {found or 'complete'}", flush=True)
        config = RunConfig(ModelConfig(num_layers=8), training=TrainingConfig(batch_size=8))
        steps = steps_after_cuts(Trainer(config), Path(top) / "disks")
        print(f"{'within a save':<20}{len(steps)} cuts  steps {steps}")
        if 0 in steps or steps != sorted(steps) or steps[-1] != 20:
            failed.append("within a save")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
