"""The report's page: well-formed, complete, and closed to the world outside."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.evaluation import report
from cifar10_resnet.evaluation.metrics import Metrics, Scored
from cifar10_resnet.figures import evaluation
from cifar10_resnet.figures.style import figure_to_png

NAMES = ("cat", "<script>alert(1)</script>", '"eel" & $title')
VOID = {"meta", "img", "br", "link"}


class Page(html.parser.HTMLParser):
    """Reads a page's cells, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("td", "th", "dt", "dd", "h1", "h2", "p", "caption"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def text() -> str:
    matrix = np.array([[190, 10, 0], [3, 597, 0], [0, 0, 0]])
    pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(matrix[i, j])]
    labels, predictions = np.array(pairs).T
    metrics = Metrics(0.12345, 1.0, labels, predictions, np.full(800, 0.9), 3)
    run = RunConfig(
        ModelConfig(num_layers=56, num_classes=3),
        DataConfig(class_names=NAMES),
        TrainingConfig(weight_decay=3e-4),
    )
    images = np.zeros((800, 32, 32, 3), np.uint8)
    scored = Scored("runs/<b>/model.ckpt-900", 900, run, "holdout", metrics, images)
    pictures = {
        name: figure_to_png(figure, dpi=30)
        for name, figure in evaluation.evaluation_figures(metrics, images, NAMES).items()
    }
    made = {"command": "python run_evaluator.py '--path=a & b'", "versions": "Python 3.x"}
    return report.html(scored, pictures, made)


def test_the_page_has_the_figures(text):
    cells = Page(text).cells
    assert cells[0] == "resnet56 on cifar10: 98.38%"
    for told in ("98.38%95% interval: 97.24% to 99.05%", "0.1235cross-entropy", "8.38%expected"):
        assert told in cells
    row = cells.index("cat")
    assert cells[row : row + 5] == ["cat", "200", "95.00%", "91.04% to 97.26%", NAMES[1] + " (10)"]
    last = cells.index(NAMES[2])
    assert cells[last : last + 5] == [NAMES[2], "0", "no images", "", ""]
    for name, value in (("num_layers", "56"), ("weight_decay", "0.0003"), ("holdout", "0")):
        assert cells[cells.index(name) + 1] == value
    assert cells[cells.index("command") + 1] == "python run_evaluator.py '--path=a & b'"
    assert "runs/&lt;b&gt;/model.ckpt-900, step 900 of 64,000, on 800 holdout images" in text


def test_the_page_fetches_nothing_and_runs_nothing(text):
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "iframe", "object", "base"})
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.keys().isdisjoint({"href", "srcset", "action", "background"})
        if "src" in attributes:
            assert tag == "img"
            assert attributes["src"].startswith("data:image/png;base64,")
    assert "://" not in text
    assert not re.search(r"@import|url\(", text)
    (policy,) = (a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_pictures_are_in_the_page_each_with_words_for_who_cannot_see_it(text):
    images = [attributes for tag, attributes in Page(text).elements if tag == "img"]
    assert len(images) == 4
    for attributes in images:
        assert len(attributes["alt"]) > 20
        data = base64.b64decode(attributes["src"].split(",", 1)[1])
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.width == 270
