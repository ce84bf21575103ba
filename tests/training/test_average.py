"""The average of a run's last weights, and mixed images: exact numbers, and what runs promise."""

import dataclasses
import re
from itertools import compress

import numpy as np
import programs
import pytest
import tensorflow as tf
from numpy_resnet import NumpyResNet

import run_trainer
from cifar10_input import training_batches
from cifar10_resnet import checkpoints
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data import splits
from cifar10_resnet.data.dataset import find
from cifar10_resnet.data.synthetic import CLASS_NAMES
from cifar10_resnet.evaluation.evaluator import Evaluator
from cifar10_resnet.options import Options
from cifar10_resnet.training import mixup
from cifar10_resnet.training.loop import next_average
from cifar10_resnet.training.trainer import Trainer

# Ten steps of eight images are an epoch of the 80 training images.
RUN = RunConfig(
    ModelConfig(num_layers=8),
    DataConfig("synthetic", CLASS_NAMES),
    TrainingConfig(batch_size=8, num_iterations=26, average_weights=0.8, init_lr=1.0),
)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr("cifar10_resnet.data.dataset.SYNTHETIC_IMAGES", {"train": 80, "test": 40})


def train(folder, stops=(26,), run: RunConfig = RUN, **changes) -> str:
    """Trains in several starts, and returns the last checkpoint."""
    checkpoint = None
    for stop in stops:
        options = Options(ckpt_path=str(folder), max_ckpts=-1, max_train_steps=stop, **changes)
        checkpoint = run_trainer.train(run, options, resume_from=checkpoint).checkpoint
    return checkpoint


def variables_of(prefix: str) -> list[np.ndarray]:
    return [v.numpy() for v in checkpoints.load(checkpoints.read(prefix)).variables]


def raw_variables_of(prefix: str) -> list[np.ndarray]:
    """Returns the variables of the step itself, from which the run continues."""
    trainer = Trainer(checkpoints.read(prefix).run)
    trainer.restore(prefix)
    return [v.numpy() for v in trainer.model.variables]


@pytest.mark.parametrize(
    ("length", "share", "images", "batch_size", "steps"),
    [
        (26, 0.8, 80, 8, [10, 20, 26]),  # 26 - 20.8 = 5.2
        (30, 0.4, 80, 8, [20, 30]),
        (39_063, 0.03, 50_000, 128, [38_282, 38_672, 39_063]),  # the last three of 100 epochs
        (5, 1, 80, 8, [5]),  # a run of less than an epoch
    ],
)
def test_the_average_is_over_the_ends_of_the_last_epochs(length, share, images, batch_size, steps):
    training = TrainingConfig(num_iterations=length, average_weights=share, batch_size=batch_size)
    found, step = [], 0
    while step < length:
        step = next_average(training, images, step)
        found.append(step)
    assert found == steps


def test_a_checkpoint_is_read_as_the_mean_of_the_averaged_steps(tmp_path):
    last = train(tmp_path, save_per_iterations=1, epochs_between_evals=1)
    steps = [raw_variables_of(str(tmp_path / f"model.ckpt-{step}")) for step in (10, 20, 26)]
    network = checkpoints.load(checkpoints.read(last))
    is_weight = [v.trainable for v in network.variables]
    for found, *values in compress(zip(network.variables, *steps, strict=True), is_weight):
        mean = np.mean(np.stack(values).astype(np.float64), axis=0)
        np.testing.assert_allclose(found.numpy(), mean, rtol=1e-4, atol=1e-5)
        assert np.abs(mean - values[-1]).max() > 1e-3
    # Before the first averaged step, it is read as the weights at its step.
    early = str(tmp_path / "model.ckpt-9")
    for raw, found in zip(raw_variables_of(early), variables_of(early), strict=True):
        np.testing.assert_array_equal(found, raw)


def test_the_mean_has_the_statistics_of_the_batches_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr("cifar10_resnet.training.loop.BATCHES_MEASURED", 3)
    network = checkpoints.load(checkpoints.read(train(tmp_path)))
    values = {v.name.removesuffix(":0"): v.numpy() for v in network.variables}
    images = splits.load(find(None, "synthetic"), "train")
    mean = network.image_mean.numpy()
    batches = training_batches(images, mean, 8, first_step=26, num_steps=3)
    seen = []
    for batch, _ in batches:
        reference = NumpyResNet(values)
        reference.logits(batch.numpy(), units=1)
        seen.append(reference.statistics)
    for name in seen[0]:
        for i, kind in enumerate(("moving_mean", "moving_variance")):
            expected = np.mean([statistics[name][i] for statistics in seen], axis=0)
            np.testing.assert_allclose(values[f"{name}/{kind}"], expected, rtol=1e-3, atol=1e-3)


def test_a_fine_tuned_average_keeps_the_pretrained_statistics(tmp_path):
    origin = train(tmp_path / "origin", (10,))
    training = dataclasses.replace(RUN.training, fine_tune=True, pretrained=origin)
    last = train(tmp_path / "tuned", run=dataclasses.replace(RUN, training=training))
    before = checkpoints.load(checkpoints.read(origin)).statistics
    after = checkpoints.load(checkpoints.read(last)).statistics
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_an_averaged_run_trains_as_without_and_resumes_bit_identically(tmp_path):
    whole = train(tmp_path / "whole", epochs_between_evals=1)
    resumed = train(tmp_path / "resumed", (10, 15, 26), log_per_iterations=3)
    for read in (variables_of, raw_variables_of):
        for one, other in zip(read(whole), read(resumed), strict=True):
            np.testing.assert_array_equal(one, other)
    plain = dataclasses.replace(RUN.training, average_weights=0.0)
    without = train(tmp_path / "without", run=dataclasses.replace(RUN, training=plain))
    for one, other in zip(raw_variables_of(whole), variables_of(without), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_evaluation_during_a_run_is_of_the_averaged_network(tmp_path):
    options = Options(ckpt_path=str(tmp_path), epochs_between_evals=1)
    outcome = run_trainer.train(RUN, options)
    network = checkpoints.load(checkpoints.read(outcome.checkpoint))
    again = Evaluator(network)(splits.load(find(None, "synthetic"), "test"))
    assert outcome.metrics.loss == pytest.approx(again.loss, rel=1e-5)


# --- Mixed images ---------------------------------------------------------------------------------


def test_mixed_images_train_towards_both_labels_in_the_drawn_proportion():
    training = TrainingConfig(batch_size=8, mixup=0.5, num_iterations=10, weight_decay=0.0)
    run = RunConfig(ModelConfig(num_layers=8), DataConfig("synthetic", CLASS_NAMES), training)
    rng = np.random.default_rng(0)
    images = rng.normal(0, 60, [8, 32, 32, 3]).astype(np.float32)
    labels = rng.integers(0, 10, 8).astype(np.int32)
    trainer = Trainer(run)
    before = [v.numpy() for v in trainer.model.variables]
    share = float(mixup.Pairs(training, tf.constant(0, tf.int64)).mixed(1.0, 0.0))
    assert 0 < share < 1
    second = np.roll(np.arange(8), 1)
    inputs = np.float32(share) * images + np.float32(1 - share) * images[second]
    log_probabilities = tf.nn.log_softmax(trainer.model(inputs, training=True)).numpy()
    rows = np.arange(8)
    expected = -share * log_probabilities[rows, labels]
    expected -= (1 - share) * log_probabilities[rows, labels[second]]
    for variable, value in zip(trainer.model.variables, before, strict=True):
        variable.assign(value)
    trainer.train_step(tf.constant(images), tf.constant(labels))
    assert trainer.means()[0] == pytest.approx(expected.mean(), rel=1e-4)


def test_the_proportion_is_uniform_a_function_of_seed_and_step_and_one_at_the_end():
    def shares(seed: int) -> np.ndarray:
        training = TrainingConfig(seed=seed, mixup=0.9, num_iterations=1000)
        share = tf.function(lambda step: mixup.Pairs(training, step).mixed(1.0, 0.0))
        return np.array([share(tf.constant(step, tf.int64)).numpy() for step in range(1000)])

    drawn = shares(3)
    np.testing.assert_array_equal(drawn[900:], 1.0)
    mixed = np.sort(drawn[:900])
    # The largest distance of 900 uniform numbers from their places is below 0.054 in 99% of cases.
    assert np.abs(mixed - (np.arange(900) + 0.5) / 900).max() < 0.054
    np.testing.assert_array_equal(drawn, shares(3))
    assert not np.array_equal(drawn, shares(4))


def test_the_programs_evaluate_the_average_that_the_trainer_evaluated(data, tmp_path):
    flags = ("--num_layers=8", "--batch_size=8", "--num_iterations=12", "--mixup=0.5")
    where = (f"--path={data}", f"--ckpt_path={tmp_path / 'run'}")
    more = ("--average_weights=0.5", "--epochs_between_evals=1")
    trained = programs.run("run_trainer.py", *where, *flags, *more).stdout
    evaluated = programs.run("run_evaluator.py", *where).stdout
    accuracy = re.findall(r"evaluated on test: .* accuracy ([\d.]+%)", trained)[-1]
    assert accuracy in evaluated
