"""What an evaluation found, in numbers: accuracy, loss, calibration, with NumPy alone."""

from typing import NamedTuple

import numpy as np

NUM_BINS = 15


class Calibration(NamedTuple):
    """How often a network is right, beside how sure it is: one entry for each bin of confidence.

    Where a bin is empty, its accuracy and confidence are nan.
    """

    counts: np.ndarray
    accuracies: np.ndarray
    confidences: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap between accuracy and confidence."""
        gaps = np.abs(self.accuracies - self.confidences)
        return float(np.nansum(gaps * self.counts) / self.counts.sum())


def calibration(confidences: np.ndarray, correct: np.ndarray) -> Calibration:
    """Parts images by confidence into bins of equal width, each with its upper end."""
    confidences = np.asarray(confidences, np.float64)
    bins = np.clip(np.ceil(confidences * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts, right, sure = (
        np.bincount(bins, weights, NUM_BINS) for weights in (None, correct, confidences)
    )
    filled = np.where(counts, counts, np.nan)
    return Calibration(counts, right / filled, sure / filled)


def wilson_interval(
    right: np.ndarray | int, count: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval for a share of which `right` among `count` were seen."""
    z = 1.959964
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    spread /= 1 + z * z / count
    return middle - spread, middle + spread
