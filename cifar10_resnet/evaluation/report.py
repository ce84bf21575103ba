"""Builds the report of an evaluation: one HTML page that needs no scripts or other files."""

import base64
import dataclasses
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from cifar10_resnet.evaluation.metrics import NUM_BINS, Scored, wilson_interval

TEMPLATE = Path(__file__).with_name("report.html")

# Each column of the table of classes has a name and a CSS class.
CLASS_CELLS = (
    ("class", ""),
    ("images", "number"),
    ("accuracy", "number"),
    ("95% interval", "number"),
    ("most frequent mistake", ""),
)
# Each plot has an alt text, and a CSS class that sets its look on a dark page.
PICTURES = {
    "confusion_matrix": ("chart", "Confusion matrix; the table of classes has its main points."),
    "mistakes": (
        "photographs",
        "The most confident mistakes, each with its true class and its prediction.",
    ),
    "reliability": ("chart", "Accuracy and number of images in each bin of confidence."),
    "class_accuracy": ("chart", "Accuracy of each class with its interval, as in the table."),
}


def html(scored: Scored, pictures: Mapping[str, bytes], made: Mapping[str, str]) -> str:
    """Returns the page. `pictures` are PNG files. `made` describes how the evaluation was made."""
    run, metrics = scored.run, scored.metrics
    low, high = metrics.accuracy_interval
    shown = min(5, metrics.num_classes)
    numbers = [
        ("Accuracy", _percent(metrics.accuracy), f"95% interval: {_percents(low, high)}"),
        (f"Top-{shown} accuracy", _percent(metrics.top_5_accuracy), ""),
        ("Loss", f"{metrics.loss:.4f}", "cross-entropy"),
        ("Calibration error", _percent(metrics.calibration.error), "expected"),
        ("Images", f"{metrics.num_images:,}", f"{metrics.num_classes} classes"),
    ]
    parts = {
        "network": dataclasses.asdict(run.model),
        "data": dataclasses.asdict(run.data),
        "training": dataclasses.asdict(run.training),
    }
    del parts["data"]["class_names"]  # they are in the table of classes
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{run.model.name} on {run.data.dataset}: {_percent(metrics.accuracy)}"),
        subtitle=escape(
            f"{scored.checkpoint}, step {scored.step:,} of {run.training.num_iterations:,}, "
            f"on {metrics.num_images:,} {scored.split} images"
        ),
        numbers="\n".join(_figure(*number) for number in numbers),
        num_bins=NUM_BINS,
        classes=_class_table(scored),
        run="\n".join(_table(values, part) for part, values in parts.items()),
        made=_table(made),
        **{name: _picture(name, pictures[name]) for name in PICTURES},
    )


def _figure(name: str, value: str, note: str) -> str:
    return (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
    )


def _picture(name: str, png: bytes) -> str:
    look, words = PICTURES[name]
    data = base64.b64encode(png).decode()
    return f'<img class="{look}" alt="{escape(words)}" src="data:image/png;base64,{data}">'


def _class_table(scored: Scored) -> str:
    names, matrix = scored.run.data.class_names, scored.metrics.confusion_matrix
    rows = []
    for i, (name, counts) in enumerate(zip(names, matrix, strict=True)):
        right, count = counts[i], counts.sum()
        if count:
            shares = _percent(right / count), _percents(*wilson_interval(right, count))
        else:
            shares = "no images", ""
        wrong = np.where(np.arange(len(names)) == i, 0, counts)
        most = f"{names[wrong.argmax()]} ({wrong.max():,})" if wrong.any() else ""
        cells = zip(CLASS_CELLS, (escape(name), f"{count:,}", *shares, escape(most)), strict=True)
        rows.append("".join(f'<td class="{look}">{cell}</td>' for (_, look), cell in cells))
    head = "".join(f'<th class="{look}">{escape(name)}</th>' for name, look in CLASS_CELLS)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _table(values: Mapping[str, Any], caption: str = "") -> str:
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    caption = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return f'<div class="table"><table class="values">\n{caption}{rows}\n</table></div>'


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _percents(low: float, high: float) -> str:
    return f"{_percent(low)} to {_percent(high)}"
