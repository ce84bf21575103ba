"""The evaluator as its users run it: scores, the report and its plots."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import random_images, skip_without_channels_first
from PIL import Image
from programs import error_of, run, table_in

from cifar10_resnet import checkpoints
from cifar10_resnet.config import ModelConfig, RunConfig
from cifar10_resnet.terminal import command
from cifar10_resnet.training.trainer import Trainer


def test_verbose_shows_all_settings_and_lets_tensorflow_speak(data, uninterrupted):
    shown = run("run_evaluator.py", f"--path={data}", f"--ckpt_path={uninterrupted}", "--verbose")
    assert table_in(shown.stdout)["weight_decay"] == "0.0002"
    assert "oneDNN" in shown.stderr or "optimized to use available CPU instructions" in shown.stderr


def test_a_home_folder_that_the_shell_did_not_expand_is_found(data, uninterrupted):
    home = {**os.environ, "HOME": str(uninterrupted.parent)}
    path = os.path.relpath(data, uninterrupted.parent)
    words = (f"--path=~/{path}", "--ckpt_path", f"~/{uninterrupted.name}")
    scored = run("run_evaluator.py", *words, env=home)
    assert f"{uninterrupted}/model.ckpt-60 (resnet8, step 60)" in scored.stdout


def test_the_evaluator_writes_what_it_prints(data, uninterrupted, tmp_path):
    file = tmp_path / "scores.json"
    shown = run(
        *("run_evaluator.py", f"--path={data}", f"--ckpt_path={uninterrupted}"),
        f"--output_json={file}",
    ).stdout
    scores = json.loads(file.read_text())
    assert scores["num_images"] == 130
    assert np.sum(scores["confusion_matrix"]) == 130
    assert f"{scores['accuracy']:.2%}" in shown
    assert f"{scores['loss']:.4f}" in shown
    assert scores["accuracy"] == np.trace(scores["confusion_matrix"]) / 130
    assert scores["accuracy"] <= scores["top_5_accuracy"] <= 1
    assert len(scores["per_class_accuracy"]) == 10
    assert scores["description"]["model"]["num_layers"] == 8


def test_all_intact_checkpoints_are_evaluated_and_damaged_ones_reported(
    data, uninterrupted, tmp_path
):
    folder, file = shutil.copytree(uninterrupted, tmp_path / "run"), tmp_path / "scores.json"
    (folder / "model.ckpt-50.index").write_bytes(b"half")
    done = run(
        *("run_evaluator.py", f"--path={data}", f"--ckpt_path={folder}", "--split=train"),
        *("--all_checkpoints", f"--output_json={file}", "--batch_size=64"),
        status=1,
    )
    (problem,) = done.stderr.splitlines()
    assert "model.ckpt-50 is incomplete" in problem
    scores = json.loads(file.read_text())
    assert [score["step"] for score in scores] == [20, 40, 60]
    assert {score["num_images"] for score in scores} == {400}
    assert len({score["loss"] for score in scores}) == 3


def test_evaluating_needs_only_the_test_file(data, uninterrupted, tmp_path):
    for name in ("test_batch.bin", "batches.meta.txt"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    run("run_evaluator.py", f"--path={tmp_path}", f"--ckpt_path={uninterrupted}")


@pytest.mark.parametrize(
    ("layout", "dtype"), [("channels_first", "fp32"), ("channels_last", "fp16")]
)
def test_layouts_and_precisions_score_one_checkpoint_alike(
    data, uninterrupted, tmp_path, layout, dtype
):
    if layout == "channels_first":
        skip_without_channels_first(dtype)
    losses = []
    for flags in ((), (f"--data_format={layout}", f"--dtype={dtype}")):
        file = tmp_path / "scores.json"
        run(
            *("run_evaluator.py", f"--path={data}", f"--ckpt_path={uninterrupted}"),
            *(f"--output_json={file}", *flags),
        )
        losses.append(json.loads(file.read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == "fp32" else 2e-2)


def test_what_the_evaluator_cannot_score_ends_with_a_one_line_error(data, uninterrupted, tmp_path):
    def refused(ckpt_path, *flags):
        return error_of("run_evaluator.py", f"--path={data}", f"--ckpt_path={ckpt_path}", *flags)

    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "no checkpoint" in refused(tmp_path)
    assert "no checkpoint" in refused(data)
    names = refused(uninterrupted, "--num_layers=20")
    assert "num_layers=20" in names
    assert "num_layers=8" in names
    for suffix in (".index", ".sha256"):
        name = "model.ckpt-20" + suffix
        (tmp_path / name).write_bytes((uninterrupted / name).read_bytes())
    assert "is missing" in refused(tmp_path / "model.ckpt-20")
    name = "model.ckpt-20.data-00000-of-00001"
    (tmp_path / name).write_bytes((uninterrupted / name).read_bytes()[:-1])
    assert "damaged" in refused(tmp_path)


def test_the_evaluator_writes_its_report_and_its_plots(tmp_path, write_cifar10, monkeypatch):
    write_cifar10(test=random_images(40))
    checkpoint = Trainer(RunConfig(ModelConfig(num_layers=8))).checkpoint
    checkpoints.save(checkpoint, str(tmp_path / "run"), 0)
    wanted = ("--report=r.html", "--plot_dir=new/plots", "--output_json=s.json")
    monkeypatch.chdir(tmp_path)
    out = run("evaluate", "--ckpt_path=run", f"--path={tmp_path}", *wanted).stdout
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    score = json.loads((tmp_path / "s.json").read_text())
    made = command("run_evaluator.py")  # however the evaluator was started
    for told in (made, f"{100 * score['accuracy']:.2f}%", *wanted, tf.__version__, "fp32"):
        assert told in page
    assert 0 <= score["expected_calibration_error"] <= 1
    assert score["accuracy_interval"][0] <= score["accuracy"] <= score["accuracy_interval"][1]
    plots = sorted(path.name for path in (tmp_path / "new" / "plots").iterdir())
    assert plots == [
        *("calibration.png", "class_accuracy.png", "confusion_matrix.png", "mistakes.png"),
    ]
    for name in plots:
        assert f"drew new/plots/{name}" in out
        with Image.open(tmp_path / "new" / "plots" / name) as plot:
            assert plot.width == (840 if name == "calibration.png" else 1800)
    assert "wrote r.html" in out
    assert "wrote s.json" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        *("cifar-10-batches-bin", "run", "r.html", "s.json", "new"),
    }


def test_files_that_cannot_be_written_are_refused_before_the_evaluation(tmp_path):
    (tmp_path / "file").touch()
    for flag, told in (
        ("--report=none/r.html", "its folder does not exist"),
        ("--report=.", "is a folder"),
        ("--output_json=none/s.json", "its folder does not exist"),
        ("--plot_dir=file", "file cannot be written"),
    ):
        # --ckpt_path does not exist either, but this error would come later.
        assert told in error_of("run_evaluator.py", "--ckpt_path=none", flag, cwd=tmp_path)


def test_a_report_is_of_one_checkpoint(tmp_path):
    flags = ("--ckpt_path=.", "--all_checkpoints", "--report=r.html")
    refused = error_of("run_evaluator.py", *flags, cwd=tmp_path)
    assert "--report and --plot_dir show one checkpoint" in refused
