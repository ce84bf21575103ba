"""The numbers of an evaluation, compared with results by hand and independent counts."""

import numpy as np
import pytest

from cifar10_resnet.evaluation.metrics import NUM_BINS, Metrics, calibration, wilson_interval


def metrics_of(matrix: list[list[int]]) -> Metrics:
    """Metrics of images with that confusion matrix, in no particular order."""
    pairs = [(i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) for _ in range(n)]
    labels, predictions = np.random.default_rng(0).permutation(pairs).T.astype(np.int32)
    return Metrics(1.25, 0.875, labels, predictions, np.full(len(labels), 0.7), len(matrix))


def test_figures_follow_from_a_confusion_matrix_by_hand():
    metrics = metrics_of([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
    assert metrics.num_images == 8
    assert metrics.accuracy == 5 / 8
    assert metrics.per_class_accuracy == [0.75, None, 0.5]
    assert metrics.confusion_matrix.tolist() == [[3, 1, 0], [0, 0, 0], [2, 0, 2]]
    assert metrics.calibration.error == pytest.approx(0.7 - 5 / 8)


def test_the_report_has_the_figures_and_the_names():
    metrics = metrics_of([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
    lines = [line.split() for line in metrics.report(["cat", "dog", "eel"]).splitlines()]
    assert lines == [
        ["images", "8"],
        ["loss", "1.2500"],
        ["accuracy", "62.50%"],
        ["calibration", "error", "7.50%"],
        ["cat", "75.00%"],
        ["dog", "no", "images"],
        ["eel", "50.00%"],
    ]


def test_the_calibration_error_by_hand():
    # In 15 bins: two images in the second, four in the eleventh, two in the last.
    confidences = np.array([0.10, 0.12, 0.68, 0.70, 0.71, 0.73, 0.97, 0.99], np.float32)
    correct = np.array([False, True, True, True, False, True, True, True])
    found = calibration(confidences, correct)
    assert found.counts.tolist() == [0, 2, *[0] * 8, 4, *[0] * 3, 2]
    np.testing.assert_allclose(found.accuracies[[1, 10, 14]], [0.5, 0.75, 1.0])
    np.testing.assert_allclose(found.confidences[[1, 10, 14]], [0.11, 0.705, 0.98], rtol=1e-6)
    assert np.isnan(found.accuracies[0])
    # (2 * |0.5 - 0.11| + 4 * |0.75 - 0.705| + 2 * |1 - 0.98|) / 8
    assert found.error == pytest.approx((0.78 + 0.18 + 0.04) / 8, rel=1e-6)


def test_a_confidence_on_a_bins_end_is_in_that_bin():
    ends = np.linspace(0, 1, NUM_BINS + 1)
    found = calibration(ends, np.ones(NUM_BINS + 1, bool))
    assert found.counts.tolist() == [2] + [1] * (NUM_BINS - 1)  # no confidence is in the first too


def test_the_calibration_error_is_that_of_a_plain_count():
    rng = np.random.default_rng(3)
    confidences = rng.uniform(0.1, 1, 1000)
    correct = rng.random(1000) < confidences**2  # surer than it is right
    error = 0.0
    for i in range(15):
        inside = (confidences > i / 15) & (confidences <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    assert error > 0.1
    assert calibration(confidences, correct).error == pytest.approx(error, rel=1e-12)


def test_a_network_that_is_as_sure_as_it_is_right_has_no_calibration_error():
    assert calibration(np.full(4, 0.75), np.array([True, True, True, False])).error == 0
    assert calibration(np.ones(5), np.ones(5, bool)).error == 0


def test_confidences_that_are_no_numbers_give_no_error_that_is_one():
    assert np.isnan(calibration(np.array([0.9, np.nan]), np.array([True, False])).error)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (1, 3), (95, 100), (9125, 10_000), (7, 7)])
def test_the_ends_of_the_interval_are_as_far_from_the_share_as_chance_goes(right, count):
    share = right / count
    low, high = wilson_interval(right, count)
    assert -1e-12 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1 + 1e-12
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            errors = abs(share - end) / np.sqrt(end * (1 - end) / count)
            assert errors == pytest.approx(1.959964, rel=1e-6)


def test_intervals_as_published():
    # Newcombe (1998), table 1
    np.testing.assert_allclose(wilson_interval(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(wilson_interval(0, 20), (0, 0.1611), atol=5e-5)
    np.testing.assert_allclose(wilson_interval(29, 29), (0.8830, 1), atol=5e-5)


@pytest.mark.parametrize("count", [1, 3, 100, 1000, 10_000])
def test_an_interval_stays_within_0_and_1(count):
    for right in (0, count):
        low, high = wilson_interval(right, count)
        assert 0 <= low <= high <= 1
        assert not np.signbit(low)  # it would be printed as -0.00%


def test_the_most_confident_mistakes_come_first():
    labels, predictions = np.array([0, 0, 1, 1, 2]), np.array([1, 0, 0, 2, 2])
    confidences = np.array([0.6, 0.99, 0.8, 0.6, 0.95])
    metrics = Metrics(1.0, 1.0, labels, predictions, confidences, 3)
    assert metrics.most_confident_mistakes(9).tolist() == [2, 0, 3]
    assert metrics.most_confident_mistakes(1).tolist() == [2]
