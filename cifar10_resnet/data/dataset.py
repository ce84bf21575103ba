"""Finds data sets by the files in a folder, and checks and counts the images of each split.

It imports nothing slow, so a wrong folder is refused before TensorFlow starts.
"""

import os
from dataclasses import dataclass

from cifar10_resnet.config import DataConfig
from cifar10_resnet.errors import UserError, unreadable
from cifar10_resnet.formats import FORMATS, Format
from cifar10_resnet.terminal import command

GZIP = b"\x1f\x8b"
DAMAGED = "It is damaged, or belongs to another data set."

# A run on synthetic images makes this many in memory.
SYNTHETIC_IMAGES = {"train": 10_000, "test": 2_000}


@dataclass(frozen=True)
class Dataset:
    """A data set and its folder. The files of a split are checked when they are asked for."""

    name: str
    folder: str | None = None  # None: synthetic images, made in memory

    @property
    def file_format(self) -> Format:
        return FORMATS[self.name]

    def describe(self, coarse_labels: bool = False) -> DataConfig:
        """Returns the name and the classes of the data set."""
        if self.folder is None:
            from cifar10_resnet.data import synthetic  # imports NumPy

            return DataConfig(self.name, synthetic.CLASS_NAMES)
        names = self.file_format.class_names(self.folder, coarse_labels)
        return DataConfig(self.name, names, coarse_labels=coarse_labels)

    def files(self, split: str) -> dict[str, int]:
        """Returns the files of "train" or "test", each with its number of images.

        Refuses missing and incomplete files.
        """
        files = [os.path.join(self.folder, name) for name in self.file_format.split_files(split)]
        return {file: _count_records(file, self.file_format) for file in files}

    def count(self, split: str) -> int:
        """Returns the number of images in "train" or "test", by the sizes of the files."""
        if self.folder is None:
            return SYNTHETIC_IMAGES[split]
        return sum(self.files(split).values())

    def count_without_holdout(self, holdout: int) -> int:
        """Returns the number of training images without the last `holdout` images."""
        count = self.count("train")
        if holdout >= count:
            raise UserError(
                f"is invalid: there are only {count:,} training images. Use fewer.",
                "holdout",
                holdout,
            )
        return count - holdout


def find(path: str | None = None, name: str | None = None) -> Dataset:
    """Returns the data set in the folder `path`, or in a folder inside it.

    Without a path, this is the folder that the download script makes. Without a name, the folder
    must contain exactly one data set.
    """
    if name == "synthetic":
        return Dataset(name)
    if path is None:
        path = FORMATS[name or "cifar10"].folder
        if not path:
            why = f"--dataset={name} has no default folder. Pass the folder as --path."
            raise UserError(why)
    found: dict[str, str] = {}
    for folder in (path, *_folders_inside(path)):
        files = _list(folder, path, name)
        for file_format in FORMATS.values():
            if files.intersection((*file_format.train_files, *file_format.test_files)):
                found.setdefault(file_format.dataset, folder)
    if name is None and len(found) == 1:
        (name,) = found
    if name in found:
        return Dataset(name, found[name])
    if not found:
        download, own = command("cifar10_download_and_extract.py"), command("import")
        raise UserError(
            f"is invalid: the folder contains no data set. Download one with `{download}`, or "
            f"import your photos with `{own}`.",
            "path",
            path,
        )
    titles = " and ".join(FORMATS[each].title for each in found)
    if name is None:
        raise UserError(f"contains {titles}. Choose one with --dataset.", "path", path)
    raise UserError(
        f"is invalid: the folder contains {titles}, not {FORMATS[name].title}. Use another --path "
        "or --dataset.",
        "path",
        path,
    )


def find_asked(path: str | None, name: str | None) -> Dataset | None:
    """Returns the data set that the user asked for, or None if the user did not ask."""
    return None if path is None and name is None else find(path, name)


def _folders_inside(path: str) -> list[str]:
    inside = [
        os.path.join(path, file_format.folder)
        for file_format in FORMATS.values()
        if file_format.folder
    ]
    return [folder for folder in inside if os.path.isdir(folder)]


def _list(folder: str, path: str, name: str | None) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError as error:
        flags = ["--dataset=cifar100"] if name == "cifar100" else []
        download = command("cifar10_download_and_extract.py", *flags)
        raise UserError(
            f"is invalid: the folder does not exist. Run `{download}`, or train on synthetic "
            "images with --use_synthetic_data.",
            "path",
            path,
        ) from error
    except NotADirectoryError as error:
        raise UserError(
            "is invalid: it is a file. Pass the folder that contains "
            f"{FORMATS['cifar10'].train_files[0]}.",
            "path",
            path,
        ) from error
    except OSError as error:
        raise unreadable(folder, error) from error


def _count_records(file: str, file_format: Format) -> int:
    if os.path.isdir(file):
        raise UserError(
            f"{file} is a folder. It must be a file of {file_format.record_bytes}-byte records."
        )
    try:
        with open(file, "rb") as opened:
            size, start = os.fstat(opened.fileno()).st_size, opened.read(2)
    except FileNotFoundError as error:
        raise UserError(
            f"{file} is missing: {file_format.title} is incomplete. Download it again, or use "
            "another --path."
        ) from error
    except OSError as error:
        raise unreadable(file, error) from error
    if problem := file_format.size_problem(file, size):
        packed = "It is packed with gzip. Unpack it first."
        raise UserError(f"{problem}. {packed if start == GZIP else DAMAGED}")
    return size // file_format.record_bytes
