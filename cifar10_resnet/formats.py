"""Defines each data set's file format: its files, records, class names and official archive.

Everything about the file formats is here. This module needs only Python, so neither `--help` nor
the download script waits for TensorFlow.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cifar10_resnet.errors import UserError, unreadable

SIDE, CHANNELS = 32, 3
IMAGE_BYTES = SIDE * SIDE * CHANNELS  # the red, the green and the blue plane, each row by row
MAX_CLASSES = 256  # A label is a byte.
CHUNK_RECORDS = 256

CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
ALGORITHMS = {"sha256": "SHA-256", "md5": "MD5"}


class Digest(NamedTuple):
    """A digest of a file's bytes. `algorithm` is its name in `hashlib`."""

    algorithm: str
    value: str

    def __str__(self) -> str:
        return f"{ALGORITHMS[self.algorithm]} {self.value}"


class Archive(NamedTuple):
    """The address and the digest of a data set's official archive."""

    url: str
    digest: Digest

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


class Label(NamedTuple):
    """One of the bytes that a record begins with, and the file that names its classes."""

    kind: str
    names_file: str
    num_classes: int | None = None  # None: the number of names in the file
    names: tuple[str, ...] = ()  # used if the file is missing


@dataclass(frozen=True)
class Format:
    """The file format of a data set: records of label bytes and pixels, in these files."""

    dataset: str
    title: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    labels: tuple[Label, ...]  # A run learns the last, or the first for coarse labels.
    folder: str = ""  # the folder in the archive, and the default data folder
    archive: Archive | None = None

    @property
    def record_bytes(self) -> int:
        return len(self.labels) + IMAGE_BYTES

    @property
    def files(self) -> tuple[str, ...]:
        """Returns the names of all files in a complete data folder."""
        return (*self.train_files, *self.test_files, *(label.names_file for label in self.labels))

    def split_files(self, split: str) -> tuple[str, ...]:
        """Returns the names of the files of "train" or "test"."""
        return {"train": self.train_files, "test": self.test_files}[split]

    def label_column(self, coarse: bool) -> int:
        """Returns the index of the label byte to learn."""
        if coarse and len(self.labels) == 1:
            why = "is for CIFAR-100, whose images have two labels each. Remove it."
            raise UserError(why, "coarse_labels", coarse)
        return 0 if coarse else len(self.labels) - 1

    def class_names(self, folder: str, coarse: bool = False) -> tuple[str, ...]:
        """Returns the names of the classes to learn, from the file next to the records."""
        return self.read_names(folder, self.labels[self.label_column(coarse)])

    def read_names(self, folder: str, label: Label) -> tuple[str, ...]:
        """Returns the names of the classes of one label byte."""
        file = os.path.join(folder, label.names_file)
        if label.names and not os.path.exists(file):
            return label.names
        try:
            with open(file, encoding="utf-8") as lines:
                names = tuple(line.strip() for line in lines if line.strip())
        except OSError as error:
            raise unreadable(file, error) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text. Save the class names as UTF-8.") from error
        if odd := [name for name in names if not name.isprintable()]:
            raise UserError(
                f"{file} contains a class name that cannot be printed: {odd[0]!a:.60}. Rename it."
            )
        least, most = label.num_classes or 2, label.num_classes or MAX_CLASSES
        if not least <= len(names) <= most:
            expected = most if least == most else f"{least} to {most}"
            raise UserError(
                f"{file} contains {len(names)} class names. Use a file of {self.title}, with "
                f"{expected} names."
            )
        return names

    def class_counts(self, folder: str) -> list[int]:
        """Returns the number of classes of each label byte."""
        return [label.num_classes or len(self.read_names(folder, label)) for label in self.labels]

    def problem_in(self, folder: Path) -> str | None:
        """Returns what is wrong with a data folder's files, sizes, labels or names, or None."""
        for name in self.files:
            if not (folder / name).is_file():
                return f"{name} is missing"
        try:
            counts = [len(self.read_names(str(folder), label)) for label in self.labels]
        except UserError as error:
            return str(error).rstrip(".")
        problems = (
            self._problem_in_records(folder / name, counts)
            for name in (*self.train_files, *self.test_files)
        )
        return next(filter(None, problems), None)

    def _problem_in_records(self, file: Path, counts: Sequence[int]) -> str | None:
        if problem := self.size_problem(file.name, file.stat().st_size):
            return problem
        first, size = 0, self.record_bytes
        with open(file, "rb") as opened:
            while chunk := opened.read(CHUNK_RECORDS * size):
                columns = [chunk[i::size] for i in range(len(counts))]
                if problem := self.label_problem(file.name, columns, counts, first):
                    return problem
                first += CHUNK_RECORDS
        return None

    def size_problem(self, file: str, size: int) -> str | None:
        """Returns why a file of `size` bytes cannot consist of records, or None if it can."""
        if size == 0:
            return f"{file} is empty, where {self.record_bytes}-byte records were expected"
        whole, rest = divmod(size, self.record_bytes)
        if not rest:
            return None
        return (
            f"{file} has {size:,} bytes, not a multiple of {self.record_bytes} "
            f"({self.title}): the last record, at byte {whole * self.record_bytes:,}, is cut "
            f"off after {rest:,}"
        )

    def label_problem(
        self, file: str, columns: Sequence[bytes], counts: Sequence[int], first_record: int = 0
    ) -> str | None:
        """Returns what is wrong with records' labels, or None. `columns` has one per label byte."""
        for column, (label, values, count) in enumerate(
            zip(self.labels, columns, counts, strict=True)
        ):
            if max(values, default=0) >= count:
                place, value = next((i, v) for i, v in enumerate(values) if v >= count)
                record = first_record + place
                return (
                    f"{file} has the {label.kind} {value} in record {record} (byte "
                    f"{record * self.record_bytes + column:,}), where 0 to {count - 1} are expected"
                )
        return None


FORMATS = {
    file_format.dataset: file_format
    for file_format in (
        Format(
            dataset="cifar10",
            title="CIFAR-10",
            train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            test_files=("test_batch.bin",),
            labels=(Label("label", "batches.meta.txt", 10, CIFAR10_NAMES),),
            folder="cifar-10-batches-bin",
            archive=Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                Digest(
                    "sha256", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
                ),
            ),
        ),
        Format(
            dataset="cifar100",
            title="CIFAR-100",
            train_files=("train.bin",),
            test_files=("test.bin",),
            labels=(
                Label("coarse label", "coarse_label_names.txt", 20),
                Label("fine label", "fine_label_names.txt", 100),
            ),
            folder="cifar-100-binary",
            archive=Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                Digest("md5", "03b5dce01913d631647c71ecec9e9cb8"),
            ),
        ),
        # Photos are imported into this format. Its file names differ from all names above, because
        # the programs detect a data set from its files.
        Format(
            dataset="pictures",
            title="imported photos",
            train_files=("pictures_train.bin",),
            test_files=("pictures_test.bin",),
            labels=(Label("label", "class_names.txt"),),
        ),
    )
}
