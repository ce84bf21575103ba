"""Helpers of several test files: small data sets, readers of checkpoints, an ordinary user."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from programs import SMALL, run

from cifar10_resnet.errors import UserError
from cifar10_resnet.native import build

# The commands obey these. What a user's shell sets must not change what the tests see.
for name in ("TF_CPP_MIN_LOG_LEVEL", "TF_CONFIG", "NO_COLOR", "TERM", "COLUMNS"):
    os.environ.pop(name, None)
# A suite in the background (`make test &` in a script) ignores Ctrl-C, and its commands would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Builds the native kernels before the first test, so no command prints that it builds them."""
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(build.CannotBuild):
            build.library()


# The fixtures of the tests of pages and of the download.
pytest_plugins = ["browsers", "downloads"]

TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
NOBODY = 65534


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Undoes what a test changed in the environment, which the next test's commands inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def write_records(file: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """A file as its format is described: the label bytes, then the red, green, blue planes."""
    with open(file, "wb") as opened:
        for image, label in zip(images, labels, strict=True):
            planes = (image[:, :, channel].tobytes() for channel in range(3))
            opened.write(np.uint8(label).tobytes() + b"".join(planes))


def random_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count, np.uint8)


@pytest.fixture
def write_cifar10(tmp_path) -> Callable[..., Path]:
    """Writes `cifar-10-batches-bin`: training images over five files, test images in one."""

    def write(
        train: tuple[np.ndarray, np.ndarray] | None = None,
        test: tuple[np.ndarray, np.ndarray] | None = None,
        names: str | None = None,
        parent: Path = tmp_path,
    ) -> Path:
        train = train or random_images(20, seed=1)
        test = test or random_images(4, seed=2)
        folder = parent / "cifar-10-batches-bin"
        folder.mkdir(parents=True)
        parts = (np.array_split(values, len(TRAIN_FILES)) for values in train)
        for name, images, labels in zip(TRAIN_FILES, *parts, strict=True):
            write_records(folder / name, images, labels)
        write_records(folder / "test_batch.bin", *test)
        if names is not None:
            (folder / "batches.meta.txt").write_text(names)
        return folder

    return write


def write_random_cifar10(folder: Path) -> Path:
    """Writes `cifar-10-batches-bin` with 30 random images in each file, and returns it."""
    folder = folder / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate((*TRAIN_FILES, "test_batch.bin")):
        write_records(folder / name, *random_images(30, seed))
    return folder


def random_cifar100(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and their labels, coarse and fine, with the same values in both."""
    images, _ = random_images(count, seed)
    rng = np.random.default_rng(seed)
    return images, np.stack([rng.integers(0, n, count, np.uint8) for n in (20, 100)], axis=1)


def write_cifar100(
    folder: Path,
    train: tuple[np.ndarray, np.ndarray] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
) -> Path:
    """Writes the files of `cifar-100-binary`, whose classes are `fine 0` …, `coarse 0` …"""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "train.bin", *(train or random_cifar100(15, seed=1)))
    write_records(folder / "test.bin", *(test or random_cifar100(4, seed=2)))
    for kind, count in (("coarse", 20), ("fine", 100)):
        names = "".join(f"{kind} {i}\n" for i in range(count))
        (folder / f"{kind}_label_names.txt").write_text(names)
    return folder


def write_photos(folder: Path, num_classes: int, train: int = 15, test: int = 4) -> Path:
    """Writes a data folder as the import command does, of random images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train, 1), ("test", test, 2)):
        images, _ = random_images(count, seed)
        write_records(folder / f"pictures_{name}.bin", images, np.arange(count) % num_classes)
    names = "".join(f"class {i}\n" for i in range(num_classes))
    (folder / "class_names.txt").write_text(names)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files below a folder, by their paths within it."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def has_channels_first(dtype: str = "fp32") -> bool:
    """Returns whether this CPU can train with channels_first in this precision."""
    from cifar10_resnet.device import resolve_data_format

    try:
        resolve_data_format("channels_first", dtype, "cpu")
    except UserError:
        return False
    return True


def skip_without_channels_first(dtype: str = "fp32") -> None:
    if not has_channels_first(dtype):
        pytest.skip(f"this CPU lacks channels_first in {dtype}")


def values_in(prefix: str | Path) -> dict[str, object]:
    """The values in a checkpoint, by their names there, without TensorFlow's own bookkeeping."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(prefix))
    names = reader.get_variable_to_shape_map()
    return {n: reader.get_tensor(n) for n in names if not n.startswith("_CHECKPOINTABLE")}


@pytest.fixture
def as_nobody() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A `with` block in which file permissions count, for a root that would pass them all by."""

    @contextlib.contextmanager
    def nobody() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        try:
            os.seteuid(NOBODY)
        except OSError:
            pytest.skip("this root may not become another user")
        try:
            yield
        finally:
            os.seteuid(0)

    return nobody


def assert_same_checkpoint(one: str | Path, other: str | Path) -> None:
    ours, theirs = values_in(one), values_in(other)
    assert ours.keys() == theirs.keys()
    assert any("momentum" in name for name in ours)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data folder of 400 training images and 130 test images."""
    folder = tmp_path_factory.mktemp("data")
    run(
        *("cifar10_download_and_extract.py", "--synthetic", f"--data_dir={folder}"),
        *("--synthetic_train_images=400", "--synthetic_test_images=130"),
    )
    return folder / "cifar-10-batches-bin"


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory) -> Path:
    """A whole run of 60 steps, for others to be compared with."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(
        *("run_trainer.py", f"--path={data}", f"--ckpt_path={folder}", *SMALL),
        *("--num_iterations=60", "--save_per_iterations=20", "--max_ckpts=-1"),
    )
    return folder


def words_in(plot: Path) -> list[str]:
    """Returns the words in a PNG that the project drew."""
    from PIL import Image

    with Image.open(plot) as image:
        return image.info["Description"].split(" | ")
