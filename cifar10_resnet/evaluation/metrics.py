"""The results of an evaluation: each image's prediction, and the numbers computed from them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cifar10_resnet.config import RunConfig
from cifar10_resnet.terminal import table

NUM_BINS = 15
MISTAKES_SHOWN = 24
MATRIX_LEGEND = (
    "Rows: true class. Columns: predicted class. Blue: correct. Darker: larger share of the row."
)


class Calibration(NamedTuple):
    """The number of images, the accuracy and the mean confidence in each bin of confidence.

    The accuracy and confidence of an empty bin are nan.
    """

    counts: np.ndarray
    accuracies: np.ndarray
    confidences: np.ndarray

    @property
    def error(self) -> float:
        """Returns the expected calibration error: the mean gap between accuracy and confidence."""
        gaps = np.abs(self.accuracies - self.confidences)
        filled = self.counts > 0
        return float(np.average(gaps[filled], weights=self.counts[filled]))


def calibration(confidences: np.ndarray, correct: np.ndarray) -> Calibration:
    """Returns the calibration in bins of equal width. Each bin includes its upper end."""
    bins = np.searchsorted(np.linspace(0, 1, NUM_BINS + 1)[1:-1], confidences)
    counts, right, confident = (
        np.bincount(bins, weights, NUM_BINS) for weights in (None, correct, confidences)
    )
    filled = np.where(counts, counts, np.nan)
    return Calibration(counts, right / filled, confident / filled)


def wilson_interval(
    right: np.ndarray | int, count: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns Wilson's 95% interval for the share `right` / `count`."""
    z = 1.959964
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    spread /= 1 + z * z / count
    return np.clip(middle - spread, 0, 1), np.clip(middle + spread, 0, 1)


def accuracy_by_class(matrix: np.ndarray) -> np.ndarray:
    """Returns the accuracies in a confusion matrix. A class without images has nan."""
    counts = matrix.sum(axis=1)
    return np.diag(matrix) / np.where(counts, counts, np.nan)


def shades_of(matrix: np.ndarray) -> np.ndarray:
    """Returns how dark to show each cell of a confusion matrix, from 0 to 1."""
    # The square root makes a few mistakes among hundreds visible.
    return np.sqrt(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))


@dataclass(frozen=True)
class Metrics:
    """The loss and top-5 accuracy, and each image's label, prediction and confidence."""

    loss: float
    top_5_accuracy: float
    labels: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    num_classes: int

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> np.ndarray:
        """Returns for each image whether its prediction is correct."""
        return self.labels == self.predictions

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Returns the accuracy's 95% interval. It treats the images as a random sample."""
        low, high = wilson_interval(self.correct.sum(), self.num_images)
        return float(low), float(high)

    @property
    def calibration(self) -> Calibration:
        return calibration(self.confidences, self.correct)

    @property
    def confusion_matrix(self) -> np.ndarray:
        """Returns a matrix: `[i, j]` counts images of class i with prediction j."""
        pairs = self.labels * self.num_classes + self.predictions
        counts = np.bincount(pairs, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)

    def most_confident_mistakes(self, most: int) -> np.ndarray:
        """Returns the indices of up to `most` wrong predictions, the most confident first."""
        wrong = np.flatnonzero(~self.correct)
        return wrong[np.argsort(-self.confidences[wrong], kind="stable")][:most]

    @property
    def per_class_accuracy(self) -> list[float | None]:
        """Returns the accuracy of each class, or None for a class without images."""
        shares = accuracy_by_class(self.confusion_matrix)
        return [None if np.isnan(share) else float(share) for share in shares]

    @property
    def has_top_5(self) -> bool:
        """Returns whether the top-5 accuracy can be below 100%: not with five classes or fewer."""
        return self.num_classes > 5

    def report(self, names: Sequence[str]) -> str:
        """Returns the results as readable text."""
        rows = {
            "images": self.num_images,
            "loss": f"{self.loss:.4f}",
            "accuracy": f"{self.accuracy:.2%}",
            "top-5 accuracy": f"{self.top_5_accuracy:.2%}",
            "calibration error": f"{self.calibration.error:.2%}",
        }
        if not self.has_top_5:
            del rows["top-5 accuracy"]
        shares = [
            "no images" if accuracy is None else f"{accuracy:.2%}"
            for accuracy in self.per_class_accuracy
        ]
        classes = table(zip(names, shares, strict=True), "<>", indent="    ")
        return f"{table(rows.items())}\n{classes}"


@dataclass(frozen=True)
class Scored:
    """A checkpoint and the results of its evaluation."""

    checkpoint: str
    step: int
    run: RunConfig
    split: str
    metrics: Metrics
    images: np.ndarray = field(repr=False)

    def line(self) -> str:
        """Returns the accuracy and the loss in one line."""
        return (
            f"{self.checkpoint} on {self.split} images: accuracy {self.metrics.accuracy:.2%}, "
            f"loss {self.metrics.loss:.4f}"
        )

    def report(self) -> str:
        """Returns the results as readable text."""
        head = f"{self.checkpoint} ({self.run.model.name}, step {self.step}) on {self.split} images"
        return f"{head}\n{self.metrics.report(self.run.data.class_names)}"

    def as_json(self) -> dict[str, Any]:
        """Returns the results as an object for JSON."""
        return {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "split": self.split,
            "num_images": self.metrics.num_images,
            "loss": self.metrics.loss,
            "accuracy": self.metrics.accuracy,
            "accuracy_interval": self.metrics.accuracy_interval,
            "top_5_accuracy": self.metrics.top_5_accuracy,
            "expected_calibration_error": self.metrics.calibration.error,
            "per_class_accuracy": self.metrics.per_class_accuracy,
            "confusion_matrix": self.metrics.confusion_matrix.tolist(),
            "description": dataclasses.asdict(self.run),
        }
