"""Learning curves: they show what the runs wrote, each run apart from the others."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure

from cifar10_resnet.errors import UserError
from cifar10_resnet.figures import style
from cifar10_resnet.figures.curves import curves_figure
from cifar10_resnet.figures.style import encode, figure_to_png

HISTORY = [
    {"step": 100, "train_loss": 2.0, "train_accuracy": 0.25, "train_epoch": 0.5},
    {"step": 150, "eval_loss": 1.5, "eval_accuracy": 0.5},
    {"step": 200, "train_loss": 1.0, "train_accuracy": 0.75, "train_epoch": 1.0},
    {"step": 300, "eval_loss": 0.5, "eval_accuracy": 0.875},
]


def lines(figure: Figure) -> list[list[list[list[float]]]]:
    """Returns the points of the curves, by axes: a line of one point marks a label."""
    return [
        [points for line in axes.lines if len(points := np.transpose(line.get_data()).tolist()) > 1]
        for axes in figure.axes
    ]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_curves_are_those_of_the_event_files():
    figure = curves_figure({"mine": HISTORY}, ["loss", "error"], "step")
    assert lines(figure) == [
        [[[100, 2.0], [200, 1.0]], [[150, 1.5], [300, 0.5]]],
        [[[100, 75], [200, 25]], [[150, 50], [300, 12.5]]],
    ]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Loss, on a logarithmic axis", "Error"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    assert labels(figure) == ["mine", "mine"]


def test_epochs_go_with_the_steps_where_none_was_written():
    figure = curves_figure({"mine": HISTORY}, ["accuracy"])
    assert lines(figure) == [[[[0.5, 25], [1, 75]], [[0.75, 50], [1.5, 87.5]]]]


@pytest.mark.parametrize("epochs", [0.1, 1, 2.5, 10, 41, 164])
def test_the_ticks_are_whole_epochs_for_short_and_long_runs(epochs):
    history = [
        {"step": step, "train_loss": 1.0 / step, "train_epoch": epochs * step / 100}
        for step in (5, 50, 100)
    ]
    (axes,) = curves_figure({"mine": history}, ["loss"]).axes
    ticks = [tick for tick in axes.get_xticks() if tick <= axes.get_xlim()[1]]
    assert ticks[0] == 0
    assert len(ticks) >= 2
    assert all(tick == int(tick) for tick in ticks)


def test_forty_runs_look_different_and_their_labels_do_not_overlap():
    figure = curves_figure({f"run{i}": HISTORY for i in range(40)}, ["loss"])
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1][1::2]
    looks = {(line.get_color(), line.get_marker()) for line in curves}
    assert len(looks) >= 36
    figure_to_png(figure)  # computes the layout
    tops = sorted(text.get_window_extent().y1 for text in figure.axes[0].texts)
    assert len(tops) == 40
    assert min(np.diff(tops)) >= 1.3 * style.SMALL * figure.dpi / 72


def test_characters_that_the_font_lacks_cause_no_warning():
    figure = curves_figure({"実験": HISTORY}, ["loss"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(figure, "png")


def test_a_curve_of_one_point_is_a_point():
    figure = curves_figure({"mine": HISTORY[:1]}, ["loss"], "step")
    (point,) = (line for line in figure.axes[0].lines if line.get_xdata().tolist() == [100])
    assert point.get_marker() == "."


def test_what_no_run_measured_is_refused():
    with pytest.raises(UserError, match="nothing of learning_rate"):
        curves_figure({"mine": HISTORY}, ["loss", "learning_rate"])
    with pytest.raises(UserError, match=r"over epochs\. Try --x=step"):
        curves_figure({"mine": [{"step": 1, "eval_loss": 2.0}]}, ["loss"], "epoch")
    with pytest.raises(UserError, match="nothing of loss"):
        curves_figure({"mine": [{"step": 1, "train_loss": np.nan}]}, ["loss"])


def test_an_svg_is_the_same_each_time():
    pictures = {
        encode(curves_figure({"a": HISTORY, "b": HISTORY}, ["loss"]), "svg") for _ in range(2)
    }
    assert len(pictures) == 1
    assert b"<svg" in pictures.pop()
