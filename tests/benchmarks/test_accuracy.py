"""The runs behind the results: their CSV files, and the curves drawn of them."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import words_in
from programs import run

import draw_curves
import run_csv
from cifar10_resnet.errors import UserError
from cifar10_resnet.figures import style

HEADER = "step,epoch,train_loss,train_accuracy,test_accuracy,learning_rate,seconds"
DRAW = "benchmarks/accuracy/draw_curves.py"


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
    run = draw_curves.Run("run", draw_curves.LAYERS_20, read.columns, read.accuracy)
    np.testing.assert_array_equal(run.curve("step", "train_accuracy"), [[200, 400], [50, 75]])
    np.testing.assert_array_equal(run.curve("seconds", "test_accuracy"), [[60], [62.5]])


def test_the_epochs_of_evaluations_follow_from_the_steps(tmp_path):
    lines = ["100,0.25,1,0.5,,0.1,30", "150,,,,0.625,0.1,60", "400,1,1,0.75,,0.1,66"]
    np.testing.assert_allclose(
        run_csv.read(write_run(tmp_path / "run.csv", *lines)).epochs, [0.25, 0.375, 1]
    )


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
def test_another_file_does_not_count_as_a_run(text, tmp_path):
    file = tmp_path / "run.csv"
    file.write_text(text)
    with pytest.raises(UserError, match="does not begin with the columns step,epoch"):
        run_csv.read(file)


def learning(file: Path, final: float) -> None:
    """A run that the evaluator gives this accuracy, and its own last evaluation a little less."""
    tests = final + 0.006 - 0.2 / np.arange(1, 21)
    lines = (f"{100 * s},{s},1,{t - 0.1:.5f},{t:.5f},0.1,{60 * s}" for s, t in enumerate(tests, 1))
    comments = [f"# test_accuracy: {final}", "# processor: Intel(R) Xeon(R), 2 threads"]
    write_run(file, *lines, comments=comments)


def test_curves_show_the_runs_that_are_there_and_no_others(tmp_path):
    results, output = tmp_path / "results", tmp_path / "drawn"
    results.mkdir()
    output.mkdir()
    said = run(
        "benchmarks/accuracy/draw_curves.py", f"--results_dir={results}", f"--output_dir={output}"
    ).stdout
    assert said.count("not drawn, because its runs do not exist") == 5
    assert not list(output.iterdir())

    learning(results / "resnet20-fast-seed0.csv", 0.912)
    learning(results / "resnet20-fast-28-epochs.csv", 0.914)
    learning(results / "resnet110-fast.csv", 0.935)
    write_run(results / "resnet56-fast.csv", "200,0.5,1,0.5,,0.1,30")  # not tested yet
    learning(results / "plain110-fast.csv", 0.40)
    said = run(
        "benchmarks/accuracy/draw_curves.py", f"--results_dir={results}", f"--output_dir={output}"
    ).stdout
    assert f"skipped: {results / 'resnet56-fast.csv'} has no test accuracy" in said
    assert f"skipped: {results / 'plain20-fast.csv'} does not exist" in said

    def labels(name: str) -> list[str]:
        return [text for text in words_in(output / name) if re.search(r"\d%", text)]

    assert labels("resnet.png")[:2] == ["20 layers: 91.2%", "110 layers: 93.5%"]
    assert labels("plain.png")[:1] == ["110 layers: 40.0%"]
    assert labels("depth.png")[:3] == ["91.2%", "93.5%", "40.0%"]
    assert {"residual networks", "plain networks"} <= set(words_in(output / "depth.png"))
    others = ["93.3%", "93.5%", "94.0%", "94.9%", "95.9%", "91.2%", "92.5%", "92.8%", "93.0%"]
    assert labels("others.png")[:12] == [*others, "93.6%", "91.2%", "93.5%"]
    assert labels("speed.png")[:2] == [
        "fast recipe, 28 epochs: 91.4% after 20 min (Intel)",
        "dotted: the paper's ResNet-20, 91.25%",
    ]

    again = tmp_path / "again"
    shutil.copytree(output, again)
    run(DRAW, f"--results_dir={results}", f"--output_dir={output}")
    for file in output.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_the_colours_of_curves_in_one_plot_differ_in_grey_too():
    def luminance(colour: str) -> float:
        linear = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
            for v in style.to_rgb(colour)
        ]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for names in (draw_curves.RESIDUAL, draw_curves.DEPTHS, draw_curves.SPEED):
        looks = set(names.values())
        greys = sorted(luminance(look.colour) ** (1 / 3) for look in looks)
        assert min(np.diff(greys)) > 0.04
        assert len({look.marker for look in looks}) == len(looks)
