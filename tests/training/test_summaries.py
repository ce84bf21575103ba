"""TensorBoard shows a run, and watching a run does not change it."""

import contextlib
import dataclasses
import glob
import io
import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_trainer import gradients_of, make_batch, make_run, options

import cifar10_input
import run_trainer
from cifar10_resnet.data import splits
from cifar10_resnet.data.dataset import find
from cifar10_resnet.data.synthetic import CLASS_NAMES
from cifar10_resnet.training import summaries
from cifar10_resnet.training.trainer import Trainer

# TensorBoard reads event files without TensorFlow, and starts in half the time, where it is hidden.
TENSORBOARD = """
import sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
import tensorboard.compat
tensorboard.compat.notf = sys.modules["tensorboard.compat.notf"]
from tensorboard.main import run_main
run_main()
"""
BLOCKS = {"init_conv", "block1", "block2", "block3", "final_norm", "logits"}
CURVES = {"loss", "accuracy", "learning_rate", "images_per_second", "epoch"}
RESULTS = {f"result/{name}" for name in summaries.RESULTS}


@pytest.fixture(autouse=True)
def _small_synthetic(monkeypatch):
    monkeypatch.setattr("cifar10_resnet.data.dataset.SYNTHETIC_IMAGES", {"train": 80, "test": 40})


@contextlib.contextmanager
def tensorboard(folder: str) -> Iterator[Callable[..., bytes]]:
    """TensorBoard itself on a folder; what it yields asks it for a page, or posts JSON."""
    process = subprocess.Popen(
        [sys.executable, "-c", TENSORBOARD, f"--logdir={folder}", "--port=0", "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if match := re.search(r"(http://\S+:\d+/)", line):
                break

        def ask(page: str, post: dict | None = None, **query: object) -> bytes:
            request = urllib.request.Request(f"{match[1]}{page}?{urllib.parse.urlencode(query)}")
            if post is not None:
                request.data = json.dumps(post).encode()
                request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()

        yield ask
    finally:
        process.kill()
        process.communicate()


def test_tensorboard_shows_a_run_with_all_its_curves_images_and_settings(tmp_path):
    run = make_run(num_iterations=20, init_lr=0.05)
    settings = options(tmp_path / "run", epochs_between_evals=1, log_per_iterations=4)
    first = run_trainer.train(run, dataclasses.replace(settings, max_train_steps=12))
    last = run_trainer.train(run, settings, resume_from=first.checkpoint)

    with tensorboard(str(tmp_path)) as ask:
        assert b"<title>TensorBoard" in ask("")

        def data(plugin: str, page: str, **query: object):
            return json.loads(ask(f"data/plugin/{plugin}/{page}", **query))

        tags = {run: set(of_run) for run, of_run in data("scalars", "tags").items()}
        norms = {f"{kind}/{block}" for kind in ("weight_norm", "gradient_norm") for block in BLOCKS}
        assert tags == {
            "run/log/train": CURVES | norms | RESULTS,
            "run/log/eval": {"loss", "accuracy"},
        }

        def curve(writer: str, tag: str) -> list[tuple[int, float]]:
            points = data("scalars", "scalars", run=f"run/log/{writer}", tag=tag)
            return [(step, value) for _, step, value in points]

        for tag in CURVES | norms:
            assert [step for step, _ in curve("train", tag)] == [4, 8, 12, 16, 20], tag
        assert [step for step, _ in curve("eval", "accuracy")] == [10, 12, 20]
        assert curve("eval", "accuracy")[-1][1] == pytest.approx(last.metrics.accuracy)
        assert curve("train", "learning_rate")[-1][1] == pytest.approx(0.0005)

        images = data("images", "tags")
        assert set(images["run/log/train"]) == {"augmented_images"}
        assert set(images["run/log/eval"]) == {"confusion_matrix", "mistakes"}

        def shown_images(writer: str, tag: str) -> dict[int, Image.Image]:
            found = data("images", "images", run=f"run/log/{writer}", tag=tag, sample=0)
            page = "data/plugin/images/individualImage?"
            return {
                each["step"]: Image.open(io.BytesIO(ask(page + each["query"]))) for each in found
            }

        assert set(shown_images("eval", "confusion_matrix")) == {10, 12, 20}
        assert set(shown_images("eval", "mistakes")) == {12, 20}
        assert set(shown_images("train", "augmented_images")) == {4, 16}  # of either start
        assert all(min(each.size) > 300 for each in shown_images("eval", "mistakes").values())

        (text, _) = data("text", "text", run="run/log/train", tag="run")
        assert "<td>0.05</td>" in text["text"]
        assert ", ".join(CLASS_NAMES) in text["text"]

        graph = ask("data/plugin/graphs/graph", run="run/log/train", conceptual="false").decode()
        for name in ("block3/unit1", "logits", "gradient_tape/block1/unit1", "optimizer"):
            assert f'name: "{name}/' in graph

        experiment = json.loads(ask("data/plugin/hparams/experiment", post={"experimentName": ""}))
        columns = [info["name"] for info in experiment["hparamInfos"]]
        assert set(columns) == set(summaries.SETTINGS)

        query = {"experimentName": "", "colParams": [], "startIndex": 0, "sliceSize": 9}
        query["allowedStatuses"] = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"]
        answer = json.loads(ask("data/plugin/hparams/session_groups", post=query))
        (group,) = answer["sessionGroups"]
        assert group["name"] == str(tmp_path / "run" / "log")
        assert group["hparams"]["init_lr"] == 0.05
        assert group["hparams"]["num_layers"] == 8
        assert group["hparams"]["shortcut_connections"] is True
        results = {each["name"]["tag"]: each["value"] for each in group["metricValues"]}
        assert set(results) == RESULTS
        assert results["result/accuracy"] == pytest.approx(last.metrics.accuracy)
        assert last.summary["best accuracy"].startswith(
            f"{results['result/best_accuracy']:.2%} on test"
        )


def test_a_run_without_evaluations_has_no_empty_run_in_tensorboard(tmp_path):
    run_trainer.train(make_run(num_iterations=2), options(tmp_path))
    folders = {path.name for path in (tmp_path / "log").iterdir() if path.is_dir()}
    assert folders == {"train"}
    (file,) = (tmp_path / "log/train").iterdir()
    points = tf.compat.v1.train.summary_iterator(str(file))
    assert any(value.tag == "loss" for event in points for value in event.summary.value)


def test_a_run_that_ends_before_its_first_point_leaves_no_event_file(tmp_path):
    summaries.Summaries(str(tmp_path / "log")).close()
    assert list((tmp_path / "log").iterdir()) == []


def test_the_grid_shows_the_very_batch_that_is_learned_from(tmp_path):
    run = make_run(num_iterations=2)
    run_trainer.train(run, options(tmp_path))
    (file,) = glob.glob(str(tmp_path / "log/train/events*"))
    shown = [
        value.tensor.string_val[2]
        for event in tf.compat.v1.train.summary_iterator(file)
        for value in event.summary.value
        if value.tag == "augmented_images"
    ]
    pixels = np.asarray(Image.open(io.BytesIO(shown[0])))
    assert pixels.shape == (68, 8 * 68, 3)

    examples, _ = splits.load_training(find(name="synthetic"), run.data)
    mean = cifar10_input.mean_image(examples.images)
    batch, _ = next(iter(cifar10_input.training_batches(examples, mean, 8)))
    for i, image in enumerate(batch.numpy() + mean):
        part = pixels[2:66:2, 68 * i + 2 : 68 * i + 66 : 2]
        np.testing.assert_array_equal(part, np.clip(np.rint(image), 0, 255))


def test_a_grid_is_as_large_as_it_must_be():
    assert summaries.image_grid(np.zeros([1, 32, 32, 3])).shape == (68, 544, 3)
    assert summaries.image_grid(np.zeros([64, 32, 32, 3])).shape == (544, 544, 3)
    assert summaries.image_grid(np.zeros([500, 32, 32, 3])).shape == (544, 544, 3)


@pytest.mark.parametrize("optimizer", ["momentum", "muon"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_norms_are_those_of_the_weights_and_of_the_last_steps_gradients(optimizer, nesterov):
    trainer = Trainer(
        make_run(optimizer=optimizer, nesterov=nesterov, weight_decay=0.1, init_lr=0.01)
    )
    trainer.train_step(*make_batch(0))
    before = [v.numpy() for v in trainer.model.variables]
    gradients = gradients_of(trainer, make_batch(1))
    for variable, value in zip(trainer.model.variables, before, strict=True):
        variable.assign(value)
    trainer.watch_next_step()
    trainer.train_step(*make_batch(1))
    norms = trainer.norms()

    squares = {}
    for variable, gradient in zip(trainer.model.trainable_variables, gradients, strict=True):
        block = variable.name.split("/")[0]
        for kind, value in (("weight", variable.numpy()), ("gradient", gradient)):
            tag = f"{kind}_norm/{block}"
            squares[tag] = squares.get(tag, 0) + (value.astype(np.float64) ** 2).sum()
    assert norms.keys() == squares.keys()
    for tag, square in squares.items():
        assert norms[tag] == pytest.approx(np.sqrt(square), rel=1e-4), tag


def test_a_step_that_was_not_watched_has_no_gradient_norms():
    trainer = Trainer(make_run())
    assert not any(tag.startswith("gradient") for tag in trainer.norms())
    trainer.watch_next_step()
    trainer.train_step(*make_batch(0))
    trainer.train_step(*make_batch(1))
    assert not any(tag.startswith("gradient") for tag in trainer.norms())


@pytest.mark.parametrize("optimizer", ["momentum", "muon"])
def test_watching_steps_does_not_change_a_bit_of_them(optimizer):
    ends = []
    for watching in (False, True):
        trainer = Trainer(make_run(optimizer=optimizer, nesterov=True))
        for step in range(3):
            if watching:
                trainer.watch_next_step()
            trainer.train_step(*make_batch(step))
            if watching:
                trainer.norms()
        ends.append([v.numpy() for v in trainer.model.variables])
        ends[-1] += [slot.numpy() for slot in trainer.optimizer.slots.values()]
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("steps_per_call", "expected"), [(1, {4, 5, 6}), (5, {4})])
def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path, capsys, steps_per_call, expected):
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    settings = {"steps_per_call": steps_per_call, "log_per_iterations": 100}
    run_trainer.train(
        make_run(num_iterations=12), options(tmp_path, profile_steps=(4, 6), **settings)
    )
    assert str(tmp_path / "log") in capsys.readouterr().out
    (file,) = glob.glob(str(tmp_path / "log/plugins/profile/*/*.xplane.pb"))
    with open(file, "rb") as opened:
        space = xplane_pb2.XSpace.FromString(opened.read())
    calls = set()  # by their first steps
    for plane in space.planes:
        numbers = [key for key, stat in plane.stat_metadata.items() if stat.name == "step_num"]
        for event in (event for line in plane.lines for event in line.events):
            if plane.event_metadata[event.metadata_id].name == "train":
                calls |= {stat.int64_value for stat in event.stats if stat.metadata_id in numbers}
    assert calls == expected


def test_a_profile_that_outlasts_its_run_is_written_all_the_same(tmp_path):
    run_trainer.train(make_run(num_iterations=3), options(tmp_path, profile_steps=(2, 100)))
    assert glob.glob(str(tmp_path / "log/plugins/profile/*/*.xplane.pb"))
