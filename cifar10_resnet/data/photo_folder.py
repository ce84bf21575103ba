"""Turns a folder of photos, with a sub-folder for each class, into a data folder.

The classes have the names of the sub-folders. Each photo's centre square is scaled to 32x32. A
share of every class becomes the test images. The data folder appears only once it is complete.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cifar10_resnet import storage
from cifar10_resnet.data.photos import read_photo_file
from cifar10_resnet.errors import UserError, printable, unreadable
from cifar10_resnet.formats import FORMATS, MAX_CLASSES
from cifar10_resnet.terminal import LiveLine, table

FORMAT = FORMATS["pictures"]
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
THREADS = min(8, os.cpu_count() or 1)
AHEAD = 256  # photos or records in memory at a time


# --- Finding the photos ---------------------------------------------------------------------------


def find_classes(image_dir: Path) -> dict[str, list[str]]:
    """Returns the files of each class, in the order of the classes' names."""
    try:
        entries = sorted(visible(image_dir))
        classes = {entry.name: files_below(entry) for entry in entries if entry.is_dir()}
    except OSError as error:
        raise unreadable(error.filename, error) from error
    refuse_no_classes(image_dir, list(classes))
    for entry in entries:
        if entry.name not in classes:
            print(f"skipped: {printable(str(entry))} is not in a class folder.")
    return classes


def visible(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if not entry.name.startswith("."))


def files_below(folder: Path) -> list[str]:
    """Returns all files of a class, also from deeper folders, but no hidden files."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, inside, files in os.walk(folder, onerror=fail):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [os.path.join(place, name) for name in files if not name.startswith(".")]
        # A link to a folder could lead in circles, so it is skipped as not a file.
        found += [path for name in inside if os.path.islink(path := os.path.join(place, name))]
    return sorted(found)


def refuse_no_classes(image_dir: Path, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise UserError(
            "is invalid: it has fewer than two sub-folders. Use one per class.",
            "image_dir",
            image_dir,
        )
    if len(names) > MAX_CLASSES:
        raise UserError(
            f"is invalid: it has {len(names)} sub-folders. Use up to {MAX_CLASSES}, one per class.",
            "image_dir",
            image_dir,
        )
    if SPLITS.issuperset(name.lower() for name in names):
        raise UserError(
            f"is already split into {' and '.join(names)}. Pass the folder that contains the "
            "classes.",
            "image_dir",
            image_dir,
        )
    for name in names:
        if name != name.strip() or not name.isprintable():
            raise UserError(
                f"{str(image_dir / name)!a} is not a class name that can be printed. Rename the "
                "folder."
            )


def refuse_small_classes(counts: Mapping[str, int], what: str) -> None:
    small = [f"{name} ({count})" for name, count in counts.items() if count < 2]
    if small:
        raise UserError(
            f"Too few {what} in {', '.join(small)}. Each class needs at least two. Add photos, or "
            "move the folder away."
        )


# --- Reading and writing --------------------------------------------------------------------------


def read_all(files: Sequence[str]) -> Iterator[np.ndarray | str]:
    """Yields each file's image or the text of its error, in order, but reads in parallel."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files), AHEAD):
            yield from pool.map(read_or_refuse, files[start : start + AHEAD])


def read_or_refuse(file: str) -> np.ndarray | str:
    if not os.path.isfile(file):
        return f"{file} is not a file."
    try:
        return read_photo_file(file)
    except UserError as error:
        return str(error)


def write_records(classes: Mapping[str, Sequence[str]], records: BinaryIO) -> np.ndarray:
    """Writes a record for each readable photo, class by class, and returns their labels."""
    expected = [label for label, files in enumerate(classes.values()) for _ in files]
    labels = bytearray()
    photos = read_all([file for files in classes.values() for file in files])
    with LiveLine(plain=True) as line:
        for done, (label, photo) in enumerate(zip(expected, photos, strict=True), 1):
            if isinstance(photo, str):
                line.write(f"skipped: {printable(photo)}")
            else:
                records.write(bytes([label]) + photo.transpose(2, 0, 1).tobytes())
                labels.append(label)
            line.update(done / len(expected), f"read {done} of {len(expected)} files")
    records.flush()
    print(f"{len(labels)} of {len(expected)} files are readable photos")
    return np.frombuffer(labels, np.uint8)


def split(labels: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the training and test images: a share of each class, shuffled."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(places) * test_share), 1), len(places) - 1)
        test.append(places[:count])
        train.append(places[count:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def write_files(
    folder: str, classes: Mapping[str, Sequence[str]], test_share: float, seed: int
) -> int:
    """Writes and counts the data folder's records. Returns the number of training images."""
    train_file, test_file, names_file = (os.path.join(folder, name) for name in FORMAT.files)
    with tempfile.TemporaryFile(dir=folder) as scratch:
        labels = write_records(classes, scratch)
        counts = np.bincount(labels, minlength=len(classes))
        refuse_small_classes(dict(zip(classes, counts, strict=True)), "readable photos")
        records = np.memmap(scratch, np.uint8, "r", shape=(len(labels), FORMAT.record_bytes))
        train, test = split(labels, test_share, seed)
        for file, places in ((train_file, train), (test_file, test)):
            with open(file, "wb") as out:
                for start in range(0, len(places), AHEAD):
                    out.write(records[places[start : start + AHEAD]].tobytes())
    with open(names_file, "w", encoding="utf-8") as out:
        out.writelines(f"{name}\n" for name in classes)
    show_counts(list(classes), np.bincount(labels[train]), np.bincount(labels[test]))
    return len(train)


def show_counts(names: Sequence[str], train: np.ndarray, test: np.ndarray) -> None:
    rows = zip(names, train, test, strict=True)
    header, total = ("", "training", "test"), ("all", train.sum(), test.sum())
    print(table([header, *rows, total], "<>>", indent=""))


def import_photos(image_dir: str, data_dir: str, test_share: float = 0.2, seed: int = 0) -> int:
    """Makes a data folder from the photos in `image_dir`. Returns how many are for training."""
    storage.refuse_remote(data_dir)
    if Path(data_dir).resolve().is_relative_to(Path(image_dir).resolve()):
        raise UserError(
            "is invalid: it is inside --image_dir. Use a folder outside.",
            "data_dir",
            data_dir,
        )
    classes = find_classes(Path(image_dir))
    refuse_small_classes({name: len(files) for name, files in classes.items()}, "files")
    storage.refuse_unwritable_folder(data_dir)
    with storage.new_folder(data_dir) as folder:
        return write_files(folder, classes, test_share, seed)
