"""The plots show the results, and stay readable for any data."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from cifar10_resnet.evaluation.metrics import Metrics
from cifar10_resnet.figures import evaluation
from cifar10_resnet.figures.style import BLUE, VERMILLION, figure_to_png

LONG_NAMES = [f"large_man-made_outdoor_thing_{i}" for i in range(100)]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def random_evaluation(classes: int, count: int = 400) -> tuple[np.ndarray, ...]:
    """Labels, predictions, confidences and the confusion matrix of a network that often errs."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, count)
    predictions = np.where(rng.random(count) < 0.7, labels, rng.integers(0, classes, count))
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (labels, predictions), 1)
    return labels, predictions, rng.uniform(1 / classes, 1, count), matrix


def figures(classes: int) -> dict[str, Figure]:
    labels, predictions, confidences, matrix = random_evaluation(classes)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    names = LONG_NAMES[:classes]
    return {
        "confusion": evaluation.confusion_matrix_figure(matrix, names),
        "classes": evaluation.class_accuracy_figure(matrix, names),
        "calibration": evaluation.calibration_figure(confidences, labels == predictions),
        "mistakes": evaluation.mistakes_figure(
            Metrics(0.1, 0.9, labels, predictions, confidences, classes), images, names
        ),
    }


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_every_word_is_within_the_picture_and_apart_from_the_others(classes, monkeypatch):
    drawn, draw = {}, Text.draw

    def record(text, renderer):
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", record)
    for name, figure in figures(classes).items():
        drawn.clear()
        with Image.open(io.BytesIO(figure_to_png(figure, dpi=100))) as picture:
            width, height = picture.size
            assert width == (420 if name == "calibration" else 900)
            assert abs(height - 100 * figure.get_figheight()) < 1  # rounded, or cut off
            whole = Bbox.from_extents(0, 0, *picture.size).padded(1)
        assert len(drawn) > 10
        inked = []
        for text, box in drawn.items():
            assert Bbox.intersection(whole, box).bounds == box.bounds, (name, text)
            # letters fill about two thirds of a line's height, so lines may touch
            upright = box.height > 2 * box.width
            inked.append((text, box.shrunk(0.7, 0.98) if upright else box.shrunk(0.98, 0.7)))
        for (text, one), (other, two) in itertools.combinations(inked, 2):
            assert not one.overlaps(two), (name, text, other)


def test_a_picture_has_the_size_and_the_bytes_of_its_figure():
    matrix = random_evaluation(3)[3]
    png = figure_to_png(evaluation.class_accuracy_figure(matrix, ["a", "b", "c"]))
    with Image.open(io.BytesIO(png)) as picture:
        assert (picture.format, picture.width) == ("PNG", 1800)
    assert png == figure_to_png(evaluation.class_accuracy_figure(matrix, ["a", "b", "c"]))


def test_the_confusion_matrix_shows_counts_and_shades_them_by_their_share():
    matrix = np.array([[1200, 0, 0], [25, 75, 0], [0, 0, 0]])
    figure = evaluation.confusion_matrix_figure(matrix, ["cat", "dog", "eel"])
    assert sorted(set(texts(figure)) & {"1,200", "25", "75", "0"}) == ["1,200", "25", "75"]
    shades = 1 - np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(shades[0, 0], 1 - np.array(to_rgb(BLUE)))
    np.testing.assert_allclose(shades[1, 0], 0.5 * (1 - np.array(to_rgb(VERMILLION))))
    np.testing.assert_allclose(shades[1, 1], np.sqrt(0.75) * (1 - np.array(to_rgb(BLUE))))
    assert not shades[2].any()
    assert not shades[0, 1:].any()


def test_the_classes_come_from_the_best_to_the_worst_with_their_shares():
    matrix = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 8]])
    figure = evaluation.class_accuracy_figure(matrix, ["cat", "dog", "eel"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["eel", "cat", "dog"]
    (shares,) = (line.get_xdata() for line in axes.lines if line.get_marker() == "o")
    np.testing.assert_array_equal(shares, [1, 0.75, np.nan])
    beside = [text.get_text() for text in axes.texts]
    assert beside == ["100.0% of 8", "75.0% of 4", "no images"]
    assert any("91.7%" in text for text in texts(figure)), "11 of 12"


@pytest.mark.parametrize(("right", "start"), [(9950, 0.9), (9000, 0.8), (8400, 0.8), (10, 0)])
def test_the_accuracy_of_classes_starts_where_they_differ(right, start):
    matrix = np.array([[right, 10000 - right], [10, 9990]])
    axes = evaluation.class_accuracy_figure(matrix, ["cat", "dog"]).axes[0]
    assert axes.get_xlim() == (start, 1)


def test_the_calibration_shows_each_bin_and_starts_at_the_first_with_images():
    confidences = np.array([0.70, 0.71, 0.72, 0.73, 0.99, 0.99])
    figure = evaluation.calibration_figure(confidences, np.array([1, 1, 1, 0, 1, 1], bool))
    upper, lower = figure.axes
    heights = [bar.get_height() for bar in upper.patches]
    assert (len(heights), heights[10], heights[14], sum(heights)) == (15, 0.75, 1, 1.75)
    assert [bar.get_height() for bar in lower.patches if bar.get_height()] == [4, 2]
    # The bin of 0.70 starts at 0.67.
    assert upper.get_xlim() == lower.get_xlim() == (0.6, 1)
    assert upper.get_ylim() == (0, 1)


def test_the_most_confident_mistakes_are_shown_first_and_no_more_than_fit():
    labels = np.arange(60) % 3
    predictions = np.where(np.arange(60) < 30, (labels + 1) % 3, labels)
    confidences = np.linspace(0.4, 0.99, 60)
    images = np.stack([np.full((32, 32, 3), i, np.uint8) for i in range(60)])
    names = ["cat", "dog", "eel"]
    metrics = Metrics(0.1, 1.0, labels, predictions, confidences, 3)
    figure = evaluation.mistakes_figure(metrics, images, names)
    shown = [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes]
    assert shown == list(range(29, 5, -1))
    first = figure.axes[0]
    assert first.get_title(loc="center") == "cat\n69%"
    assert first.get_xlabel() == "eel"
    assert "24 most confident mistakes" in texts(figure)
    assert any(text.startswith("Of 30 mistakes.") for text in texts(figure))


def test_without_mistakes_the_picture_says_so():
    labels = np.zeros(5, int)
    images = np.zeros((5, 32, 32, 3), np.uint8)
    metrics = Metrics(0.0, 1.0, labels, labels, np.ones(5), 2)
    figure = evaluation.mistakes_figure(metrics, images, ["cat", "dog"])
    assert "All 5 predictions are correct" in texts(figure)
    assert figure_to_png(figure)


def test_a_name_is_no_formula():
    figure = evaluation.class_accuracy_figure(np.eye(2, dtype=int), ["$x_1$", r"a $\frac$ b$"])
    figure_to_png(figure)
    boxes = [label.get_window_extent().width for label in figure.axes[0].get_yticklabels()]
    plain = evaluation.class_accuracy_figure(np.eye(2, dtype=int), ["Sx_1S", r"a S\fracS bS"])
    figure_to_png(plain)
    others = [label.get_window_extent().width for label in plain.axes[0].get_yticklabels()]
    np.testing.assert_allclose(boxes, others, atol=2)
