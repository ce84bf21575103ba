"""Builds the report of an evaluation: one HTML page that needs no scripts or other files."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from cifar10_resnet.config import RunConfig, training_config
from cifar10_resnet.data.photos import data_url, png_url
from cifar10_resnet.evaluation.metrics import (
    MATRIX_LEGEND,
    MISTAKES_SHOWN,
    NUM_BINS,
    Scored,
    accuracy_by_class,
    shades_of,
    wilson_interval,
)

TEMPLATE = Path(__file__).with_name("report.html")
SPLITS = {"train": "training", "holdout": "holdout", "test": "test"}

# More classes than this make a table that nobody reads, so the page lists the worst confusions.
LARGEST_MATRIX = 20
CONFUSIONS_SHOWN = 20
LONGEST_HEADINGS = 80  # letters of all classes; longer ones are written upright

# The columns of the tables. Each has a name and a CSS class.
CLASS_COLUMNS = (
    ("class", ""),
    ("accuracy", "number"),
    ("most common mistake", ""),
    ("95% interval", "number"),
    ("images", "number"),
)
CONFUSION_COLUMNS = (
    ("true class", ""),
    ("predicted class", ""),
    ("images", "number"),
    ("share of the true class", "number"),
)


def html(scored: Scored, calibration_plot: bytes, made: Mapping[str, str]) -> str:
    """Returns the page. The plot is a PNG file. `made` describes how the evaluation was made.

    Its "command" becomes a separate block.
    """
    run, metrics = scored.run, scored.metrics
    made = dict(made)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(_title(scored)),
        subtitle=escape(
            f"{scored.checkpoint}, step {scored.step:,} of {run.training.num_iterations:,}, "
            f"on {metrics.num_images:,} {SPLITS[scored.split]} images"
        ),
        numbers=_numbers(scored),
        confusion=_confusion(metrics.confusion_matrix, run.data.class_names),
        num_bins=NUM_BINS,
        calibration_plot=png_url(calibration_plot),
        mistakes=_mistakes(scored),
        classes=_classes(metrics.confusion_matrix, run.data.class_names),
        settings=_settings(run),
        command=escape(made.pop("command")),
        made=_values(made),
    )


def _title(scored: Scored) -> str:
    accuracy = f"{scored.metrics.accuracy:.2%} {SPLITS[scored.split]} accuracy"
    return f"{scored.run.model.title} on {scored.run.data.title}: {accuracy}"


def _numbers(scored: Scored) -> str:
    metrics = scored.metrics
    interval = f"95% interval: {_percents(*metrics.accuracy_interval)}"
    top_5 = ("Top-5 accuracy", f"{metrics.top_5_accuracy:.2%}", "")
    numbers = (
        ("Accuracy", f"{metrics.accuracy:.2%}", interval),
        *([top_5] if metrics.has_top_5 else []),
        ("Loss", f"{metrics.loss:.4f}", "cross-entropy"),
        ("Calibration error", f"{metrics.calibration.error:.2%}", "expected"),
        ("Images", f"{metrics.num_images:,}", f"{metrics.num_classes} classes"),
    )
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in numbers
    )


def _confusion(matrix: np.ndarray, names: Sequence[str]) -> str:
    if len(names) > LARGEST_MATRIX:
        return _most_frequent_confusions(matrix, names)
    upright = " upright" if sum(map(len, names)) > LONGEST_HEADINGS else ""
    heads = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    shades = shades_of(matrix)
    rows = "\n".join(
        f'<tr><th scope="row">{_name(name)}</th>'
        + "".join(_count(matrix[i, j], shades[i, j], i == j) for j in range(len(names)))
        + "</tr>"
        for i, name in enumerate(names)
    )
    return (
        f"<p>{MATRIX_LEGEND}</p>\n"
        f'<div class="table" tabindex="0"><table class="confusion{upright}" '
        f'style="--classes:{len(names)}">\n'
        '<thead><tr><th rowspan="2" scope="col">true class</th>'
        f'<th colspan="{len(names)}" scope="colgroup">predicted class</th></tr>\n'
        f"<tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _count(count: int, shade: float, is_correct: bool) -> str:
    if not count:
        return '<td class="none">0</td>'
    look = "correct" if is_correct else "wrong"
    if is_correct and shade > 0.8:
        look += " dark"
    return f'<td class="{look}" style="--shade:{shade:.0%}">{count:,}</td>'


def _most_frequent_confusions(matrix: np.ndarray, names: Sequence[str]) -> str:
    wrong = np.where(np.eye(len(names), dtype=bool), 0, matrix)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS_SHOWN]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
    if not pairs:
        return "<p>There are no mistakes.</p>"
    rows = [
        (names[i], names[j], f"{wrong[i, j]:,}", f"{wrong[i, j] / matrix[i].sum():.2%}")
        for i, j in pairs
    ]
    return (
        f"<p>The {len(rows)} most frequent mistakes, because a table of {len(names)} classes is "
        "too large for a page. The evaluator's <code>--plot_dir</code> draws all.</p>\n"
        + _table(CONFUSION_COLUMNS, rows)
    )


def _mistakes(scored: Scored) -> str:
    """Returns a heading and the most confident mistakes, each as an image with a caption."""
    metrics, names = scored.metrics, scored.run.data.class_names
    shown = metrics.most_confident_mistakes(MISTAKES_SHOWN)
    if not len(shown):
        return f"<h2>No mistakes</h2>\n<p>All {metrics.num_images:,} predictions are correct.</p>"
    mistakes = "\n".join(
        f'<li><img src="{data_url(scored.images[i])}" alt="" width="32" height="32">'
        f"<b>{_name(names[metrics.predictions[i]])} {100 * metrics.confidences[i]:.0f}%</b>"
        f"<span>{_name(names[metrics.labels[i]])}</span></li>"
        for i in shown
    )
    return (
        f"<h2>{len(shown)} most confident mistake{'s' if len(shown) > 1 else ''}</h2>\n"
        f"<p>Of {np.count_nonzero(~metrics.correct):,} mistakes. First line: prediction and "
        f'confidence. Second line: true class.</p>\n<ol class="mistakes">\n{mistakes}\n</ol>'
    )


def _classes(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Returns the table of the classes, from the best to the worst."""
    shares, counts = accuracy_by_class(matrix), matrix.sum(axis=1)
    rows = []
    for i in np.argsort(-shares, kind="stable"):  # classes without images come last
        accuracy, interval = "no images", ""
        if counts[i]:
            accuracy = f"{shares[i]:.2%}"
            interval = _percents(*wilson_interval(matrix[i, i], counts[i]))
        wrong = np.where(np.arange(len(names)) == i, 0, matrix[i])
        most = f"{names[wrong.argmax()]} ({wrong.max():,})" if wrong.any() else ""
        rows.append((names[i], accuracy, most, interval, f"{counts[i]:,}"))
    return _table(CLASS_COLUMNS, rows)


def _settings(run: RunConfig) -> str:
    """Returns the tables of the settings. Settings that differ from the recipe come first."""
    recipe = run.training.recipe
    usual = RunConfig(training=training_config({"recipe": recipe})).settings()
    differing, rest = {}, {}
    captions = {"training": f"As --recipe={recipe}", "model": "Network", "data": "Data"}
    for part in captions:
        for name, value in dataclasses.asdict(getattr(run, part)).items():
            if name in ("class_names", "recipe") or value in ("", None):
                continue  # the classes are in the table above, the recipe in the captions
            if value != usual[name]:
                differing[name] = value
            else:
                rest.setdefault(part, {})[name] = value
    tables = [_values(differing or {"nothing": ""}, f"Different from --recipe={recipe}")]
    tables += [_values(values, captions[part]) for part, values in rest.items()]
    return "\n".join(tables)


def _values(values: Mapping[str, Any], caption: str = "") -> str:
    """Returns a table of names and values."""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in values.items()
    )
    caption = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return (
        f'<div class="table"><table class="values">\n{caption}<tbody>{rows}\n</tbody></table></div>'
    )


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" class="{look}">{escape(name)}</th>' for name, look in columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{look}">{_name(cell)}</td>'
            for (_, look), cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _name(name: str) -> str:
    """Returns the name of a class, which may continue in a new line after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _percents(low: float, high: float) -> str:
    return f"{low:.2%} to {high:.2%}"
