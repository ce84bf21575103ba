"""The pictures: they show the networks and the runs as they are, in the same bytes each time."""

import errno
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from programs import PROJECT, run, run_code

import draw_curves
import run_csv
from cifar10_resnet.config import ModelConfig
from cifar10_resnet.errors import UserError
from cifar10_resnet.figures import style
from cifar10_resnet.figures.trace import trace
from resnet_model import ResNet

FILES = PROJECT / "files"
HEADER = "step,epoch,train_loss,train_accuracy,test_accuracy,learning_rate,seconds"


# Every kind of row: all units, or equal ones together; short, long and with more layers in a unit.
DRAW_NETWORKS = """
import sys
from cifar10_resnet.commands import draw
from cifar10_resnet.figures.trace import trace
from resnet_model import ResNet
from cifar10_resnet.config import ModelConfig

for config in (
    *(ModelConfig(layers) for layers in (8, 20, 32, 56)),
    *(ModelConfig(layers, bottleneck=True) for layers in (11, 29, 164)),
    ModelConfig(110, shortcut_connections=False),
    ModelConfig(20, resnet_version=1),
):
    network = trace(ResNet(config))
    rows = draw.rows_of(network)
    assert draw.room_for_convolutions(rows) >= draw.NARROWEST, config.name
    draw.draw(network, [f"{sys.argv[1]}/{config.name}.png"])
"""


def words(picture: Path) -> list[str]:
    """The words in a PNG that the project drew."""
    with Image.open(picture) as image:
        return image.info["Description"].split(" | ")


def draw(script: str, *arguments: object, status: int = 0) -> subprocess.CompletedProcess:
    # the scripts find the project from anywhere
    return run(script, *arguments, status=status, cwd="/")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Callable[[str], Counter[str]]:
    """The words in a drawing of each of the networks."""
    folder = tmp_path_factory.mktemp("drawn")
    run_code(DRAW_NETWORKS, folder)
    return lambda name: Counter(words(folder / f"{name}.png"))


def shapes(counted: Counter[str]) -> dict[str, int]:
    return {text: n for text, n in counted.items() if re.fullmatch(r"\d+×\d+×\d+", text)}


def test_the_drawing_of_20_layers_has_the_sizes_counted_by_hand(drawn):
    counted = drawn("resnet20")
    # below each convolution, and once beside each block and the picture
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
        "32×32×32": 1,  # the first unit of block 2 halves the picture in its second convolution
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
def test_the_trace_tells_where_each_shortcut_starts_and_what_is_on_it(version):
    network = trace(ResNet(ModelConfig(14, resnet_version=version)))
    units = [unit for block in network.blocks for unit in block]
    # after BN and ReLU in the first unit of version 2, else from the input
    assert [unit.shortcut_after for unit in units] == [2 if version == 2 else 0, 0, 0, 0, 0, 0]
    kinds = [[layer.kind for layer in unit.shortcut] for unit in units]
    assert kinds == [[], [], ["pool", "pad"], [], ["pool", "pad"], []]
    pool, pad = units[4].shortcut
    assert (pool.size, pool.stride, pool.shape) == (2, 2, (8, 8, 32))
    assert (pad.zeros, pad.shape) == ((16, 16), (8, 8, 64))


def test_the_pictures_in_the_folder_show_the_networks_as_they_are(tmp_path):
    draw("draw", f"--output={tmp_path / 'ResNet20_CIFAR10.png'}")
    draw("files/draw_parts.py", f"--output_dir={tmp_path}")
    draw("files/draw_curves.py", f"--output_dir={tmp_path}")
    pictures = {file.name for file in tmp_path.iterdir()}
    assert pictures >= {"init_conv.png", "unit.png", "shortcut.png", "final.png"}
    for name in pictures:
        assert words(tmp_path / name) == words(FILES / name), f"`make figures` draws {name} anew"
        with Image.open(FILES / name) as image:
            assert image.width == 2 * style.WIDTH


def test_a_network_is_drawn_in_the_same_bytes_each_time(tmp_path):
    for folder in (tmp_path / "once", tmp_path / "again"):
        folder.mkdir()
        files = [folder / "plain8.png", folder / "plain8.pdf"]
        draw(
            *("draw", "--resnet_size=8", "--noshortcut_connections"),
            f"--output={files[0]},{files[1]}",
        )
    for file in files:
        assert file.read_bytes() == (tmp_path / "once" / file.name).read_bytes()


def test_the_scripts_refuse_in_a_sentence():
    refused = draw("draw", "--num_layers=18", status=1).stderr
    assert "--num_layers=18 is not a depth" in refused
    assert "must end in .png or .pdf" in draw("draw", "--output=a.jpg", status=1).stderr


def write_run(file: Path, *lines: str, comments: Sequence[str] = ()) -> Path:
    told = ["# command: python run_trainer.py", "# versions: TensorFlow 2.21", *comments]
    text = "\n".join([*told, HEADER, *lines])
    file.write_text(text + "\n")
    return file


def test_a_run_is_read_with_gaps_where_nothing_was_measured(tmp_path):
    read = run_csv.read(
        write_run(
            tmp_path / "run.csv",
            "200,0.5,1.25,0.5,,0.1,30",
            "390,1,,,0.625,0.1,60",
            "400,1.02,1.0,0.75,,0.1,66",
        )
    )
    assert read.comments["versions"] == "TensorFlow 2.21"
    np.testing.assert_array_equal(read.columns["step"], [200, 390, 400])
    np.testing.assert_array_equal(read.columns["train_accuracy"], [0.5, np.nan, 0.75])
    run = draw_curves.Run(draw_curves.LAYERS_20, read.columns, read.accuracy)
    np.testing.assert_array_equal(run.curve("step", "train_accuracy"), [[200, 400], [0.5, 0.75]])
    np.testing.assert_array_equal(run.curve("seconds", "test_accuracy"), [[60], [0.625]])


def test_a_runs_minutes_are_those_of_its_usual_pace_whatever_came_between(tmp_path):
    lines = ["100,,1,0.5,,0.1,20", "200,,1,0.5,,0.1,50", "250,,,,0.6,0.1,50"]
    lines += ["300,,1,0.5,,0.1,80", "400,,1,0.5,,0.1,9080", "500,,1,0.5,,0.1,9110"]
    read = run_csv.read(write_run(tmp_path / "run.csv", *lines))
    # 20, 30, 30, 9000 and 30 seconds for a hundred steps
    np.testing.assert_allclose(read.minutes, [0.5, 1, 1.25, 1.5, 2, 2.5])
    untrained = run_csv.read(write_run(tmp_path / "run.csv", "0,,,,0.1,,0"))
    assert np.isnan(untrained.minutes).all()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["200,0.5,1,0.5,,0.1"], "line 4, has 6 cells where there are 7 columns"),
        (["200,0.5,1,half,,0.1,30"], "line 4, has a cell that is not a number"),
        (["200,0.5,1,0.5,91.2,0.1,30"], "line 4, has the test_accuracy 91.2, which is not between"),
        (["200,,,,,,", "100,,,,,,"], "has lines whose steps are not in order"),
    ],
)
def test_a_damaged_run_is_refused_where_it_is_damaged(lines, told, tmp_path):
    file = write_run(tmp_path / "run.csv", *lines)
    with pytest.raises(UserError, match=re.escape(told)) as refusal:
        run_csv.read(file)
    assert str(refusal.value).startswith(str(file))


@pytest.mark.parametrize("text", ["", "# a comment alone\n", "step,accuracy\n1,2\n"])
def test_another_file_is_not_taken_for_a_run(text, tmp_path):
    file = tmp_path / "run.csv"
    file.write_text(text)
    with pytest.raises(UserError, match="does not begin with the columns step,epoch"):
        run_csv.read(file)


def learning(file: Path, final: float) -> None:
    """A run that the evaluator gives this accuracy, and its own last evaluation a little less."""
    tests = final + 0.006 - 0.2 / np.arange(1, 21)
    lines = (f"{100 * s},{s},1,{t - 0.1:.5f},{t:.5f},0.1,{60 * s}" for s, t in enumerate(tests, 1))
    write_run(file, *lines, comments=[f"# test_accuracy: {final}"])


def test_curves_show_the_runs_that_are_there_and_no_others(tmp_path):
    results, output = tmp_path / "results", tmp_path / "drawn"
    results.mkdir()
    output.mkdir()
    said = draw("files/draw_curves.py", f"--results_dir={results}", f"--output_dir={output}").stdout
    assert said.count("not drawn, for want of runs") == 3
    assert not list(output.iterdir())

    learning(results / "resnet20-fast-seed0.csv", 0.912)
    learning(results / "resnet20-fast-28-epochs.csv", 0.914)
    learning(results / "resnet110-fast.csv", 0.935)
    write_run(results / "resnet56-fast.csv", "200,0.5,1,0.5,,0.1,30")  # not tested yet
    learning(results / "plain110-fast.csv", 0.40)
    said = draw("files/draw_curves.py", f"--results_dir={results}", f"--output_dir={output}").stdout
    assert f"left out: {results / 'resnet56-fast.csv'} has no test accuracy" in said
    assert f"left out: {results / 'plain20-fast.csv'} is not there" in said

    def labels(name: str) -> list[str]:
        return [text for text in words(output / name) if re.match(r".*: [\d.]+ %", text)]

    assert labels("resnet.png") == ["20 layers: 8.8 %", "110 layers: 6.5 %"]
    assert labels("plain.png") == ["110 layers: 60.0 %"]
    assert labels("speed.png") == [
        "fast recipe, 28 epochs: 91.4 %, 20 min",
        "ResNet-20 in the paper: 91.25 %",
    ]

    again = tmp_path / "again"
    shutil.copytree(output, again)
    draw("files/draw_curves.py", f"--results_dir={results}", f"--output_dir={output}")
    for file in output.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_labels_keep_their_order_and_a_gap_and_move_no_further_than_they_must():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = list(rng.uniform(0, 10, rng.integers(1, 6)))
        places = draw_curves.spread(values, 1.0)
        order = np.argsort(values)
        assert (np.diff(np.array(places)[order]) >= 1 - 1e-9).all()
        assert np.mean(places) == pytest.approx(np.mean(values))
    assert draw_curves.spread([5, 1, 9], 1) == [5, 1, 9]
    assert draw_curves.spread([2, 2.5], 1) == [1.75, 2.75]


def test_the_colours_of_curves_in_one_picture_differ_in_grey_too():
    def luminance(colour: str) -> float:
        linear = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
            for v in style.to_rgb(colour)
        ]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for looks in (draw_curves.RESIDUAL, draw_curves.PLAIN, draw_curves.SPEED):
        greys = sorted(luminance(look.colour) ** (1 / 3) for look in looks.values())
        assert min(np.diff(greys)) > 0.04
        assert len({look.marker for look in looks.values()}) == len(looks)


def test_a_picture_that_cannot_be_written_is_told_of_in_a_sentence(tmp_path):
    file = tmp_path / "missing" / "picture.png"
    told = re.escape(f"cannot write {file}: No such file or directory.")
    with pytest.raises(UserError, match=told), style.picture(file, height=100, title=""):
        pass


def test_a_picture_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fill_the_disk(figure: Figure, file: Path, **options: object) -> None:
        file.write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "picture.png"
    file.write_bytes(b"the old one")
    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with (
        pytest.raises(UserError, match="No space left"),
        style.picture(file, height=100, title=""),
    ):
        pass
    assert file.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
