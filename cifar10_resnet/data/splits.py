"""Reads training, holdout and test images into memory."""

from typing import NamedTuple

import numpy as np

from cifar10_input import ImageSet, mean_image, read_records
from cifar10_resnet.config import DataConfig
from cifar10_resnet.data import synthetic
from cifar10_resnet.data.dataset import DAMAGED, Dataset
from cifar10_resnet.errors import UserError, unreadable


def load(data: Dataset, split: str, coarse_labels: bool = False) -> ImageSet:
    """Returns all images of "train" or "test". The training images include the holdout."""
    if data.folder is None:
        images, labels = synthetic.make_split(split, data.count(split))
        return ImageSet(images, labels.astype(np.int32))
    files, file_format = data.files(split), data.file_format
    try:
        images, labels = read_records(list(files), len(file_format.labels))
        if len(labels) != sum(files.values()):
            raise ValueError(f"{data.folder} changed while it was read")
    except ValueError as error:  # The files were whole a moment ago.
        raise UserError(f"{error}. Start again once it is whole.") from error
    except OSError as error:
        raise unreadable(error.filename, error) from error
    _check_labels(labels, files, data)
    return ImageSet(images, labels[:, file_format.label_column(coarse_labels)].astype(np.int32))


def _check_labels(labels: np.ndarray, files: dict[str, int], data: Dataset) -> None:
    """Refuses labels that have no class."""
    class_counts = data.file_format.class_counts(data.folder)
    for file, count in files.items():
        columns = [column.tobytes() for column in labels[:count].T]
        if problem := data.file_format.label_problem(file, columns, class_counts):
            raise UserError(f"{problem}. {DAMAGED}")
        labels = labels[count:]


def load_training(data: Dataset, config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Returns the images to train on, and the holdout: the last training images."""
    kept = data.count_without_holdout(config.holdout)
    examples = load(data, "train", config.coarse_labels)
    return examples.part(slice(kept)), examples.part(slice(kept, None))


def load_split(data: Dataset, config: DataConfig, split: str) -> ImageSet:
    """Returns a split of a run: "train" (without the holdout), "holdout" or "test"."""
    if split == "test":
        return load(data, "test", config.coarse_labels)
    if split == "holdout" and not config.holdout:
        raise UserError("is invalid: this run has no holdout. Use --split=test.", "split", split)
    train, holdout = load_training(data, config)
    return train if split == "train" else holdout


class RunImages(NamedTuple):
    """The images of a run: its training images, their mean, and the images to evaluate on."""

    train: ImageSet
    mean: np.ndarray
    scored_split: str
    scored: ImageSet | None


def load_run(data: Dataset, config: DataConfig, evaluates: bool) -> RunImages:
    """Returns the images of a run. Without a holdout, it evaluates on the test images."""
    train, scored = load_training(data, config)
    if not config.holdout:
        scored = load_split(data, config, "test") if evaluates else None
    return RunImages(train, mean_image(train.images), config.scored_split, scored)
