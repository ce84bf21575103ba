"""Learning curves: they show what the runs wrote, each run apart from the others."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from cifar10_resnet.errors import UserError
from cifar10_resnet.figures.curves import curves_figure
from cifar10_resnet.figures.style import encode, figure_to_png

HISTORY = [
    {"step": 100, "train_loss": 2.0, "train_accuracy": 0.25, "train_epoch": 0.5},
    {"step": 150, "eval_loss": 1.5, "eval_accuracy": 0.5},
    {"step": 200, "train_loss": 1.0, "train_accuracy": 0.75, "train_epoch": 1.0},
    {"step": 300, "eval_loss": 0.5, "eval_accuracy": 0.875},
]


def lines(figure: Figure) -> list[list[list[list[float]]]]:
    return [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]


def test_curves_are_those_of_the_event_files():
    figure = curves_figure({"mine": HISTORY}, ["loss", "error"])
    assert lines(figure) == [
        [[[100, 2.0], [200, 1.0]], [[150, 1.5], [300, 0.5]]],
        [[[100, 75], [200, 25]], [[150, 50], [300, 12.5]]],
    ]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "error"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["mine"]


def test_epochs_go_with_the_steps_where_none_was_written():
    figure = curves_figure({"mine": HISTORY}, ["accuracy"], "epoch")
    assert lines(figure) == [[[[0.5, 25], [1, 75]], [[0.75, 50], [1.5, 87.5]]]]


def test_forty_runs_look_different():
    figure = curves_figure({f"run{i}": HISTORY for i in range(40)}, ["loss"])
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines[1::2]}
    assert len(looks) >= 36
    assert len(figure.legends[0].texts) == 40
    figure_to_png(figure)


def test_what_no_run_measured_is_refused():
    with pytest.raises(UserError, match="nothing of learning_rate"):
        curves_figure({"mine": HISTORY}, ["loss", "learning_rate"])
    with pytest.raises(UserError, match="nothing of loss over epochs"):
        curves_figure({"mine": [{"step": 1, "eval_loss": 2.0}]}, ["loss"], "epoch")
    with pytest.raises(UserError, match="nothing of loss"):
        curves_figure({"mine": [{"step": 1, "train_loss": np.nan}]}, ["loss"])


def test_an_svg_is_the_same_each_time():
    pictures = {
        encode(curves_figure({"a": HISTORY, "b": HISTORY}, ["loss"]), "svg") for _ in range(2)
    }
    assert len(pictures) == 1
    assert b"<svg" in pictures.pop()
