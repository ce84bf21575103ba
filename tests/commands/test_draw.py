"""The diagrams: they show the networks as they are, in the same bytes each time."""

import re
import subprocess
from collections import Counter
from collections.abc import Callable

import pytest
from conftest import words_in
from PIL import Image
from programs import PROJECT, run, run_code

from cifar10_resnet.config import ModelConfig
from cifar10_resnet.figures import style
from cifar10_resnet.figures.trace import trace

FILES = PROJECT / "files"


# Every kind of row: all units, or equal ones together; short, long and with more layers in a unit.
DRAW_NETWORKS = """
import sys
from cifar10_resnet.figures import network as drawing
from cifar10_resnet.figures.trace import trace
from cifar10_resnet.config import ModelConfig

for config in (
    *(ModelConfig(layers) for layers in (8, 20, 32, 56)),
    *(ModelConfig(layers, bottleneck=True) for layers in (11, 29, 164)),
    ModelConfig(110, shortcut_connections=False),
    ModelConfig(20, resnet_version=1),
):
    network = trace(config)
    rows = drawing.rows_of(network)
    assert drawing.room_for_convolutions(rows) >= drawing.NARROWEST, config.name
    drawing.draw(network, [f"{sys.argv[1]}/{config.name}.png"])
"""


def draw(script: str, *arguments: object, status: int = 0) -> subprocess.CompletedProcess:
    # the scripts find the project from anywhere
    return run(script, *arguments, status=status, cwd="/")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Callable[[str], Counter[str]]:
    """The words in a drawing of each of the networks."""
    folder = tmp_path_factory.mktemp("drawn")
    run_code(DRAW_NETWORKS, folder)
    return lambda name: Counter(words_in(folder / f"{name}.png"))


def shapes(counted: Counter[str]) -> dict[str, int]:
    return {text: n for text, n in counted.items() if re.fullmatch(r"\d+×\d+×\d+", text)}


def test_the_drawing_of_20_layers_has_the_sizes_counted_by_hand(drawn):
    counted = drawn("resnet20")
    # below each convolution, and once next to each block and the image
    assert shapes(counted) == {"32×32×3": 1, "32×32×16": 8, "16×16×32": 7, "8×8×64": 7}
    assert counted["3×3 conv"] == counted["BN, ReLU"] == 19
    assert counted["stride 2"] == counted["10"] == 2
    assert counted["64"] == counted["10 classes"] == counted["ResNet-20"] == 1
    assert counted["2×2 avg pool, 8 + 8 zeros"] == counted["2×2 avg pool, 16 + 16 zeros"] == 1
    assert any("= 20 layers, 269,722 parameters" in text for text in counted)


def test_the_drawing_of_56_layers_counts_equal_units(drawn):
    counted = drawn("resnet56")
    assert shapes(counted) == {"32×32×3": 1, "32×32×16": 6, "16×16×32": 5, "8×8×64": 5}
    assert counted["× 8"] == 3
    subtitle = (
        "1 convolution + 3 blocks × 9 units × 2 convolutions + 1 projection = 56 layers, "
        "853,018 parameters"
    )
    assert counted[subtitle] == 1


def test_the_drawing_of_164_bottleneck_layers_has_the_sizes_counted_by_hand(drawn):
    counted = drawn("resnet164-bottleneck")
    assert shapes(counted) == {
        "32×32×3": 1,
        "32×32×16": 1 + 2 + 2,
        "32×32×64": 1 + 1 + 1,
        "32×32×32": 1,  # the first unit of block 2 halves the image in its second convolution
        "16×16×32": 1 + 2,
        "16×16×128": 1 + 1 + 1,
        "16×16×64": 1,
        "8×8×64": 1 + 2,
        "8×8×256": 1 + 1 + 1,
    }
    assert counted["× 17"] == 3
    assert counted["256"] == counted["24 + 24 zeros"] == 1
    assert counted["2×2 avg pool, 32 + 32 zeros"] == counted["2×2 avg pool, 64 + 64 zeros"] == 1
    assert any("= 164 layers, 1,661,274 parameters" in text for text in counted)


def test_the_drawing_of_a_plain_network_has_no_shortcuts(drawn):
    counted = drawn("plain110")
    assert counted["Plain-110"] == counted["× 18"] == 1
    assert counted["× 17"] == 2
    assert not any("zeros" in text for text in counted)


@pytest.mark.parametrize("version", [1, 2])
def test_the_trace_shows_where_each_shortcut_starts_and_what_is_on_it(version):
    network = trace(ModelConfig(14, resnet_version=version))
    units = [unit for block in network.blocks for unit in block]
    # after BN and ReLU in the first unit of version 2, else from the input
    assert [unit.shortcut_after for unit in units] == [2 if version == 2 else 0, 0, 0, 0, 0, 0]
    kinds = [[layer.kind for layer in unit.shortcut] for unit in units]
    assert kinds == [[], [], ["pool", "pad"], [], ["pool", "pad"], []]
    pool, pad = units[4].shortcut
    assert (pool.size, pool.stride, pool.shape) == (2, 2, (8, 8, 32))
    assert (pad.zeros, pad.shape) == ((16, 16), (8, 8, 64))


def test_the_plots_in_the_folder_show_the_networks_as_they_are(tmp_path):
    draw("draw", f"--output={tmp_path / 'ResNet20_CIFAR10.png'}")
    draw("docs/draw_parts.py", f"--output_dir={tmp_path}")
    draw("benchmarks/accuracy/draw_curves.py", f"--output_dir={tmp_path}")
    pictures = {file.name for file in tmp_path.iterdir()}
    assert pictures >= {"init_conv.png", "unit.png", "shortcut.png", "final.png"}
    for name in pictures:
        assert words_in(tmp_path / name) == words_in(FILES / name), (
            f"`make figures` draws {name} anew"
        )
        with Image.open(FILES / name) as image:
            assert image.width == 2 * style.WIDTH


def test_a_network_is_drawn_in_the_same_bytes_each_time(tmp_path):
    for folder in (tmp_path / "once", tmp_path / "again"):
        folder.mkdir()
        files = [folder / "plain8.PNG", folder / ".pdf"]
        draw(
            *("draw", "--resnet_size=8", "--noshortcut_connections"),
            *(f"--output={file}" for file in files),
        )
    for file in files:
        assert file.read_bytes() == (tmp_path / "once" / file.name).read_bytes()


def test_the_scripts_refuse_with_a_one_line_error():
    refused = draw("draw", "--num_layers=18", status=1).stderr
    assert "--num_layers=18 is invalid: it must be 6n + 2." in refused
    assert (
        "it must be a file that ends in .png or .pdf."
        in draw("draw", "--output=a.jpg", status=1).stderr
    )
