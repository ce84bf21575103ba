"""Prints a benchmark's results as tables, and saves them as a JSON file and as a plot.

`python benchmarks/report.py FILE.json` prints a file's tables and draws its plot again.
"""

import io
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
    """Draws a panel of bars for each comparison, each contender relative to this project."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [
        (measure, group)
        for measure in results["measures"].values()
        for group in _groups(measure)
        if len(group) > 1
    ]
    if not panels:
        print("no plot: nothing was compared")
        return
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6.6 * columns, 2.5 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (measure, group) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, measure, group)
    machine = results["machine"]
    figure.suptitle(f"{machine['gpu'] or machine['processor']}, {results['date']}", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, dpi=130, format="png")
    storage.new_file(file, content.getvalue())
    print(f"plotted in {file}")


def _groups(measure: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Returns the entries that have ratios, grouped by their reference."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in measure.get("entries", []):
        if "ratios" in entry:
            groups.setdefault(entry["against"], []).append(entry)
    return list(groups.values())


def _draw_panel(axis: Any, measure: dict[str, Any], group: Sequence[dict[str, Any]]) -> None:
    inverses = [[1 / ratio for ratio in entry["ratios"]] for entry in group]
    relative = [statistics.median(values) for values in inverses]
    pairs = list(zip(relative, inverses, strict=True))
    spread = [[v - min(values) for v, values in pairs], [max(values) - v for v, values in pairs]]
    # Blue and orange of Okabe and Ito's palette also differ in lightness.
    colours = ["#0072B2" if entry["is_reference"] else "#E69F00" for entry in group]
    axis.barh(range(len(group)), relative, xerr=spread, color=colours, capsize=3, height=0.65)
    axis.axvline(1, color="#555555", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(group)), [entry["name"] for entry in group], fontsize=9)
    axis.invert_yaxis()
    reach = max(value + more for value, more in zip(relative, spread[1], strict=True))
    axis.set_xlim(0, 1.45 * reach)
    for place, (entry, value, more) in enumerate(zip(group, relative, spread[1], strict=True)):
        text = f"{value:.2f}  ({number(entry['median'])} {measure['unit']})"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(value + more + 0.02 * reach, place, text, va="center", fontsize=8, bbox=behind)
    axis.spines[["top", "right"]].set_visible(False)
    better = "longer" if measure["more_is_better"] else "shorter"
    axis.set_title(measure["title"], fontsize=10, loc="left")
    axis.set_xlabel(f"relative to this project; {better} is better", fontsize=8)


if __name__ == "__main__":
    shown = json.loads(Path(sys.argv[1]).read_text())
    for shown_measure in shown["measures"].values():
        print_measure(shown_measure)
    draw(shown, Path(sys.argv[1]).with_suffix(".png"))
