"""Evaluation: every image counts once, and the numbers equal NumPy's."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import random_cifar100, random_images, write_cifar100, write_photos

from cifar10_input import ImageSet
from cifar10_resnet import checkpoints
from cifar10_resnet.config import CIFAR10_NAMES, DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data import synthetic
from cifar10_resnet.data.dataset import SYNTHETIC_IMAGES, find
from cifar10_resnet.errors import UserError
from cifar10_resnet.evaluation.evaluator import Evaluator, score_checkpoints
from cifar10_resnet.evaluation.metrics import Metrics
from cifar10_resnet.training.trainer import Trainer
from resnet_model import ResNet

COUNT = 53  # a prime: no batch size but 1 divides it


@pytest.fixture(autouse=True)
def _on_the_cpu():
    # An accelerator may pick other kernels for other batch sizes, and round more coarsely.
    with tf.device("cpu"):
        yield


def varied_images(count: int) -> np.ndarray:
    """Returns images that differ enough for an untrained network to separate some of them."""
    rng = np.random.default_rng(11)
    colours = rng.integers(0, 256, (count, 1, 1, 3))
    slopes = rng.integers(-8, 9, (count, 2, 1, 1, 3))
    x, y = np.arange(32)[None, None, :, None], np.arange(32)[None, :, None, None]
    images = colours + slopes[:, 0] * x + slopes[:, 1] * y + rng.integers(-9, 10, (32, 32, 3))
    return np.clip(images, 0, 255).astype(np.uint8)


def stir(variables, seed: int = 0) -> None:
    """Moves every variable a little from where it is; variances stay positive."""
    rng = np.random.default_rng(seed)
    for variable in variables:
        variable.assign_add(rng.uniform(-0.05, 0.05, variable.shape))


@pytest.fixture(scope="module")
def model() -> ResNet:
    with tf.device("cpu"):
        model = ResNet(num_layers=8, batch_norm_decay=0.0)
        stir(model.variables)
        # Without decay, the statistics become this batch's, and the logits spread out.
        model(tf.constant(varied_images(COUNT) - np.float32(128)), training=True)
        model.image_mean.assign(np.random.default_rng(1).uniform(90, 150, [32, 32, 3]))
    return model


@pytest.fixture(scope="module")
def examples() -> ImageSet:
    labels = np.random.default_rng(2).integers(0, 10, COUNT)
    labels[labels == 4] = 3  # nobody is a deer
    return ImageSet(varied_images(COUNT), labels.astype(np.int32))


@pytest.fixture(scope="module")
def metrics(model, examples) -> Metrics:
    with tf.device("cpu"):
        return Evaluator(model)(examples)


def numpy_figures(model: ResNet, mean: np.ndarray, examples: ImageSet) -> dict:
    """Returns the same numbers in plain NumPy, from the network's logits for all images at once."""
    inputs = examples.images.astype(np.float32) - np.asarray(mean, np.float32)
    logits = model(tf.constant(inputs), training=False).numpy().astype(np.float64)
    labels, classes = examples.labels, logits.shape[1]
    highest = logits.max(axis=1, keepdims=True)
    log_sum = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
    rows = np.arange(len(labels))
    ranks = (logits > logits[rows, labels][:, None]).sum(axis=1)
    confusion = np.zeros([classes, classes], np.int64)
    for label, predicted in zip(labels, logits.argmax(axis=1), strict=True):
        confusion[label, predicted] += 1
    return {
        "predictions": logits.argmax(axis=1),
        "confidences": np.exp(highest[:, 0] - log_sum),
        "loss": (log_sum - logits[rows, labels]).mean(),
        "accuracy": (ranks == 0).mean(),
        "top_5_accuracy": (ranks < 5).mean(),
        "confusion_matrix": confusion,
        "per_class_accuracy": [
            (ranks[labels == c] == 0).mean() if (labels == c).any() else None
            for c in range(classes)
        ],
    }


def assert_figures(metrics: Metrics, expected: dict) -> None:
    np.testing.assert_array_equal(metrics.predictions, expected["predictions"])
    np.testing.assert_allclose(metrics.confidences, expected["confidences"], atol=1e-3)
    np.testing.assert_array_equal(metrics.confusion_matrix, expected["confusion_matrix"])
    assert metrics.num_images == expected["confusion_matrix"].sum()
    assert metrics.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert metrics.accuracy == pytest.approx(expected["accuracy"], abs=1e-12)
    assert metrics.top_5_accuracy == pytest.approx(expected["top_5_accuracy"], abs=1e-12)
    # approx compares None only with None.
    assert metrics.per_class_accuracy == pytest.approx(expected["per_class_accuracy"], abs=1e-12)


# --- The numbers ----------------------------------------------------------------------------------


def test_the_figures_are_those_that_numpy_finds(model, examples, metrics):
    expected = numpy_figures(model, model.image_mean.numpy(), examples)
    assert (expected["confusion_matrix"].sum(axis=0) > 0).sum() >= 3, "several classes predicted"
    assert 0 < expected["accuracy"] < expected["top_5_accuracy"] < 1
    assert_figures(metrics, expected)


@pytest.mark.parametrize("batch_size", [1, 7, COUNT, COUNT + 1])
def test_every_image_counts_once_whatever_the_batch_size(model, examples, metrics, batch_size):
    scored = Evaluator(model, batch_size)(examples)
    assert scored.num_images == COUNT
    np.testing.assert_array_equal(scored.predictions, metrics.predictions)
    np.testing.assert_allclose(scored.confidences, metrics.confidences, rtol=1e-5)
    assert scored.labels is examples.labels
    np.testing.assert_array_equal(
        scored.confusion_matrix.sum(axis=1), np.bincount(examples.labels, minlength=10)
    )
    assert scored.top_5_accuracy == metrics.top_5_accuracy
    assert scored.loss == pytest.approx(metrics.loss, rel=1e-5)


def test_an_evaluator_starts_afresh_each_time(model, examples):
    evaluator = Evaluator(model, 20)
    first = evaluator(examples)
    part = evaluator(examples.part(slice(5)))
    again = evaluator(examples)
    assert part.num_images == 5
    assert (again.loss, again.num_images) == (first.loss, first.num_images)


def test_the_mean_that_is_subtracted_is_the_one_in_the_model(model, examples, metrics):
    evaluator = Evaluator(model)
    stored = model.image_mean.numpy()
    other = stored[::-1] * 0.5
    try:
        evaluator(examples.part(slice(5)))  # a mean that the graph keeps to itself would show
        model.image_mean.assign(other)
        scored = evaluator(examples)
    finally:
        model.image_mean.assign(stored)
    assert scored.loss != pytest.approx(metrics.loss, rel=1e-2)
    assert_figures(scored, numpy_figures(model, other, examples))


def test_scoring_leaves_the_model_as_it_is(model, examples):
    before = [variable.numpy() for variable in model.variables]
    Evaluator(model)(examples)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_a_class_without_images_has_no_accuracy(metrics):
    assert metrics.per_class_accuracy[4] is None
    assert all(0 <= share <= 1 for c, share in enumerate(metrics.per_class_accuracy) if c != 4)


def test_with_fewer_than_five_classes_top_5_means_all_of_them():
    model = ResNet(num_layers=8, num_classes=3)
    examples = ImageSet(varied_images(10), np.arange(10, dtype=np.int32) % 3)
    metrics = Evaluator(model)(examples)
    assert metrics.confusion_matrix.shape == (3, 3)
    assert metrics.top_5_accuracy == 1.0
    # This says nothing, so it is not shown.
    assert "top-" not in metrics.report(["cat", "dog", "eel"])


# --- Checkpoints ----------------------------------------------------------------------------------

RUN = RunConfig(
    ModelConfig(num_layers=8),
    DataConfig(holdout=4),
    TrainingConfig(num_iterations=100, batch_size=8),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[str]:
    """Two checkpoints of one run, at steps 10 and 20, with other weights and another mean each."""
    directory = tmp_path_factory.mktemp("run")
    with tf.device("cpu"):
        trainer = Trainer(RUN)
        prefixes = []
        for step in (10, 20):
            stir(trainer.model.variables, seed=step)
            trainer.model.image_mean.assign(np.full([32, 32, 3], 5.0 * step))
            trainer.step.assign(step)
            prefixes.append(checkpoints.save(trainer.checkpoint, str(directory), step))
    return prefixes


@pytest.fixture
def folder(write_cifar10) -> Path:
    train = varied_images(20), np.arange(20) % 10
    test = varied_images(30)[::-1], np.arange(30) % 7
    return write_cifar10(train=train, test=test, names="\n".join(CIFAR10_NAMES))


def read_all(prefixes: list[str]) -> list[checkpoints.SavedRun]:
    return [checkpoints.read(prefix) for prefix in prefixes]


def figures_of(prefix: str, images: np.ndarray, labels: np.ndarray) -> dict:
    model = checkpoints.load(checkpoints.read(prefix))
    return numpy_figures(model, model.image_mean.numpy(), ImageSet(images, labels))


def test_checkpoints_are_evaluated_one_after_the_other_on_the_test_images(saved, folder):
    scores = list(score_checkpoints(read_all(saved), find(str(folder)), batch_size=8))
    assert [scored.checkpoint for scored in scores] == saved
    assert [scored.step for scored in scores] == [10, 20]
    for scored, prefix in zip(scores, saved, strict=True):
        assert scored.run == RUN
        assert scored.split == "test"
        expected = figures_of(prefix, varied_images(30)[::-1], np.arange(30) % 7)
        assert_figures(scored.metrics, expected)
    assert scores[0].metrics.loss != scores[1].metrics.loss


@pytest.mark.parametrize(
    ("split", "part"), [("train", slice(0, 16)), ("holdout", slice(16, 20))], ids=str
)
def test_holdout_and_the_images_trained_on_are_scored_apart(saved, folder, split, part):
    (scored,) = score_checkpoints(read_all(saved[:1]), find(str(folder)), split=split)
    assert scored.split == split
    expected = figures_of(saved[0], varied_images(20)[part], np.arange(20)[part] % 10)
    assert_figures(scored.metrics, expected)


def test_text_and_json_of_a_score_are_the_same(saved, folder):
    (scored,) = score_checkpoints(read_all(saved[1:]), find(str(folder.parent)))
    report = scored.report()
    head, *figures = report.splitlines()
    assert saved[1] in head
    assert "resnet8" in head
    assert "step 20)" in head
    assert "test" in head
    assert "\n".join(figures) == scored.metrics.report(CIFAR10_NAMES)

    told = json.loads(json.dumps(scored.as_json()))
    assert told["checkpoint"] == saved[1]
    assert (told["step"], told["split"], told["num_images"]) == (20, "test", 30)
    assert told["loss"] == scored.metrics.loss
    assert told["accuracy"] == scored.metrics.accuracy
    assert told["top_5_accuracy"] == scored.metrics.top_5_accuracy
    assert tuple(told["accuracy_interval"]) == scored.metrics.accuracy_interval
    assert told["expected_calibration_error"] == scored.metrics.calibration.error
    assert told["per_class_accuracy"] == scored.metrics.per_class_accuracy
    assert told["per_class_accuracy"][9] is None
    assert told["confusion_matrix"] == scored.metrics.confusion_matrix.tolist()
    assert told["description"] == json.loads(RUN.to_json())


@pytest.mark.parametrize(
    ("name", "given", "held"),
    [("num_layers", 20, 8), ("shortcut_connections", False, True), ("resnet_version", 1, 2)],
)
def test_a_given_value_that_contradicts_the_checkpoint_is_refused(saved, folder, name, given, held):
    with pytest.raises(UserError) as refused:
        list(score_checkpoints(read_all(saved), find(str(folder)), given={name: given}))
    assert f"{name}={given}" in str(refused.value)
    assert f"{name}={held}" in str(refused.value)
    assert saved[0] in str(refused.value)


def test_given_values_that_agree_or_are_left_out_are_accepted(saved, folder):
    given = {"num_layers": 8, "shortcut_connections": True, "bottleneck": None}
    (scored,) = score_checkpoints(read_all(saved[:1]), find(str(folder)), given=given)
    assert scored.metrics.num_images == 30


def test_images_of_other_classes_than_the_run_knows_are_refused(saved, write_cifar10, tmp_path):
    names = synthetic.CLASS_NAMES
    other = write_cifar10(names="\n".join(names), parent=tmp_path / "other")
    with pytest.raises(UserError) as refused:
        list(score_checkpoints(read_all(saved[:1]), find(str(other))))
    for told in (saved[0], str(other), *names, *CIFAR10_NAMES):
        assert told in str(refused.value)


def test_other_images_will_do_if_their_classes_are_those_that_the_run_knows(saved, tmp_path):
    folder = write_photos(tmp_path, 10, test=30)
    (folder / "class_names.txt").write_text("\n".join(CIFAR10_NAMES))
    (scored,) = score_checkpoints(read_all(saved[:1]), find(str(folder)))
    images, _ = random_images(30, seed=2)
    assert_figures(scored.metrics, figures_of(saved[0], images, np.arange(30) % 10))


@pytest.mark.parametrize(("coarse", "classes"), [(False, 100), (True, 20)])
def test_the_labels_scored_are_those_that_the_run_learns(tmp_path, coarse, classes):
    images, labels = random_cifar100(25)
    data = find(str(write_cifar100(tmp_path / "data", test=(images, labels))))
    run = RunConfig(
        ModelConfig(num_layers=8, num_classes=classes),
        data.describe(coarse_labels=coarse),
    )
    prefix = checkpoints.save(Trainer(run).checkpoint, str(tmp_path), 0)
    (scored,) = score_checkpoints([checkpoints.read(prefix)], data)
    learned = labels[:, 0 if coarse else 1].astype(np.int32)
    assert_figures(scored.metrics, figures_of(prefix, images, learned))
    with pytest.raises(UserError, match=f"coarse_labels={not coarse} "):
        list(
            score_checkpoints([checkpoints.read(prefix)], data, given={"coarse_labels": not coarse})
        )


def test_labels_that_the_network_has_no_class_for_are_refused(saved, write_cifar10):
    images, labels = random_images(6)
    labels[3] = 10
    with pytest.raises(UserError, match="label 10 "):
        list(
            score_checkpoints(read_all(saved[:1]), find(str(write_cifar10(test=(images, labels)))))
        )


def test_a_run_on_synthetic_images_is_scored_without_a_path(tmp_path, monkeypatch):
    monkeypatch.setitem(SYNTHETIC_IMAGES, "test", 30)
    run = RunConfig(ModelConfig(num_layers=8), DataConfig("synthetic", synthetic.CLASS_NAMES))
    prefix = checkpoints.save(Trainer(run).checkpoint, str(tmp_path), 0)
    (scored,) = score_checkpoints([checkpoints.read(prefix)])
    images, labels = synthetic.make_split("test", 30)
    assert_figures(scored.metrics, figures_of(prefix, images, labels.astype(np.int32)))


def test_a_checkpoint_of_something_else_is_refused(tmp_path, folder):
    prefix = tf.train.Checkpoint(v=tf.Variable(1.0)).write(str(tmp_path / "other"))
    with pytest.raises(UserError, match="another program wrote this checkpoint"):
        list(score_checkpoints([checkpoints.read(prefix)], find(str(folder))))
