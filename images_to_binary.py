"""Turns a folder of pictures, one sub-folder a class, into binary files that the trainer reads.

    python images_to_binary.py --image_dir=photos --data_dir=photos-bin
    python run_trainer.py --path=photos-bin

The classes have the names of the sub-folders. Each picture's middle square is resized to 32x32. A
share of every class becomes the test images. The data folder appears only once it is complete.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

import data_folder
from data_layout import LAYOUTS, MAX_CLASSES
from errors import UserError, exits_with_a_sentence
from pictures import read_picture_file

LAYOUT = LAYOUTS["pictures"]
THREADS = min(8, os.cpu_count() or 1)
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
AHEAD = 256  # pictures under way at a time: what bounds the memory, however many there are


# --- Finding the pictures -------------------------------------------------------------------------


def find_classes(image_dir: Path) -> dict[str, list[str]]:
    """The files of each class, in the order of their names."""
    if not image_dir.is_dir():
        raise UserError(f"there is no folder {image_dir}: name yours with --image_dir.")
    names = sorted(entry.name for entry in visible(image_dir) if entry.is_dir())
    if len(names) < 2:
        raise UserError(
            f"{image_dir} holds too few classes ({len(names)}): each sub-folder is one, with its "
            "pictures in it, and two at least are needed."
        )
    if len(names) > MAX_CLASSES:
        raise UserError(
            f"{image_dir} has {len(names)} sub-folders, each a class; up to {MAX_CLASSES} fit the "
            "label, which is one byte."
        )
    if SPLITS.issuperset(name.lower() for name in names):
        raise UserError(
            f"the sub-folders of {image_dir} ({', '.join(names)}) are no classes: give the folder "
            "of the classes itself; training and test images are parted here."
        )
    for name in names:
        if name != name.strip() or not name.isprintable():
            raise UserError(
                f"the sub-folder {name!a} of {image_dir} cannot name a class, which takes one "
                "line of text: rename it."
            )
    return {name: files_below(image_dir / name) for name in names}


def visible(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if not entry.name.startswith("."))


def files_below(folder: Path) -> list[str]:
    """All files of a class, those in deeper folders too; hidden ones are not meant."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def refuse_small_classes(counts: Mapping[str, int], what: str) -> None:
    small = [f"{name} ({count})" for name, count in counts.items() if count < 2]
    if small:
        raise UserError(
            f"too few {what} to be in both the training and the test images: {', '.join(small)}; "
            "give each class two at least, or move its folder away."
        )


def refuse_taken_place(image_dir: Path, data_dir: Path) -> None:
    if data_dir.resolve().is_relative_to(image_dir.resolve()):
        raise UserError(
            f"{data_dir} is inside {image_dir}, whose folders are classes: name a --data_dir "
            "elsewhere."
        )
    free = data_dir.name not in ("", "..") and not data_dir.is_symlink()
    if os.path.lexists(data_dir) and not (
        free and data_dir.is_dir() and not any(data_dir.iterdir())
    ):
        raise UserError(
            f"{data_dir} is already there, and not an empty folder: delete it, or name another "
            "--data_dir."
        )


# --- Reading and writing --------------------------------------------------------------------------


def read_all(files: Sequence[str]) -> Iterator[np.ndarray | str]:
    """Each file's picture, or the sentence that refuses it: in order, but read in parallel."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files), AHEAD):
            yield from pool.map(read_or_refuse, files[start : start + AHEAD])


def read_or_refuse(file: str) -> np.ndarray | str:
    if not os.path.isfile(file):
        return f"{file} is not a file."
    try:
        return read_picture_file(file)
    except UserError as error:
        return str(error)


def write_records(classes: Mapping[str, Sequence[str]], records: BinaryIO) -> np.ndarray:
    """Writes a record for each picture that can be read, class by class; returns their labels."""
    expected = [label for label, files in enumerate(classes.values()) for _ in files]
    labels = bytearray()
    pictures = read_all([file for files in classes.values() for file in files])
    tenth = max(1, len(expected) // 10)
    with tqdm(
        total=len(expected), disable=not sys.stdout.isatty(), file=sys.stdout, unit=" files"
    ) as bar:
        for done, (label, picture) in enumerate(zip(expected, pictures, strict=True), 1):
            if isinstance(picture, str):
                bar.write(f"skipped: {printable(picture)}", file=sys.stdout)
            else:
                records.write(bytes([label]) + picture.transpose(2, 0, 1).tobytes())
                labels.append(label)
            bar.update()
            if bar.disable and done % tenth == 0:
                print(f"read {done} of {len(expected)} files", flush=True)
    records.flush()
    print(f"{len(labels)} of {len(expected)} files are pictures that can be read")
    return np.frombuffer(labels, np.uint8)


def printable(text: str) -> str:
    """A file's name may hold line breaks, a terminal's commands, or bytes that are no text."""
    return "".join(char if char.isprintable() else "?" for char in text)


def split(labels: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The places of the training and of the test images: a share of each class, in random order."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(places) * test_share), 1), len(places) - 1)
        test.append(places[:count])
        train.append(places[count:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def fill(folder: Path, classes: Mapping[str, Sequence[str]], test_share: float, seed: int) -> None:
    """Writes the data folder's files and says what is in them."""
    with tempfile.TemporaryFile(dir=folder) as file:
        labels = write_records(classes, file)
        counts = np.bincount(labels, minlength=len(classes))
        refuse_small_classes(dict(zip(classes, counts, strict=True)), "pictures that can be read")
        records = np.memmap(file, np.uint8, "r", shape=(len(labels), LAYOUT.record_bytes))
        train, test = split(labels, test_share, seed)
        for (name,), places in ((LAYOUT.train_files, train), (LAYOUT.test_files, test)):
            with open(folder / name, "wb") as out:
                for start in range(0, len(places), AHEAD):
                    out.write(records[places[start : start + AHEAD]].tobytes())
    names = "".join(f"{name}\n" for name in classes)
    (folder / LAYOUT.labels[0].names_file).write_text(names, encoding="utf-8")

    width = max(len(name) for name in classes) + 2
    print(f"{'':<{width}}{'training':>8}{'test':>8}")
    tested = np.bincount(labels[test], minlength=len(classes))
    for name, count, test_count in zip(classes, counts, tested, strict=True):
        print(f"{name:<{width}}{count - test_count:>8}{test_count:>8}")
    print(f"{'all':<{width}}{len(train):>8}{len(test):>8}")


# --- The program ----------------------------------------------------------------------------------


def fraction(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def folder(text: str) -> Path:
    return Path(text).expanduser()


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Turns a folder of pictures, one sub-folder a class, into binary files that "
        "run_trainer.py reads. JPEG, PNG and BMP pictures of any size will do.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image_dir", metavar="DIR", type=folder, required=True, help="has a sub-folder per class")
    add("--data_dir", metavar="DIR", type=folder, required=True, help="the folder to make")
    add(
        "--test_share",
        metavar="S",
        type=fraction,
        default=0.2,
        help="share of each class that becomes test images (default: %(default)s)",
    )
    add(
        "--seed",
        metavar="N",
        type=whole_number,
        default=0,
        help="of the split and the order (default: %(default)s)",
    )
    return parser.parse_args(argv)


def import_pictures(flags: argparse.Namespace) -> None:
    classes = find_classes(flags.image_dir)
    refuse_taken_place(flags.image_dir, flags.data_dir)
    refuse_small_classes({name: len(files) for name, files in classes.items()}, "files")
    for entry in sorted(visible(flags.image_dir)):
        if not entry.is_dir():
            print(f"skipped: {printable(str(entry))} is in no class's folder.")
    source = f"pictures of {len(classes)} classes, test share {flags.test_share}, seed {flags.seed}"
    with data_folder.only_run_in(flags.data_dir.parent):
        data_folder.write_folder(
            flags.data_dir,
            LAYOUT,
            source,
            lambda part: fill(part, classes, flags.test_share, flags.seed),
        )
    print(f"next: python run_trainer.py --path={shlex.quote(str(flags.data_dir))}", flush=True)


@exits_with_a_sentence
def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    try:
        import_pictures(flags)
    except KeyboardInterrupt:
        print(
            f"{os.path.basename(sys.argv[0])}: stopped before the data was complete, so nothing of "
            "it was kept.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        raise  # it says nothing of the data
    except OSError as error:
        raise UserError(
            f"cannot use {error.filename or flags.data_dir}: {error.strerror or error}; mend that "
            "and run the same command again."
        ) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
