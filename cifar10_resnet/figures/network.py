"""Draws the diagram of a network: one row per block, as wide as fits."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from cifar10_resnet.figures.diagram import (
    GAP,
    STRIP,
    WIDTHS,
    Diagram,
    Layer,
    Network,
    Point,
    Unit,
    elements,
    example_image,
    shape_text,
)
from cifar10_resnet.figures.style import MARGIN, WIDTH, picture

LEFT, RIGHT = 154, WIDTH - MARGIN  # ends of a row of layers
FIRST = 124  # y of the first row
TURN = 20  # from a row's last layer to the turn towards the next row
NARROWEST, WIDEST = 60, 104  # widths of a convolution

Row = list[tuple[Unit, int]]  # each unit and the number of its repeats


def subtitle(network: Network) -> str:
    """Returns the depth as a sum, and the number of parameters."""
    blocks, units = len(network.blocks), len(network.blocks[0])
    convolutions = sum(layer.kind == "convolution" for layer in network.blocks[0][0].layers)
    return (
        f"1 convolution + {blocks} blocks × {units} unit{'s' if units > 1 else ''} × "
        f"{convolutions} convolutions + 1 projection = {1 + blocks * units * convolutions + 1} "
        f"layers, {network.num_parameters:,} parameters"
    )


def rows_of(network: Network) -> list[Row]:
    """Returns the units of each block. If there is no room for all, equal neighbours become one."""
    every = [[(unit, 1) for unit in block] for block in network.blocks]
    if room_for_convolutions(every) >= NARROWEST:
        return every
    return [
        [(unit, len(list(equal))) for unit, equal in itertools.groupby(block)]
        for block in network.blocks
    ]


def entry(rows: Sequence[Row]) -> float:
    """Returns the distance between units, which is larger if one of them has a frame."""
    return 40 if any(count > 1 for row in rows for _, count in row) else 20


def room_for_convolutions(rows: Sequence[Row]) -> float:
    """Returns the width of a convolution with which every row fits."""
    widths = [WIDEST]
    for row in rows:
        kinds = [element.kind for unit, _ in row for element in elements(unit.layers)]
        taken = sum(WIDTHS.get(kind, STRIP) for kind in kinds if kind != "convolution")
        taken += entry(rows) * (len(row) - 1) + GAP * (len(kinds) - len(row)) + TURN
        widths.append((RIGHT - LEFT - taken) / kinds.count("convolution"))
    return min(widths)


def draw(network: Network, files: Sequence[str | Path]) -> None:
    """Draws the network and writes it to the files."""
    rows = rows_of(network)
    wide = room_for_convolutions(rows)
    pitch = 148 if network.config.shortcut_connections else 126
    y = FIRST
    height = FIRST + 4 * pitch + 62
    words = {"title": network.config.title, "subtitle": subtitle(network)}
    with picture(*files, height=height, **words) as figure:
        diagram = Diagram(figure)
        diagram.note(
            RIGHT,
            y,
            "Below each layer: height × width × depth of its output\nBN: batch normalisation"
            + ("\nBlue: shortcuts" if network.config.shortcut_connections else ""),
            ha="right",
        )
        diagram.text(MARGIN, y - 36, "Image", weight="bold", ha="left")
        diagram.image(MARGIN + 22, y, 44, example_image())
        diagram.note(MARGIN, y + 35, shape_text(network.input_shape), ha="left")
        x = diagram.layers([(MARGIN + 44, y), (LEFT, y)], network.begin, wide)[-1][1]

        deepest = network.blocks[-1][-1].layers[-1].shape[-1]
        for number, row in enumerate(rows, 1):
            way = way_to_next_row(x, y, pitch)
            y += pitch
            side, _, depth = shape = row[-1][0].layers[-1].shape
            side_note(diagram, y, f"Block {number}", shape_text(shape))
            diagram.maps(MARGIN, y + 46, side, 40 * depth / deepest)
            for unit, count in row:
                x = diagram.unit(way, unit, wide, count)
                way = [(x, y), (x + entry(rows), y)]

        way = way_to_next_row(x, y, pitch)
        side_note(diagram, y + pitch, "Output", f"{network.config.num_classes} classes")
        diagram.layers(way, [*network.end, Layer("softmax", network.end[-1].shape)], wide)


def way_to_next_row(x: float, y: float, pitch: float) -> list[Point]:
    """Returns the points of the line from the end of a row of layers to the next row."""
    right, left, between, below = x + TURN, LEFT - TURN - 8, y + 60, y + pitch
    return [(x, y), (right, y), (right, between), (left, between), (left, below), (LEFT, below)]


def side_note(diagram: Diagram, y: float, heading: str, text: str) -> None:
    diagram.text(MARGIN, y - 20, heading, weight="bold", ha="left")
    diagram.note(MARGIN, y - 2, text, ha="left")
