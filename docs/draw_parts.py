"""Draws the parts of the networks: first convolution, units, shortcuts, the way to the classes.

python docs/draw_parts.py --output_dir=somewhere
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from cifar10_resnet.cli import app
from cifar10_resnet.config import ModelConfig
from cifar10_resnet.data.synthetic import CLASS_NAMES
from cifar10_resnet.device import start_tensorflow
from cifar10_resnet.figures.diagram import (
    HEIGHT,
    RADIUS,
    SLANT,
    Diagram,
    Layer,
    Network,
    Unit,
    example_image,
    shape_text,
)
from cifar10_resnet.figures.style import (
    ACCENT,
    INK,
    LARGE,
    MARGIN,
    MUTED,
    PAPER,
    picture,
)
from cifar10_resnet.settings import Checked, setting
from cifar10_resnet.terminal import PROJECT

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

# Each kind of unit has the flag that chooses it, and a network that contains it.
UNITS = {
    "Plain": ("--shortcut_connections=False", ModelConfig(shortcut_connections=False)),
    "Residual": ("the default", ModelConfig()),
    "Bottleneck": ("--bottleneck", ModelConfig(29, bottleneck=True)),
    "Version 1": ("--resnet_version=1", ModelConfig(resnet_version=1)),
}
OUTPUTS = {"Plain": "F(x)", "Version 1": "ReLU(x + F(x))"}


@dataclass(frozen=True)
class Settings(Checked):
    output_dir: str = setting(str(PROJECT / "files"), "Folder to draw into", "Output")


def main(flags: "Flags") -> int:
    """Draws the four diagrams into `output_dir`."""
    folder = Path(flags.output_dir)
    start_tensorflow("cpu")
    from cifar10_resnet.figures.trace import trace
    from resnet_model import ResNet

    network, kernels = trace(ModelConfig()), ResNet().init_conv.kernel.numpy()
    draw_initial_convolution(network, kernels, folder / "init_conv.png")
    units = {kind: trace(config).blocks[0][1] for kind, (_, config) in UNITS.items()}
    draw_units(units, folder / "unit.png")
    draw_shortcuts(network, folder / "shortcut.png")
    draw_end(network, folder / "final.png")
    return 0


def draw_initial_convolution(network: Network, kernels: np.ndarray, file: Path) -> None:
    """Draws one value of a feature map as the sum of 27 products, and all the maps."""
    size, maps = network.begin[0].size, network.begin[0].shape[-1]
    image = example_image()
    side, depth = image.shape[1:]
    centred = image - image.mean((0, 1))
    responses = convolve(centred, kernels)
    row, column, number = 16, 20, 4  # the window's place, and the kernel and map that are shown
    window = centred[row - 1 : row + 2, column - 1 : column + 2]

    title = f"The first convolution turns an image into {maps} feature maps"
    subtitle = "Orange values are above zero, blue values are below zero"
    with picture(file, height=408, title=title, subtitle=subtitle) as figure:
        diagram = Diagram(figure)
        middle = 216
        diagram.image(80, middle, 112, image)
        diagram.arrow([(136, middle), (174, middle)])
        scale = 80 / side
        for channel in range(depth):
            y = middle + (channel - 1) * 88
            diagram.image(216, y, 80, image * np.eye(depth, dtype=np.uint8)[channel])
            place = 176 + scale * (column + 0.5), y - 40 + scale * (row + 0.5)
            diagram.grid(*place, scale * size, 1, PAPER)
            for edge in (-1, 1):
                corner = place[0] + scale * size / 2, place[1] + edge * scale * size / 2
                diagram.line([corner, (333, y + 27 * edge)], "#8c959f", 0.8, zorder=5)
            diagram.signed(360, y, 54, window[..., channel], INK, size)
            diagram.text(408, y, "×", LARGE)
            diagram.signed(456, y, 54, kernels[..., channel, number], INK, size)
            diagram.arrow([(483, y), (506, y), (506, middle), (522, middle)])
        diagram.sum(538, middle, 16)
        for index in range(maps):
            x, y = 643 + 66 * (index % 4), middle + 66 * (index // 4 - 1.5)
            diagram.signed(x, y, 60, responses[..., index], MUTED)
            if index == number:
                place = x - 30 + 60 / side * (column + 0.5), y - 30 + 60 / side * (row + 0.5)
                diagram.grid(*place, 5, 1, INK)
                diagram.arrow([(554, middle), (place[0] - 3, place[1])], zorder=7)
        for x, text, note in (
            (80, "image", shape_text(network.input_shape)),
            (216, "colour channels", "red, green, blue"),
            (360, "window", f"{size}×{size}×{depth}, minus the mean"),
            (462, "kernel", f"{size}×{size}×{depth}"),
            (538, "sum", ""),
            (742, f"{maps} feature maps", f"one per kernel, {shape_text(network.begin[0].shape)}"),
        ):
            diagram.text(x, 366, text)
            diagram.note(x, 384, note)


def convolve(image: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Returns a convolution in float64: unlike TensorFlow's, bit-identical on every machine."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[:2], (0, 1))
    return np.einsum("yxcij,ijcm->yxm", windows, kernels.astype(np.float64))


def draw_units(units: dict[str, Unit], file: Path) -> None:
    """Draws the kinds of units below each other, with equal parts at equal places."""
    left, wide, top, pitch = 262, 96, 112, 136
    title = "A residual unit adds its input to F(x)"
    with picture(file, height=top + 3 * pitch + 66, title=title) as figure:
        diagram = Diagram(figure)
        for row, (kind, unit) in enumerate(units.items()):
            y = top + row * pitch
            diagram.text(MARGIN, y - 9, f"{kind} unit", weight="bold", ha="left")
            diagram.note(MARGIN, y + 10, UNITS[kind][0], ha="left")
            diagram.text(left - 42, y, "x", style="italic", ha="right")
            x = diagram.unit([(left - 36, y), (left, y)], unit, wide)
            diagram.arrow([(x, y), (x + 30, y)])
            diagram.text(x + 36, y, OUTPUTS.get(kind, "x + F(x)"), style="italic", ha="left")


def draw_shortcuts(network: Network, file: Path) -> None:
    """Draws where shortcuts start, and how a shortcut changes its size between blocks."""
    first, second = network.blocks[0][:2]
    title = "A shortcut leads around the convolutions of a unit"
    with picture(file, height=486, title=title) as figure:
        diagram = Diagram(figure)
        for x, unit, heading in (
            (MARGIN, second, "Most units: the input itself"),
            (462, first, "The first unit: the input after BN and ReLU"),
        ):
            diagram.text(x, 80, heading, weight="bold", ha="left")
            end = diagram.unit([(x, 170), (x + 32, 170)], unit, 96)
            diagram.arrow([(end, 170), (end + 30, 170)])
        heading = "The first unit of a block that halves the maps and doubles the depth"
        diagram.text(MARGIN, 262, heading, weight="bold", ha="left")
        draw_reduction(diagram, 362, second.layers[-1].shape, *network.blocks[1][0].shortcut)


def draw_reduction(
    diagram: Diagram, y: float, shape: tuple[int, ...], pool: Layer, pad: Layer
) -> None:
    """Draws a shortcut from one size of feature maps to the next."""
    x = MARGIN
    texts = {
        pool: f"{pool.size}×{pool.size} average pool\nstride {pool.stride}",
        pad: "zeros before\nand after",
    }
    x = draw_maps(diagram, x, y, shape)
    for layer, text in texts.items():
        diagram.arrow([(x + 8, y), (x + 36, y)], ACCENT, 1.6)
        diagram.box(x + 91, y, 110, 46, text, layer.kind)
        diagram.arrow([(x + 146, y), (x + 174, y)], ACCENT, 1.6)
        x = draw_maps(diagram, x + 184, y, layer.shape, layer.zeros)
    diagram.arrow([(x + 54, y), (x + 86, y)], ACCENT, 1.6)
    diagram.add(x + 86 + RADIUS, y)


def draw_maps(
    diagram: Diagram, left: float, y: float, shape: tuple[int, ...], zeros: tuple[int, int] = (0, 0)
) -> float:
    """Draws feature maps and returns their right x. `zeros` counts the zero maps at each end."""
    side, deep = 3 * shape[0], 3 * shape[2]
    bottom = y + (side - deep * SLANT[1]) / 2
    diagram.note(left + (side + deep * SLANT[0]) / 2, y + 92, shape_text(shape))
    before, after = zeros
    behind = deep
    for count, kind in ((after, "zeros"), (shape[2] - before - after, "maps"), (before, "zeros")):
        behind -= 3 * count
        if count:
            x, y = left + behind * SLANT[0], bottom + behind * SLANT[1]
            diagram.maps(x, y, side, 3 * count, kind == "zeros")
            if any(zeros):
                middle = 1.5 * count
                x, y = x + side + middle * SLANT[0] + 8, y + middle * SLANT[1] + 2
                diagram.note(x, y, f"{count} {kind}", ha="left")
    return left + side + deep * SLANT[0]


def draw_end(network: Network, file: Path) -> None:
    """Draws the layers from the last feature maps to the classes, with made-up values."""
    *_, mean, projection = network.end
    shape, [features], [classes] = network.end[0].shape, mean.shape, projection.shape
    rng = np.random.default_rng(0)
    means, logits = rng.random(features), rng.normal(size=classes)
    logits[CLASS_NAMES.index("ring")] = 3
    probabilities = np.exp(logits) / np.exp(logits).sum()

    y, height = 178, 208
    title = "From feature maps to class probabilities"
    with picture(file, height=374, title=title) as figure:
        diagram = Diagram(figure)
        diagram.maps(MARGIN, y + 50, 6 * shape[0], 1.5 * shape[2])
        end = MARGIN + 6 * shape[0] + 1.5 * shape[2] * SLANT[0]
        [*_, (_, x)] = diagram.layers([(end + 6, y), (end + 34, y)], network.end[:-1], 0)
        diagram.arrow([(x, y), (x + 30, y)])

        left, right = x + 34, x + 246  # ends of the projection
        cells = [y + height * ((k + 0.5) / features - 0.5) for k in range(features)]
        rows = [y + height * ((k + 0.5) / classes - 0.5) for k in range(classes)]
        for cell, value in zip(cells, means, strict=True):
            diagram.bar(left, cell, 16, height / features, value)
        diagram.arrow([(right + 22, y), (right + 50, y)])
        diagram.box(right + 91, y, 82, HEIGHT, "softmax", "softmax")
        diagram.arrow([(right + 132, y), (right + 160, y)])
        for row, name, logit, share in zip(rows, CLASS_NAMES, logits, probabilities, strict=True):
            diagram.fan((left + 16, y - height / 2), (left + 16, y + height / 2), (right, row))
            diagram.bar(right, row, 22, height / classes, (logit - logits.min()) / np.ptp(logits))
            diagram.note(right + 226, row, name, ha="right")
            diagram.bar(right + 232, row, 60 * share / probabilities.max(), 12, 0.8, ACCENT)
        weights = f"{features}×{classes} weights, {classes} biases"
        for x, text, note in (
            (MARGIN + 62, "feature maps", shape_text(shape)),
            (left + 8, "features", features),
            ((left + 16 + right) / 2, "projection", weights),
            (right + 11, "logits", classes),
            (right + 232, "probabilities", classes),
        ):
            diagram.text(x, 328, text)
            diagram.note(x, 347, str(note))


if __name__ == "__main__":
    app.run(main, Settings)
