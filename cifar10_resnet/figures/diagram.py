"""Describes layers and units, and draws them as boxes and arrows.

Lengths are in pixels of a diagram as wide as a README. The y axis points down.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path

from cifar10_resnet.config import ModelConfig
from cifar10_resnet.data.synthetic import make_split
from cifar10_resnet.figures.style import (
    ACCENT,
    BLUE,
    INK,
    LARGE,
    MUTED,
    NORMAL,
    PAPER,
    SMALL,
    VERMILLION,
    tint,
)

# Each kind of layer has a label. {0} is its size; {1} and {2} are the zeros that it pads.
TEXTS = {
    "convolution": "{0}×{0} conv",
    "norm": "BN",
    "relu": "ReLU",
    "add": "+",
    "pool": "{0}×{0} avg pool",
    "pad": "{1} + {2} zeros",
    "mean": "global\navg pool",
    "projection": "projection",
    "softmax": "softmax",
}
ON_SHORTCUTS = ("pool", "pad")
PALE, DARK = tint(MUTED, 0.08), tint(MUTED, 0.25)  # other layers: without and with weights
SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, PAPER, VERMILLION])

HEAD = 7  # length of an arrowhead
RADIUS = 9  # an addition's circle
HEIGHT, STRIP = 58, 18  # a layer's height; its width if the text is upright
WIDTHS = {"add": 2 * RADIUS, "mean": 92, "projection": 82, "softmax": 82}  # other layers
GAP = 10  # between layers
TAP = 12  # from the start of a shortcut to its unit
ARC = 49  # from the middle of a row up to its shortcuts
FRAME = 20  # from the first layer of a unit to the frame around it

SLANT = 0.8, -0.5  # x and y of the slant, per pixel of depth

Point = tuple[float, float]


class Layer(NamedTuple):
    """An operation and the shape of its output: height, width, depth, or only the depth."""

    kind: str
    shape: tuple[int, ...]
    size: int = 1  # kernel or window, in pixels
    stride: int = 1
    zeros: tuple[int, int] = (0, 0)  # padded before and after the depth


class Unit(NamedTuple):
    """A unit's layers and its shortcut's layers: None without one, empty for the identity.

    The shortcut starts after `shortcut_after` layers. If that is 0, it starts at the unit's input.
    """

    layers: list[Layer]
    shortcut: list[Layer] | None = None
    shortcut_after: int = 0


class Network(NamedTuple):
    """A network: the layers before the blocks, the units of each block, the layers after them."""

    config: ModelConfig
    input_shape: tuple[int, ...]
    begin: list[Layer]
    blocks: list[list[Unit]]
    end: list[Layer]
    num_parameters: int


class Element(NamedTuple):
    """A part of a diagram: a layer, or BN with the ReLU that follows."""

    kind: str
    text: str
    shape: tuple[int, ...]
    end: int  # number of its last layer, from 1


def elements(layers: Sequence[Layer]) -> list[Element]:
    """Returns the parts to draw, with BN and the next ReLU as one."""
    found: list[Element] = []
    for end, layer in enumerate(layers, 1):
        text = TEXTS[layer.kind].format(layer.size, *layer.zeros)
        if layer.kind == "relu" and found and found[-1].kind == "norm":
            text = f"{found.pop().text}, {text}"
        if layer.kind == "convolution" and layer.stride > 1:
            text += f"\nstride {layer.stride}"
        found.append(Element(layer.kind, text, layer.shape, end))
    return found


def shape_text(shape: Sequence[int]) -> str:
    """Returns a shape as text: 32×32×16, or 64."""
    return "×".join(map(str, shape))


def example_image() -> np.ndarray:
    """Returns the image that the diagrams show: a synthetic image of a ring."""
    return make_split("train", 3)[0][2]


class Diagram:
    """A drawing that covers a whole Matplotlib figure."""

    def __init__(self, figure: Figure):
        figure.set_layout_engine("none")
        width, height = figure.get_size_inches() * 100
        self._axes = figure.add_axes((0, 0, 1, 1))
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(height, 0)
        self._axes.axis("off")

    def text(
        self, x: float, y: float, text: str, size: float = NORMAL, ha: str = "center", **style: Any
    ) -> None:
        """Draws lines of text with their capitals centred on y."""
        em = size / 0.72  # pixels
        lines = text.split("\n")
        for i, line in enumerate(lines):
            baseline = y + (0.365 + 1.4 * (i - (len(lines) - 1) / 2)) * em
            self._axes.text(x, baseline, line, fontsize=size, ha=ha, zorder=6, **style)

    def note(self, x: float, y: float, text: str, **style: Any) -> None:
        """Draws small grey text, mostly the shape of a feature map."""
        self.text(x, y, text, SMALL, color=MUTED, **style)

    def box(self, x: float, y: float, width: float, height: float, text: str, kind: str) -> None:
        """Draws a layer as a box centred on a point. A narrow box has upright text."""
        colour = ACCENT if kind in ON_SHORTCUTS else MUTED
        fill = DARK if kind in ("convolution", "projection") else PALE
        in_network = kind != "softmax"
        self._axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=4",
                facecolor=tint(colour) if kind in ON_SHORTCUTS else fill if in_network else PAPER,
                edgecolor=colour,
                linewidth=1.1,
                linestyle="-" if in_network else (0, (4, 2)),
                zorder=4,
            )
        )
        if width < height / 2:
            self._axes.text(
                x, y, text, fontsize=SMALL, ha="center", va="center", rotation=90, zorder=6
            )
        else:
            self.text(x, y, text, SMALL)

    def sum(self, x: float, y: float, radius: float) -> None:
        """Draws the circle in which many values are added up."""
        self._axes.add_patch(
            Circle((x, y), radius, facecolor=PAPER, edgecolor=INK, linewidth=1.1, zorder=4)
        )
        self.text(x, y, "Σ", LARGE)

    def add(self, x: float, y: float) -> None:
        """Draws the circle with a plus in which a shortcut ends."""
        self._axes.add_patch(
            Circle((x, y), RADIUS, facecolor=PAPER, edgecolor=ACCENT, linewidth=1.6, zorder=4)
        )
        for dx, dy in ((5, 0), (0, 5)):
            self.line([(x - dx, y - dy), (x + dx, y + dy)], ACCENT, 1.6, zorder=5)

    def tap(self, x: float, y: float) -> None:
        """Draws the dot where a shortcut starts."""
        self._axes.add_patch(Circle((x, y), 3, facecolor=ACCENT, edgecolor="none", zorder=4))

    def line(
        self, points: Sequence[Point], colour: str = INK, width: float = 1.1, zorder: float = 2
    ) -> None:
        """Draws a line through points, with rounded corners."""
        path, codes = [points[0]], [Path.MOVETO]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            path += [_towards(corner, before, 8), corner, _towards(corner, after, 8)]
            codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
        path.append(points[-1])
        codes.append(Path.LINETO)
        style = {"fill": False, "edgecolor": colour, "linewidth": width, "capstyle": "butt"}
        self._axes.add_patch(PathPatch(Path(path, codes), zorder=zorder, **style))

    def arrow(
        self, points: Sequence[Point], colour: str = INK, width: float = 1.1, zorder: float = 3
    ) -> None:
        """Draws a line with an arrowhead. Its tip is the last point."""
        tip = points[-1]
        self.line([*points[:-1], _towards(tip, points[-2], HEAD - 1)], colour, width, zorder)
        base = _towards(tip, points[-2], HEAD)
        across = 0.42 * (base[1] - tip[1]), 0.42 * (tip[0] - base[0])
        corners = [tip, *((base[0] + s * across[0], base[1] + s * across[1]) for s in (1, -1))]
        self._axes.add_patch(Polygon(corners, facecolor=colour, edgecolor="none", zorder=zorder))

    def frame(self, left: float, top: float, right: float, bottom: float, text: str) -> None:
        """Draws a dashed frame around a repeated part, with `text` in the upper right corner."""
        self._axes.add_patch(
            FancyBboxPatch(
                (left, top),
                right - left,
                bottom - top,
                boxstyle="round,pad=0,rounding_size=8",
                facecolor=tint(MUTED, 0.07),
                edgecolor=MUTED,
                linewidth=0.9,
                linestyle=(0, (4, 3)),
                zorder=1,
            )
        )
        behind = {"boxstyle": "round,pad=0.25", "facecolor": PAPER, "edgecolor": MUTED}
        self.text(right - 12, top, text, weight="bold", ha="right", bbox=behind)

    def image(self, x: float, y: float, side: float, pixels: np.ndarray, **style: Any) -> None:
        """Draws an image centred on a point."""
        extent = (x - side / 2, x + side / 2, y + side / 2, y - side / 2)
        self._axes.imshow(
            pixels, extent=extent, aspect="auto", interpolation="nearest", zorder=4, **style
        )

    def signed(
        self, x: float, y: float, side: float, values: np.ndarray, colour: str, cells: int = 1
    ) -> None:
        """Draws values as an image, blue below zero and orange above, with a grid of cells."""
        limit = abs(values).max()
        self.image(x, y, side, values, cmap=SIGNED, vmin=-limit, vmax=limit)
        self.grid(x, y, side, cells, colour)

    def grid(self, x: float, y: float, side: float, cells: int, colour: str) -> None:
        """Draws a square grid centred on a point, with `cells` squares per side."""
        left, top = x - side / 2, y - side / 2
        for k in range(cells + 1):
            along = k * side / cells
            self.line([(left + along, top), (left + along, top + side)], colour, 0.7, zorder=5)
            self.line([(left, top + along), (left + side, top + along)], colour, 0.7, zorder=5)

    def maps(
        self, left: float, bottom: float, side: float, depth: float, zeros: bool = False
    ) -> None:
        """Draws feature maps as a block that recedes to the upper right from `left`, `bottom`."""
        right, top = left + side, bottom - side
        dx, dy = depth * SLANT[0], depth * SLANT[1]
        faces = {
            0.15: [(left, top), (right, top), (right, bottom), (left, bottom)],
            0.3: [(left, top), (left + dx, top + dy), (right + dx, top + dy), (right, top)],
            0.45: [
                (right, top),
                (right + dx, top + dy),
                (right + dx, bottom + dy),
                (right, bottom),
            ],
        }
        for share, corners in faces.items():
            face = Polygon(
                corners,
                facecolor=PAPER if zeros else tint(MUTED, share),
                edgecolor=MUTED,
                linewidth=0.8,
                linestyle=(0, (3, 2)) if zeros else "-",
                joinstyle="round",
                zorder=4,
            )
            self._axes.add_patch(face)

    def fan(self, *corners: Point) -> None:
        """Draws the lines from an edge to a point as one pale area."""
        style = {"facecolor": MUTED, "edgecolor": MUTED, "linewidth": 0.4}
        self._axes.add_patch(Polygon(corners, alpha=0.06, zorder=1, **style))

    def bar(
        self,
        left: float,
        y: float,
        width: float,
        height: float,
        share: float,
        colour: str = MUTED,
    ) -> None:
        """Draws a rectangle. It is darker if `share` (0 to 1) is larger."""
        self._axes.add_patch(
            Rectangle(
                (left, y - height / 2),
                width,
                height,
                facecolor=tint(colour, 0.1 + 0.8 * share),
                edgecolor=colour,
                linewidth=min(0.6, height / 10),
                zorder=4,
            )
        )

    def layers(
        self, way: Sequence[Point], layers: Sequence[Layer], convolution: float
    ) -> list[tuple[float, float]]:
        """Draws layers from left to right and returns each layer's left and right x.

        The first layer is at the end of `way`. `convolution` is the width of a convolution.
        """
        spans: list[tuple[float, float]] = []
        for element in elements(layers):
            self.arrow(way)
            x, y = way[-1]
            width = WIDTHS.get(element.kind, STRIP)
            if element.kind == "convolution":
                width = convolution
            middle = x + width / 2
            if element.kind == "add":
                self.add(middle, y)
            else:
                self.box(middle, y, width, HEIGHT, element.text, element.kind)
                if width > STRIP:
                    self.note(middle, y + HEIGHT / 2 + 11, shape_text(element.shape))
            # BN and ReLU in one box are two layers with the same ends.
            spans += [(x, x + width)] * (element.end - len(spans))
            way = [(x + width, y), (x + width + GAP, y)]
        return spans

    def unit(self, way: Sequence[Point], unit: Unit, convolution: float, count: int = 1) -> float:
        """Draws a unit with its shortcut, framed if `count` > 1, and returns its right x."""
        spans = self.layers(way, unit.layers, convolution)
        y = way[-1][1]
        top = y - HEIGHT / 2
        if unit.shortcut is not None:
            top = y - ARC
            start = (
                spans[unit.shortcut_after - 1][1] + 4 if unit.shortcut_after else spans[0][0] - TAP
            )
            end = sum(spans[[layer.kind for layer in unit.layers].index("add")]) / 2
            self.tap(start, y)
            self.arrow([(start, y), (start, top), (end, top), (end, y - RADIUS)], ACCENT, 1.6)
            if unit.shortcut:
                text = ", ".join(element.text for element in elements(unit.shortcut))
                self.box((start + end) / 2, top, 6 * len(text) + 10, 22, text, "pool")
        if count > 1:
            bottom = y + HEIGHT / 2 + 22
            self.frame(spans[0][0] - FRAME, top - 14, spans[-1][1] + 8, bottom, f"× {count}")
        return spans[-1][1]


def _towards(start: Point, end: Point, length: float) -> Point:
    dx, dy = end[0] - start[0], end[1] - start[1]
    share = length / max((dx * dx + dy * dy) ** 0.5, length)
    return start[0] + share * dx, start[1] + share * dy
