"""Runs that start from a pretrained network: what they restore, train and resume."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import values_in
from numpy_resnet import NumpyResNet

import cifar10_input
import run_trainer
from cifar10_input import mean_image, training_batches
from cifar10_resnet import checkpoints
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data import splits
from cifar10_resnet.data.dataset import find
from cifar10_resnet.errors import UserError
from cifar10_resnet.evaluation.evaluator import score_checkpoints
from cifar10_resnet.options import Options
from cifar10_resnet.training import resume, run_folder
from cifar10_resnet.training.trainer import Trainer
from resnet_model import ResNet

FINAL_LAYER = ("logits/kernel:0", "logits/bias:0")

# Three classes where the new data have ten, and nothing of the network at its default.
ORIGIN = RunConfig(
    ModelConfig(
        **{"num_layers": 11, "bottleneck": True, "shortcut_connections": False},
        **{"resnet_version": 1, "num_classes": 3},
        **{"batch_norm_decay": 0.9, "batch_norm_epsilon": 1e-2},
    ),
    DataConfig("pictures", ("cat", "dog", "eel")),
    TrainingConfig(batch_size=4, num_iterations=50, seed=3),
)
PLAIN_WORDS = {"dataset": "synthetic", "batch_size": 8, "num_iterations": 12, "init_lr": 1.0}


def save_pretrained(folder: Path, origin: RunConfig, step: int = 50) -> str:
    """Saves a checkpoint in which all variables differ, the mean image too. Returns its path."""
    trainer = Trainer(origin)
    rng = np.random.default_rng(step)
    for variable in trainer.model.variables:
        low, high = (-0.1, 0.1) if "kernel" in variable.name else (0.5, 1.5)
        variable.assign(rng.uniform(low, high, variable.shape))
    trainer.model.image_mean.assign(rng.uniform(90, 150, [32, 32, 3]))
    trainer.step.assign(step)
    return checkpoints.save(trainer.checkpoint, str(folder), step)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    """The folder of a pretrained network: not to be changed."""
    folder = tmp_path_factory.mktemp("pretrained")
    save_pretrained(folder, ORIGIN)
    return str(folder)


@pytest.fixture(autouse=True)
def _small_synthetic(monkeypatch):
    monkeypatch.setattr("cifar10_resnet.data.dataset.SYNTHETIC_IMAGES", {"train": 80, "test": 40})


def options(folder: Path, **changes) -> Options:
    folder = str(folder)
    return Options(
        ckpt_path=folder,
        train_log_path=os.path.join(folder, "log"),
        log_per_iterations=4,
        **changes,
    )


def start(folder: Path, pretrained: str | None, stop: int | None = None, **given) -> str:
    """Runs the trainer with these flags. Returns the checkpoint that it saved."""
    given = {**PLAIN_WORDS, **given}
    run, _, resume_from = resume.prepare_run(given, str(folder), pretrained=pretrained)
    return run_trainer.train(
        run, options(folder, max_train_steps=stop), None, resume_from
    ).checkpoint


def variables_in(prefix: str) -> dict[str, np.ndarray]:
    return {v.name: v.numpy() for v in checkpoints.load(checkpoints.read(prefix)).variables}


def refusal(function, *args, **keywords) -> str:
    with pytest.raises(UserError) as refused:
        function(*args, **keywords)
    return str(refused.value)


# --- Which network it is --------------------------------------------------------------------------


def test_the_network_is_the_pretrained_one_but_for_its_classes(pretrained, tmp_path):
    run, _, resume_from = resume.prepare_run(PLAIN_WORDS, str(tmp_path), pretrained=pretrained)
    assert resume_from is None
    # its hyperparameters are the new run's own
    assert run.model == dataclasses.replace(ORIGIN.model, num_classes=10, batch_norm_decay=0.99)
    assert run.data.class_names[0] == "disc"
    assert run.training == TrainingConfig(
        batch_size=8, num_iterations=12, init_lr=1.0, pretrained=checkpoints.find(pretrained).prefix
    )


def test_a_networks_flags_may_be_repeated_and_the_batch_norms_decay_changed(pretrained, tmp_path):
    given = {"num_layers": 11, "bottleneck": True, "shortcut_connections": False}
    given |= {"resnet_version": 1, "batch_norm_decay": 0.95}
    run, _, _ = resume.prepare_run(
        PLAIN_WORDS | given, str(tmp_path), pretrained=checkpoints.find(pretrained).prefix
    )
    assert run.model == dataclasses.replace(ORIGIN.model, num_classes=10, batch_norm_decay=0.95)


@pytest.mark.parametrize(
    ("name", "asked", "found"),
    [
        ("num_layers", 20, 11),
        ("shortcut_connections", True, False),
        ("bottleneck", False, True),
        ("resnet_version", 2, 1),
    ],
)
def test_another_network_than_the_pretrained_one_is_refused_with_both_named(
    pretrained, tmp_path, name, asked, found
):
    told = refusal(start, tmp_path, pretrained, **{name: asked})
    assert f"{name}={asked} " in told
    assert f"{name}={found}" in told
    assert checkpoints.find(pretrained).prefix in told
    assert "--pretrained_model_checkpoint_path" in told


def test_a_pretrained_checkpoint_that_is_missing_or_damaged_is_refused(pretrained, tmp_path):
    assert "no checkpoint" in refusal(start, tmp_path / "run", str(tmp_path))
    copy = shutil.copytree(pretrained, tmp_path / "copy")
    os.truncate(copy / "model.ckpt-50.data-00000-of-00001", 1000)
    assert "damaged" in refusal(start, tmp_path / "run", str(copy))


@pytest.mark.parametrize("flag", ["fine_tune", "recompute_mean"])
def test_what_only_a_pretrained_network_has_is_refused_without_one(tmp_path, flag):
    told = refusal(start, tmp_path, None, **{flag: True})
    assert f"--{flag} " in told
    assert "--pretrained_model_checkpoint_path" in told


# --- What is restored -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [ORIGIN.model, ModelConfig(num_layers=8, num_classes=100), ModelConfig(num_layers=14)],
    ids=lambda config: f"{config.name}-{config.num_classes}",
)
def test_all_is_restored_exactly_but_the_final_layer_which_is_the_seeds(config, tmp_path):
    origin = dataclasses.replace(
        ORIGIN, model=config, data=DataConfig(class_names=("x",) * config.num_classes)
    )
    prefix = save_pretrained(tmp_path, origin)
    saved = variables_in(prefix)
    new = dataclasses.replace(config, num_classes=10)
    model, fresh = (ResNet(**new.arguments(), seed=7) for _ in range(2))
    checkpoints.restore_pretrained(model, prefix)
    for variable, untouched in zip(model.variables, fresh.variables, strict=True):
        if variable.name in FINAL_LAYER:
            np.testing.assert_array_equal(variable, untouched, err_msg=variable.name)
            assert not np.array_equal(variable, saved[variable.name])
        else:
            np.testing.assert_array_equal(variable, saved[variable.name], err_msg=variable.name)
    depth, _ = model.logits_kernel.shape
    assert np.std(model.logits_kernel) == pytest.approx(np.sqrt(2 / depth), rel=0.1)


def test_the_run_says_in_one_line_what_it_restored_and_what_not(pretrained, tmp_path, capsys):
    start(tmp_path, pretrained, 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "restored" in line]
    assert checkpoints.find(pretrained).prefix in line
    assert "final layer, which starts at random with 10 classes" in line
    assert "mean image is restored too" in line


# --- What is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["paper", "fast"])
def test_fine_tuning_changes_only_the_final_layer(pretrained, tmp_path, capsys, recipe):
    saved = variables_in(checkpoints.find(pretrained).prefix)
    tuned = variables_in(start(tmp_path, pretrained, fine_tune=True, recipe=recipe))
    fresh = ResNet(**ORIGIN.model.arguments() | {"num_classes": 10})
    assert tuned.keys() == saved.keys()
    for name, value in tuned.items():
        if name not in FINAL_LAYER:
            np.testing.assert_array_equal(value, saved[name], err_msg=name)
    assert np.all(tuned["logits/kernel:0"] != fresh.logits_kernel)
    assert np.all(tuned["logits/bias:0"] != 0)
    # a kernel of 256 x 10, and ten biases
    assert "Fine-tuning the final layer of plain11-bottleneck-v1 (2,570 of its " in (
        capsys.readouterr().out
    )


def test_without_fine_tuning_everything_is_trained_from_there_on(pretrained, tmp_path):
    saved = variables_in(checkpoints.find(pretrained).prefix)
    trained = variables_in(start(tmp_path, pretrained, init_lr=0.1))
    for name, value in trained.items():
        if name == "image_mean:0":
            np.testing.assert_array_equal(value, saved[name])
        elif name not in FINAL_LAYER:
            assert not np.array_equal(value, saved[name]), name


def test_only_what_is_trained_has_momentum(pretrained, tmp_path):
    tuned = values_in(start(tmp_path, pretrained, 3, fine_tune=True))
    slots = {name: value for name, value in tuned.items() if name.startswith("momentum/")}
    assert sorted(value.shape for value in slots.values()) == [(10,), (256, 10)]
    assert all(np.any(value) for value in slots.values())


def ops_of_a_step(fine_tune: bool) -> list[tf.Operation]:
    run = dataclasses.replace(ORIGIN, training=TrainingConfig(batch_size=4, fine_tune=fine_tune))
    step = Trainer(run).train_step.get_concrete_function(
        tf.TensorSpec([4, 32, 32, 3], tf.float32), tf.TensorSpec([4], tf.int32)
    )
    assert not step.graph.as_graph_def().library.function, "all of the step is in this one graph"
    return step.graph.get_operations()


def test_no_backward_pass_is_built_below_the_final_layer():
    backward = {"Conv2DBackpropInput", "Conv2DBackpropFilter", "FusedBatchNormGradV3", "ReluGrad"}
    whole, tuned = ops_of_a_step(fine_tune=False), ops_of_a_step(fine_tune=True)
    assert backward <= {op.type for op in whole}
    assert not [op.name for op in tuned if "Backprop" in op.type or "Grad" in op.type]
    convolutions = [[op for op in ops if op.type == "Conv2D"] for ops in (whole, tuned)]
    assert len(convolutions[0]) == len(convolutions[1]) == 10
    norms = [op for op in tuned if op.type == "FusedBatchNormV3"]
    assert len(norms) == 10
    assert not any(op.get_attr("is_training") for op in norms)
    # The rest of what is written: the step, two sums and a count for the log, the first bad step.
    written = [op for op in tuned if op.type.startswith("Assign")]
    assert len(written) == 5
    assert len([op for op in tuned if op.type == "ResourceApplyMomentum"]) == 2


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_final_layers_steps_are_those_of_logistic_regression_in_numpy(nesterov):
    hyperparameters = TrainingConfig(
        **{"batch_size": 6, "nesterov": nesterov, "weight_decay": 0.02, "init_lr": 0.5},
        fine_tune=True,
    )
    config = ModelConfig(num_layers=8, num_classes=5)
    trainer = Trainer(RunConfig(config, DataConfig(), hyperparameters))
    rng = np.random.default_rng(0)
    for variable in trainer.model.variables:
        variable.assign_add(rng.uniform(-0.05, 0.05, variable.shape))
    values = {v.name.removesuffix(":0"): v.numpy().astype(float) for v in trainer.model.variables}
    # through an identity in the final layer's place come the features
    body = NumpyResNet(
        {**values, "logits/kernel": np.eye(64), "logits/bias": np.zeros(64)}, training=False
    )
    weights = [values["logits/kernel"], values["logits/bias"]]
    momenta = [np.zeros_like(w) for w in weights]
    for _ in range(3):
        images = rng.normal(0, 1, [6, 32, 32, 3])
        labels = rng.integers(0, 5, 6)
        trainer.train_step(tf.constant(images, tf.float32), tf.constant(labels, tf.int32))
        features = body.logits(images, units=1)
        scores = np.exp(features @ weights[0] + weights[1])
        errors = (scores / scores.sum(1, keepdims=True) - np.eye(5)[labels]) / 6
        gradients = [features.T @ errors + 0.02 * weights[0], errors.sum(0)]
        for i, gradient in enumerate(gradients):
            momenta[i] = 0.9 * momenta[i] + gradient
            # the first 500 steps: a tenth of init_lr
            weights[i] = weights[i] - 0.05 * (
                gradient + 0.9 * momenta[i] if nesterov else momenta[i]
            )
        np.testing.assert_allclose(trainer.model.logits_kernel, weights[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(trainer.model.logits_bias, weights[1], rtol=1e-4, atol=1e-6)


# --- The mean image -------------------------------------------------------------------------------


@pytest.fixture
def means_subtracted(monkeypatch) -> list[np.ndarray]:
    """The means that the batches of each training are made with."""
    means = []
    make_batches = training_batches

    def spy(examples, mean, *args, **keywords):
        means.append(mean)
        return make_batches(examples, mean, *args, **keywords)

    monkeypatch.setattr(cifar10_input, "training_batches", spy)
    return means


def own_mean() -> np.ndarray:
    train_set, _ = splits.load_training(find(name="synthetic"), DataConfig("synthetic"))
    return mean_image(train_set.images)


def test_the_pretrained_mean_stays_with_the_network(pretrained, tmp_path, means_subtracted):
    theirs = variables_in(checkpoints.find(pretrained).prefix)["image_mean:0"]
    for stop in (3, 6):
        saved = start(tmp_path, pretrained, stop)
        np.testing.assert_array_equal(variables_in(saved)["image_mean:0"], theirs)
        np.testing.assert_array_equal(means_subtracted.pop(), theirs)


def test_a_recomputed_mean_is_that_of_the_new_images(pretrained, tmp_path, means_subtracted):
    for stop in (3, 6):
        saved = start(tmp_path, pretrained, stop, recompute_mean=True)
        np.testing.assert_array_equal(variables_in(saved)["image_mean:0"], own_mean())
        np.testing.assert_array_equal(means_subtracted.pop(), own_mean())


@pytest.mark.parametrize("recompute_mean", [False, True])
def test_a_run_recognises_its_images_with_any_mean(
    pretrained, tmp_path, monkeypatch, recompute_mean
):
    start(tmp_path, pretrained, 3, recompute_mean=recompute_mean)
    with monkeypatch.context() as patches:
        patches.setattr("cifar10_resnet.data.dataset.SYNTHETIC_IMAGES", {"train": 88, "test": 40})
        assert "other training images than this run" in refusal(start, tmp_path, None)
    start(tmp_path, None, 6)


# --- Resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_resumed_run_ends_with_the_bits_of_one_never_interrupted(pretrained, tmp_path, fine_tune):
    whole = start(tmp_path / "whole", pretrained, fine_tune=fine_tune)
    start(tmp_path / "parts", pretrained, 5, fine_tune=fine_tune)
    resumed = start(tmp_path / "parts", None)  # The run folder contains its settings.
    ours, theirs = values_in(whole), values_in(resumed)
    assert ours.keys() == theirs.keys()
    assert {"data_mean/.ATTRIBUTES/VARIABLE_VALUE"} < ours.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert checkpoints.read(resumed).run.training.fine_tune == fine_tune


@pytest.mark.parametrize("name", ["fine_tune", "recompute_mean"])
@pytest.mark.parametrize("value", [False, True])
def test_a_contradiction_on_resuming_is_refused_with_both_values(pretrained, tmp_path, name, value):
    start(tmp_path, pretrained, 1, **{name: value})
    told = refusal(start, tmp_path, pretrained, **{name: not value})
    if (name, value) == ("fine_tune", False):
        assert f"--fine_tune does not match the run in {tmp_path}" in told
    else:
        assert f"{name}={not value} " in told
        assert f"{name}={value}" in told
    start(tmp_path, pretrained, 2, **{name: value})


def test_an_existing_run_resumes_and_says_that_the_pretrained_network_is_not_used(
    pretrained, tmp_path, capsys
):
    alone = start(tmp_path / "alone", None, num_layers=8)
    start(tmp_path / "both", None, 5, num_layers=8)
    capsys.readouterr()
    for named in (pretrained, str(tmp_path / "moved away")):
        both = start(tmp_path / "both", named, num_layers=8)
        out = capsys.readouterr().out
        assert f"Resuming the run in {tmp_path / 'both'}. {named} is ignored." in out
        assert "restored" not in out
    for name, value in values_in(alone).items():
        np.testing.assert_array_equal(value, values_in(both)[name], err_msg=name)


def test_a_run_of_a_version_without_pretrained_networks_resumes(tmp_path):
    prefix = start(tmp_path / "now", None, 5, num_layers=8)
    run = checkpoints.read(prefix).run
    parts = json.loads(run.to_json())
    for name in ("pretrained", "fine_tune", "recompute_mean"):
        del parts["training"][name]
    old = Trainer(run)
    old.restore(prefix)
    old._description.assign(json.dumps(parts))
    checkpoints.save(old.checkpoint, str(tmp_path / "old"), 5)
    ends = [variables_in(start(tmp_path / name, None)) for name in ("now", "old")]
    for name, value in ends[0].items():
        np.testing.assert_array_equal(value, ends[1][name], err_msg=name)


def test_a_fine_tuned_network_is_scored_like_any_other(pretrained, tmp_path):
    prefix = start(tmp_path, pretrained, 2, fine_tune=True)
    (scored,) = score_checkpoints(
        [checkpoints.read(prefix)], given={"num_layers": 11, "bottleneck": True}
    )
    assert scored.metrics.num_images == 40
    assert len(scored.metrics.per_class_accuracy) == 10
    assert scored.as_json()["description"]["training"]["fine_tune"] is True


def test_a_fine_tuned_network_is_itself_a_pretrained_one(pretrained, tmp_path):
    first = start(tmp_path / "first", pretrained, 2, fine_tune=True)
    second = start(tmp_path / "second", first, 2, fine_tune=True, seed=1)
    ours, theirs = variables_in(first), variables_in(second)
    different = {name for name, value in ours.items() if not np.array_equal(value, theirs[name])}
    assert different == set(FINAL_LAYER)


def test_cleaning_spares_the_pretrained_checkpoint(pretrained, tmp_path, monkeypatch):
    folder = shutil.copytree(pretrained, tmp_path / "run")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    for named in ("model.ckpt-50", str(folder / "model.ckpt-50"), str(tmp_path / "link" / "x")):
        assert "Use another --ckpt_path" in refusal(run_folder.clean, str(folder), "log", named)
    assert sorted(os.listdir(folder)) == before
    run_folder.clean(str(folder), "log", os.path.join(pretrained, "model.ckpt-50"))
    assert os.listdir(folder) == []
