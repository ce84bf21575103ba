"""Prints a benchmark's results as tables, and saves them as a JSON file and as a plot.

`python benchmarks/report.py FILE.json` prints a file's tables and draws its plot again.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cifar10_resnet import storage
from cifar10_resnet.terminal import table

DEPARTURE = 0.25
TRAINING = {"train20": "ResNet-20", "train110": "ResNet-110"}  # the measures that the plot shows


def summary(rounds: Sequence[float], reference: Sequence[float] | None = None) -> dict[str, Any]:
    """Returns one contender's numbers; each ratio is the reference / the contender in a round."""
    figures = {
        "rounds": list(rounds),
        "median": statistics.median(rounds),
        "min": min(rounds),
        "max": max(rounds),
    }
    if reference:
        ratios = [ours / theirs for ours, theirs in zip(reference, rounds, strict=True)]
        figures |= {"ratios": ratios, "ratio": statistics.median(ratios)}
    return figures


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Returns intercept and slope of the line with the least squares of relative errors."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    pairs = [(w, x - mean_x, y - mean_y) for w, (x, y) in zip(weights, points, strict=True)]
    slope = sum(w * dx * dy for w, dx, dy in pairs) / sum(w * dx * dx for w, dx, _ in pairs)
    return mean_y - slope * mean_x, slope


def departures(points: Sequence[tuple[str, float, float, bool]], what: str) -> list[str]:
    """Returns a sentence per point (name, x, y, whether the line is fitted to it) off the line."""
    fitted = [(x, y) for _, x, y, on_line in points if on_line]
    if len(fitted) < 3:
        return []
    intercept, slope = line_through(fitted)
    said = []
    for name, x, y, _ in points:
        off = y / (intercept + slope * x) - 1
        if abs(off) > DEPARTURE:
            side = "above" if off > 0 else "below"
            said.append(f"{what}: {name} is {abs(off):.0%} {side} the straight line")
    return said


def number(value: float) -> str:
    """Returns a number with four significant digits, without an exponent."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def print_measure(measure: dict[str, Any]) -> None:
    """Prints one measure as a table."""
    print(f"\n{measure['title']}")
    if "points" in measure:
        _print_scaling(measure)
        return
    unit = measure["unit"]
    rows = [("", f"median {unit}", "min", "max", "ratio")]
    for entry in measure["entries"]:
        if problem := entry.get("problem"):
            rows.append((entry["name"], problem))
            continue
        ratio = f"{entry['ratio']:.2f}" if "ratio" in entry and not entry["is_reference"] else ""
        figures = (number(entry[key]) for key in ("median", "min", "max"))
        rows.append((entry["name"], *figures, ratio))
    print(table(rows, "<>>>>>>"))
    if any("ratio" in entry for entry in measure["entries"]):
        better = "more" if measure["more_is_better"] else "less"
        print(f"  ratio: this project / the contender, {unit}; {better} is better")
    for remark in measure.get("remarks", []):
        print(f"  {remark}")


def _print_scaling(measure: dict[str, Any]) -> None:
    rows = [("", "GMAC a step", "seconds a step", "min", "max", "ps/MAC", "peak MiB")]
    for point in measure["points"]:
        if problem := point.get("problem"):
            rows.append((point["name"], problem))
            continue
        seconds = (number(point[key]) for key in ("median", "min", "max"))
        macs = point["multiply_adds"]
        rows.append(
            (
                point["name"],
                number(macs / 1e9),
                *seconds,
                number(point["median"] / macs * 1e12),
                f"{point['peak_mib']:,.0f}",
            )
        )
    print(table(rows, "<>>>>>>"))
    for remark in measure["remarks"]:
        print(f"  {remark}")


def save(results: dict[str, Any], file: Path) -> None:
    """Writes the results and their plot, and never leaves a half-written file."""
    storage.make_folder(str(file.parent))
    storage.new_file(file, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    print(f"\nsaved as {file}")
    draw(results, file.with_suffix(".png"))


def draw(results: dict[str, Any], file: Path) -> None:
    """Draws how fast each contender trains, relative to this project. The rest is in the tables."""
    try:
        from cifar10_resnet.figures import style
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    panels = [
        (f"{network}, {group[0]['name'].split()[-1]}", group)
        for name, network in TRAINING.items()
        for group in _groups(results["measures"].get(name, {}))
        if len(group) > 1
    ]
    if not panels:
        print("no plot: the training speed was not compared")
        return
    machine = results["machine"]
    rows = math.ceil(len(panels) / 2)
    with style.picture(
        file,
        height=94 + 190 * rows,
        title="Training speed relative to this project: longer is faster",
        subtitle=f"{machine['gpu'] or machine['processor']}, {results['date']}. "
        "Lines: slowest to fastest round",
    ) as figure:
        for place, (title, group) in enumerate(panels, 1):
            _draw_panel(figure.add_subplot(rows, min(2, len(panels)), place), title, group)


def _groups(measure: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Returns the entries that have ratios, grouped by their reference."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in measure.get("entries", []):
        if "ratios" in entry:
            groups.setdefault(entry["against"], []).append(entry)
    return list(groups.values())


def _draw_panel(axes: Any, title: str, group: Sequence[dict[str, Any]]) -> None:
    """Draws the speeds of one network in one precision, this project's in the accent colour."""
    from cifar10_resnet.figures.style import ACCENT, INK, MUTED, SMALL, tint

    for place, entry in enumerate(group):
        speeds = [1 / ratio for ratio in entry["ratios"]]
        speed, is_ours = statistics.median(speeds), entry["is_reference"]
        axes.barh(place, speed, 0.7, color=ACCENT if is_ours else tint(MUTED, 0.4))
        axes.hlines(place, min(speeds), max(speeds), color=INK, lw=1)
        text = f"{speed:.2f}   {entry['median']:,.0f} images/s"
        axes.text(max(speeds) + 0.03, place, text, va="center_baseline", fontsize=SMALL)
    names = [entry["name"].rpartition(" ")[0] for entry in group]  # without the precision
    axes.set_yticks(range(len(group)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.9), xticks=(0, 0.5, 1))
    axes.grid(visible=False, axis="y")
    axes.set_title(title)


if __name__ == "__main__":
    shown = json.loads(Path(sys.argv[1]).read_text())
    for shown_measure in shown["measures"].values():
        print_measure(shown_measure)
    draw(shown, Path(sys.argv[1]).with_suffix(".png"))
