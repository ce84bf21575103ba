"""The report's page: well-formed, complete, and closed to the world outside."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from browsers import page_width, show_as_on_a_phone
from PIL import Image

from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.evaluation import report
from cifar10_resnet.evaluation.metrics import Metrics, Scored
from cifar10_resnet.figures import evaluation
from cifar10_resnet.figures.style import figure_to_png

NAMES = ("cat", "<script>alert(1)</script>", '"eel" & $title')
LONG_NAMES = tuple(f"large_man-made_outdoor_thing_{i}" for i in range(100))
VOID = {"meta", "img", "br", "link", "wbr"}


class Page(html.parser.HTMLParser):
    """Reads a page's cells, and checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("td", "th", "dt", "dd", "h1", "h2", "p", "pre", "li", "caption"):
            self.cells.append("")
        if tag == "table":
            self.tables.append([])
        if tag in ("tr", "caption"):
            self.tables[-1].append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "caption"):
            self.tables[-1][-1].append(self.cells[-1])

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data.strip()


def page_of(
    matrix: np.ndarray,
    names: tuple[str, ...],
    training: TrainingConfig | None = None,
    dataset: str = "cifar10",
    split: str = "holdout",
) -> str:
    """The report of a network with these predictions, all of them with 90% confidence."""
    labels, predictions = np.repeat(np.argwhere(matrix), matrix[matrix > 0], axis=0).T
    count, classes = len(labels), len(names)
    metrics = Metrics(0.12345, 1.0, labels, predictions, np.full(count, 0.9), classes)
    run = RunConfig(
        ModelConfig(num_layers=56, num_classes=classes),
        DataConfig(dataset=dataset, class_names=names),
        training or TrainingConfig(weight_decay=3e-4, seed=7),
    )
    images = np.zeros((count, 32, 32, 3), np.uint8)
    scored = Scored("runs/<b>/model.ckpt-900", 900, run, split, metrics, images)
    plot = evaluation.calibration_figure(metrics.confidences, metrics.correct)
    made = {"command": "python run_evaluator.py '--path=a & b'", "versions": "Python 3.x"}
    return report.html(scored, figure_to_png(plot, dpi=30), made)


@pytest.fixture(scope="module")
def text() -> str:
    return page_of(np.array([[190, 10, 0], [3, 1597, 0], [0, 0, 0]]), NAMES)


@pytest.fixture(scope="module")
def text_of_100_classes() -> str:
    matrix = 90 * np.eye(100, dtype=int)
    matrix[5, 7], matrix[7, 5], matrix[50, 1] = 10, 30, 20
    matrix[60:90, 0] = 1
    return page_of(matrix, LONG_NAMES, dataset="cifar100", split="test")


def test_the_page_has_the_numbers(text):
    cells = Page(text).cells
    assert cells[0] == "ResNet-56 on CIFAR-10: 99.28% holdout accuracy"
    for told in ("99.28%95% interval: 98.77% to 99.58%", "0.1235cross-entropy", "9.28%expected"):
        assert told in cells
    assert cells[cells.index("How to make this report again") + 1] == (
        "python run_evaluator.py '--path=a & b'"
    )
    assert "runs/&lt;b&gt;/model.ckpt-900, step 900 of 64,000, on 1,800 holdout images" in text


def test_the_page_has_a_top_5_accuracy_only_if_there_are_more_than_five_classes(
    text, text_of_100_classes
):
    assert "Top-5 accuracy" in Page(text_of_100_classes).cells
    assert not any("Top-" in cell for cell in Page(text).cells)


@pytest.mark.parametrize(
    ("dataset", "title"),
    [
        ("synthetic", "on synthetic images: 100.00% test"),
        ("cifar100", "on CIFAR-100: 100.00% test"),
    ],
)
def test_the_title_names_the_data_set_as_people_do(dataset, title):
    page = page_of(np.eye(2, dtype=int), ("cat", "dog"), dataset=dataset, split="test")
    assert Page(page).cells[0] == f"ResNet-56 {title} accuracy"


def test_the_confusion_matrix_is_a_table_of_true_and_predicted_classes(text):
    page = Page(text)
    assert page.tables[0] == [
        ["true class", "predicted class"],
        list(NAMES),
        [NAMES[0], "190", "10", "0"],
        [NAMES[1], "3", "1,597", "0"],
        [NAMES[2], "0", "0", "0"],
    ]
    heads = [attributes for tag, attributes in page.elements if tag == "th"]
    assert [head.get("scope") for head in heads[:8]] == [
        "col",
        "colgroup",
        *["col"] * 3,
        *["row"] * 3,
    ]
    cells = [attributes for tag, attributes in page.elements if tag == "td"]
    looks = [attributes["class"] for attributes in cells[:9]]
    assert looks == ["correct dark", "wrong", "none", "wrong", "correct dark", *["none"] * 4]
    # the square root of the share of the row
    assert [attributes.get("style") for attributes in cells[:3]] == [
        "--shade:97%",
        "--shade:22%",
        None,
    ]


def test_of_many_classes_the_page_lists_the_most_frequent_confusions(text_of_100_classes):
    head, *rows = Page(text_of_100_classes).tables[0]
    assert head == ["true class", "predicted class", "images", "share of the true class"]
    assert rows[:3] == [
        [LONG_NAMES[7], LONG_NAMES[5], "30", "25.00%"],
        [LONG_NAMES[50], LONG_NAMES[1], "20", "18.18%"],
        [LONG_NAMES[5], LONG_NAMES[7], "10", "10.00%"],
    ]
    assert len(rows) == 20
    assert "The 20 most frequent mistakes" in text_of_100_classes


def test_of_many_classes_without_a_mistake_the_page_says_so():
    page = page_of(np.eye(100, dtype=int), LONG_NAMES)
    assert "<p>There are no mistakes.</p>" in page
    assert "<p>All 100 predictions are correct.</p>" in page


def test_the_classes_come_from_the_best_to_the_worst(text):
    head, *rows = Page(text).tables[1]
    assert head == ["class", "accuracy", "most common mistake", "95% interval", "images"]
    assert rows == [
        [NAMES[1], "99.81%", "cat (3)", "99.45% to 99.94%", "1,600"],
        ["cat", "95.00%", NAMES[1] + " (10)", "91.04% to 97.26%", "200"],
        [NAMES[2], "no images", "", "", "0"],
    ]


def test_the_mistakes_have_captions(text):
    cells = Page(text).cells
    start = cells.index("13 most confident mistakes")
    assert cells[start + 1].startswith("Of 13 mistakes.")
    assert cells[start + 2] == f"{NAMES[1]} 90%cat"
    assert cells[start + 12] == f"cat 90%{NAMES[1]}"
    perfect = page_of(np.diag([4, 4]), ("cat", "dog"))
    assert "<p>All 8 predictions are correct.</p>" in perfect


def test_settings_that_differ_from_the_recipe_come_first_and_empty_ones_are_left_out(text):
    tables = {table[0][0]: table[1:] for table in Page(text).tables if len(table[0]) == 1}
    assert list(tables) == ["Different from --recipe=paper", "As --recipe=paper", "Network", "Data"]
    assert tables["Different from --recipe=paper"] == [
        ["weight_decay", "0.0003"],
        ["seed", "7"],
        ["num_layers", "56"],
        ["num_classes", "3"],
    ]
    for caption, setting in (
        ("As --recipe=paper", ["nesterov", "no"]),
        ("As --recipe=paper", ["batch_size", "128"]),
        ("Network", ["shortcut_connections", "yes"]),
        ("Data", ["holdout", "0"]),
    ):
        assert setting in tables[caption]
    names = [name for rows in tables.values() for name, _ in rows]
    assert len(names) == len(set(names))
    assert {"pretrained", "recipe", "class_names"}.isdisjoint(names)
    assert not {"True", "False", "None"} & set(Page(text).cells)


def test_a_pretrained_network_is_a_difference():
    page = page_of(np.eye(2, dtype=int), ("cat", "dog"), TrainingConfig(pretrained="runs/old"))
    assert ["pretrained", "runs/old"] in Page(page).tables[2]


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


def test_the_images_are_in_the_page(text):
    sizes = []
    for tag, attributes in Page(text).elements:
        if tag == "img":
            data = base64.b64decode(attributes["src"].split(",", 1)[1])
            with Image.open(io.BytesIO(data)) as image:
                sizes.append(image.size)
    assert sizes == [(126, 162), *[(32, 32)] * 13]


@pytest.mark.parametrize("classes", [10, 20, 100])
def test_the_page_fits_a_phone_and_is_light_on_paper(browser, tmp_path, classes):
    rng = np.random.default_rng(classes)
    matrix = rng.integers(0, 3, (classes, classes)) + 900 * np.eye(classes, dtype=int)
    page = page_of(matrix, LONG_NAMES[:classes])
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    show_as_on_a_phone(browser, 390, "dark")
    browser.get((tmp_path / "report.html").as_uri())
    assert page_width(browser) == 390
    # The plot's smallest text is 8 points: 11 pixels at the full width, and 9 or more here.
    assert browser.find_element("class name", "plot").size["width"] / 420 * 8 / 0.72 > 9
    assert browser.get_log("browser") == []  # the policy forbade nothing that the page needs
    colour = "return getComputedStyle(document.documentElement).getPropertyValue('--page')"
    assert browser.execute_script(colour) == "#0f1216"
    paper = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", paper)
    assert browser.execute_script(colour) == "#f6f8fa"
