"""A failed plot leaves no half-written file, and labels are large enough to read."""

import errno
import json
import os
import re
from argparse import Namespace

import pytest
from faults import load
from matplotlib.figure import Figure
from matplotlib.text import Text
from programs import PROJECT

import draw_curves
from benchmarks import report
from cifar10_resnet.config import ModelConfig
from cifar10_resnet.errors import UserError
from cifar10_resnet.figures import network, style
from cifar10_resnet.figures.curves import curves_figure
from cifar10_resnet.figures.trace import trace
from docs import draw_parts


def test_a_plot_that_cannot_be_written_is_a_one_line_error(tmp_path):
    file = tmp_path / "missing" / "picture.png"
    told = re.escape(f"{file} cannot be written: No such file or directory.")
    with pytest.raises(UserError, match=told), style.picture(file, height=100, title=""):
        pass


def test_a_picture_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fill_the_disk(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "picture.png"
    file.write_bytes(b"the old one")
    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with (
        pytest.raises(UserError, match="No space left"),
        style.picture(file, height=100, title=""),
    ):
        pass
    assert file.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_every_label_of_a_picture_is_10_pixels_high_on_a_page_of_830(tmp_path, monkeypatch):
    sizes: dict[str, float] = {}

    def measure(figure: Figure, kind: str) -> bytes:
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        smallest = min(text.get_fontsize() for text in texts)  # in points: 72 are an inch
        pixels = smallest / 72 * 830 / figure.get_size_inches()[0]
        sizes[texts[0].get_text()] = pixels
        return b""

    monkeypatch.setattr(style, "encode", measure)
    folders = Namespace(results_dir=PROJECT / "benchmarks" / "accuracy", output_dir=tmp_path)
    assert draw_curves.main(folders) == draw_parts.main(folders) == 0
    network.draw(trace(ModelConfig()), [tmp_path / "resnet20.png"])
    load.draw({"20 steps": [(9.5, 3), (9.5, 3)], "9 evaluations": [(9.5, 3)]}, tmp_path / "a.png")
    speeds = json.loads((PROJECT / "benchmarks/results/amd-epyc.json").read_text())
    report.draw(speeds, tmp_path / "speeds.png")
    curves = curves_figure({"mine": [{"step": 1, "train_loss": 2.0, "train_epoch": 1}]}, ["loss"])
    measure(curves, "png")
    assert len(sizes) == 5 + 4 + 1 + 1 + 1 + 1
    assert min(sizes.values()) >= 10
