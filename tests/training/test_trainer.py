"""The training step against an independent reference, and the loop's promises, in one process."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from conftest import skip_without_channels_first, write_cifar100, write_photos

import run_trainer
from cifar10_input import ImageSet, mean_image, training_batches
from cifar10_resnet import checkpoints
from cifar10_resnet.config import RECIPES, DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data.dataset import find
from cifar10_resnet.data.synthetic import CLASS_NAMES, make_split
from cifar10_resnet.errors import UserError
from cifar10_resnet.evaluation.evaluator import Evaluator
from cifar10_resnet.options import Options
from cifar10_resnet.training import resume
from cifar10_resnet.training.loop import next_end
from cifar10_resnet.training.trainer import Trainer

SMALL = ModelConfig(num_layers=8)


def make_run(**hyperparameters) -> RunConfig:
    data = DataConfig("synthetic", CLASS_NAMES)
    return RunConfig(SMALL, data, TrainingConfig(batch_size=8, **hyperparameters))


def make_batch(seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 60, [8, 32, 32, 3]).astype(np.float32)
    return tf.constant(images), tf.constant(rng.integers(0, 10, 8).astype(np.int32))


def gradients_of(trainer: Trainer, batch) -> list[np.ndarray]:
    """Returns the gradients of the cross-entropy without other terms."""
    images, labels = batch
    with tf.GradientTape() as tape:
        logits = trainer.model(images, training=True)
        log_probabilities = tf.nn.log_softmax(logits)
        loss = -tf.reduce_mean(tf.gather(log_probabilities, labels, batch_dims=1))
    return [g.numpy() for g in tape.gradient(loss, trainer.model.trainable_variables)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_are_those_of_momentum_with_l2_only_on_kernels(nesterov):
    run = make_run(nesterov=nesterov, weight_decay=0.01, init_lr=0.05, num_iterations=64_000)
    trainer = Trainer(run)
    variables = trainer.model.trainable_variables
    weights = [v.numpy() for v in variables]
    momenta = [np.zeros_like(w) for w in weights]
    for step in range(2):
        batch = make_batch(step)
        before = [v.numpy() for v in trainer.model.variables]
        gradients = gradients_of(trainer, batch)
        for variable, value in zip(trainer.model.variables, before, strict=True):
            variable.assign(value)  # the reference moved the batch-norm averages
        trainer.train_step(*batch)
        for i, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
            if "kernel" in variable.name:
                gradient = gradient + 0.01 * weights[i]
            momenta[i] = 0.9 * momenta[i] + gradient
            change = gradient + 0.9 * momenta[i] if nesterov else momenta[i]
            weights[i] = weights[i] - 0.005 * change  # the first 500 steps: a tenth of init_lr
            np.testing.assert_allclose(
                variable.numpy(), weights[i], rtol=1e-4, atol=1e-6, err_msg=variable.name
            )
    assert int(trainer.step) == 2


def test_the_loss_scale_changes_no_step_beyond_rounding():
    results = []
    for dtype, scale in (("fp16", 1.0), ("fp16", 128.0)):
        trainer = Trainer(make_run(), dtype=dtype, loss_scale=scale)
        trainer.train_step(*make_batch())
        results.append(np.concatenate([v.numpy().ravel() for v in trainer.model.variables]))
    assert np.abs(results[0] - results[1]).max() < 1e-3
    assert np.isfinite(results[1]).all()


def test_label_smoothing_trains_towards_smoothed_labels():
    trainer = Trainer(make_run(label_smoothing=0.1))
    images, labels = make_batch()
    before = [v.numpy() for v in trainer.model.variables]
    log_probabilities = tf.nn.log_softmax(trainer.model(images, training=True)).numpy()
    for variable, value in zip(trainer.model.variables, before, strict=True):
        variable.assign(value)
    trainer.train_step(images, labels)
    targets = np.full([8, 10], 0.01)
    targets[np.arange(8), labels] = 0.91
    loss, _ = trainer.means()
    assert loss == pytest.approx(-(targets * log_probabilities).sum(1).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("images", "batch_size", "ends"),
    [
        (50_000, 128, [391, 782, 1172]),  # 390.625 steps each
        (7 * 50_000, 128, [2735, 5469, 8204, 10_938]),  # the last in the last step of 28 epochs
        (10, 5, [2, 4, 6]),
        (3, 8, [1, 2, 3]),  # several of them in a step
    ],
)
def test_epochs_end_in_the_steps_that_see_their_last_images(images, batch_size, ends):
    step, found = 0, []
    while len(found) < len(ends):
        step = next_end(step, images, batch_size)
        found.append(step)
    assert found == ends
    assert next_end(ends[0] - 1, images, batch_size) == ends[0]


def test_means_are_over_the_steps_since_the_last_reset():
    trainer = Trainer(make_run())
    losses = []
    for step in range(3):
        trainer.train_step(*make_batch(step))
        losses.append(trainer.means(reset=True)[0])
    again = Trainer(make_run())
    for step in range(3):
        again.train_step(*make_batch(step))
    loss, accuracy = again.means()
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert accuracy in [i / 24 for i in range(25)]


def test_a_loss_that_is_not_finite_is_reported_with_its_own_step(tmp_path):
    trainer = Trainer(make_run())
    images, labels = make_batch()
    trainer.train_step(images, labels)
    trainer.check_finite(str(tmp_path))
    trainer.model.logits_bias.assign(np.full([10], np.nan))
    trainer.train_step(images, labels)
    trainer.train_step(images, labels)
    with pytest.raises(UserError, match=r"not finite at step 2.*No checkpoint"):
        trainer.check_finite(str(tmp_path))


def test_weights_that_are_not_finite_are_never_saved_even_before_a_loss_shows_it(tmp_path):
    trainer = Trainer(make_run())
    trainer.model.logits_bias.assign(np.full([10], np.inf))
    with pytest.raises(UserError, match="weights were no longer finite by step 0"):
        trainer.check_finite(str(tmp_path))


def test_what_is_logged_evaluated_or_saved_is_looked_at_once_before(
    tmp_path, small_synthetic, monkeypatch
):
    looked_at = []
    check = Trainer.check_finite

    def spy(trainer, ckpt_path):
        looked_at.append(int(trainer.step))
        check(trainer, ckpt_path)

    monkeypatch.setattr(Trainer, "check_finite", spy)
    run = make_run(num_iterations=22)
    run_trainer.train(run, options(tmp_path, save_per_iterations=7, epochs_between_evals=1))
    assert looked_at == [2, 4, 6, 7, 8, 10, 12, 14, 16, 18, 20, 21, 22]


@pytest.mark.parametrize(
    ("data_format", "dtype"),
    [("channels_first", "fp32"), ("channels_first", "bf16"), ("channels_last", "fp16")],
)
def test_every_way_to_compute_resumes_from_every_others_checkpoint(data_format, dtype, tmp_path):
    if data_format == "channels_first":
        skip_without_channels_first(dtype)
    run = make_run()
    first = Trainer(run, "channels_last", "fp32")
    first.train_step(*make_batch())
    prefix = checkpoints.save(first.checkpoint, str(tmp_path), 1)
    other = Trainer(run, data_format, dtype, loss_scale=128)
    other.restore(prefix)
    for ours, theirs in zip(first.model.variables, other.model.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other.train_step(*make_batch(1))
    assert int(other.step) == 2


def test_bf16_learns_the_synthetic_data_as_well_as_fp32():
    images, labels = make_split("train", 3000)
    train_set = ImageSet(images, labels.astype(np.int32))
    images, labels = make_split("test", 1000)
    test_set = ImageSet(images, labels.astype(np.int32))
    mean = mean_image(train_set.images)
    accuracies = {}
    for dtype in ("fp32", "bf16"):
        hyperparameters = TrainingConfig(
            "one_cycle", 300, batch_size=64, init_lr=0.2, nesterov=True, weight_decay=5e-4
        )
        # statistics that follow within 300 steps
        config = ModelConfig(num_layers=8, batch_norm_decay=0.9)
        trainer = Trainer(
            RunConfig(config, DataConfig("synthetic", CLASS_NAMES), hyperparameters), dtype=dtype
        )
        trainer.model.image_mean.assign(mean)
        for batch in training_batches(train_set, mean, 64, num_steps=300):
            trainer.train_step(*batch)
        accuracies[dtype] = Evaluator(trainer.model)(test_set).accuracy
    assert accuracies["fp32"] > 0.65
    assert accuracies["bf16"] == pytest.approx(accuracies["fp32"], abs=0.05)


def options(folder, **changes) -> Options:
    folder = str(folder)
    defaults = Options(ckpt_path=folder, log_per_iterations=2)
    return dataclasses.replace(defaults, **changes)


@pytest.fixture
def small_synthetic(monkeypatch):
    monkeypatch.setattr("cifar10_resnet.data.dataset.SYNTHETIC_IMAGES", {"train": 80, "test": 40})


def test_several_steps_in_a_call_are_those_taken_one_by_one(tmp_path, small_synthetic):
    run = make_run(num_iterations=13)
    ends = []
    for steps_per_call in (1, 4):
        folder = tmp_path / str(steps_per_call)
        outcome = run_trainer.train(
            run, options(folder, steps_per_call=steps_per_call, save_per_iterations=5, max_ckpts=-1)
        )
        assert [step for step, _ in checkpoints.list_checkpoints(str(folder))] == [5, 10, 13]
        trainer = Trainer(run)
        trainer.restore(outcome.checkpoint)
        ends.append([v.numpy() for v in trainer.model.variables])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_with_all_of_the_fast_recipe_resumes_bit_identically_from_any_step(
    tmp_path, small_synthetic
):
    run = make_run(**(RECIPES["fast"] | {"num_iterations": 9}))
    ends = []
    for stops in ([9], [3, 9], [5, 7, 9]):
        folder, checkpoint = tmp_path / str(len(ends)), None
        for stop in stops:
            # How often a start logs by default depends on where it stops: no log changes the run.
            settings = options(
                folder, max_train_steps=stop, steps_per_call=4, log_per_iterations=None
            )
            checkpoint = run_trainer.train(run, settings, resume_from=checkpoint).checkpoint
        trainer = Trainer(run)
        trainer.restore(checkpoint)
        ends.append(
            [v.numpy() for v in [*trainer.model.variables, *trainer.optimizer.slots.values()]]
        )
    for other in ends[1:]:
        for ours, theirs in zip(ends[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_compiled_step_is_the_same_step():
    ends = []
    for jit_compile in (False, True):
        trainer = Trainer(make_run(), jit_compile=jit_compile)
        for step in range(2):
            trainer.train_step(*make_batch(step))
        ends.append([v.numpy() for v in trainer.model.variables])
        assert int(trainer.step) == 2
    for one, other in zip(*ends, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_an_evaluation_that_reaches_the_threshold_ends_the_run_with_a_checkpoint(
    tmp_path, small_synthetic
):
    run = make_run(num_iterations=50)
    outcome = run_trainer.train(run, options(tmp_path, epochs_between_evals=1, stop_threshold=0.01))
    assert outcome.step == 10
    assert outcome.checkpoint == checkpoints.find(str(tmp_path)).prefix


def test_a_holdout_is_what_is_evaluated_while_training(tmp_path, small_synthetic, capsys):
    run = make_run(num_iterations=8)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, holdout=16))
    outcome = run_trainer.train(run, options(tmp_path, epochs_between_evals=1))
    assert outcome.metrics.num_images == 16
    assert "evaluated on holdout" in capsys.readouterr().out


def test_evaluating_every_epoch_works_where_a_batch_holds_several_epochs(tmp_path, small_synthetic):
    run = make_run(num_iterations=2)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, batch_size=200))
    outcome = run_trainer.train(run, options(tmp_path, epochs_between_evals=1))
    assert outcome.step == 2
    assert outcome.metrics.num_images == 40


def test_other_training_images_than_the_runs_own_are_refused(
    tmp_path, small_synthetic, monkeypatch
):
    run = make_run(num_iterations=20)
    outcome = run_trainer.train(run, options(tmp_path, max_train_steps=4))
    monkeypatch.setattr("cifar10_resnet.data.dataset.SYNTHETIC_IMAGES", {"train": 88, "test": 40})
    with pytest.raises(UserError, match="has other training images"):
        run_trainer.train(run, options(tmp_path), resume_from=outcome.checkpoint)


def test_only_the_newest_checkpoints_are_kept_and_the_last_step_is_among_them(
    tmp_path, small_synthetic
):
    run = make_run(num_iterations=11)
    run_trainer.train(run, options(tmp_path, save_per_iterations=2, max_ckpts=3))
    assert [step for step, _ in checkpoints.list_checkpoints(str(tmp_path))] == [8, 10, 11]


def test_epochs_become_the_steps_that_see_every_image_that_often(small_synthetic, tmp_path):
    given = {"dataset": "synthetic", "batch_size": 32, "holdout": 10}
    run, _, resume_from = resume.prepare_run(given, str(tmp_path), train_epochs=3)
    assert resume_from is None
    assert run.training.num_iterations == 7  # 3 * 70 / 32, rounded up
    assert run.data.class_names == CLASS_NAMES


def prepare(given: dict, folder, path=None, **keywords) -> RunConfig:
    data = path and find(str(path), given.get("dataset"))
    return resume.prepare_run(given, str(folder), data, **keywords)[0]


def test_a_new_run_learns_the_classes_that_its_files_have(tmp_path):
    hundred = write_cifar100(tmp_path / "hundred")
    photos = write_photos(tmp_path / "pictures", 3)
    for given, path, dataset, classes in (
        ({}, hundred, "cifar100", 100),
        ({"dataset": "cifar100", "coarse_labels": True}, hundred, "cifar100", 20),
        ({"dataset": None, "coarse_labels": None}, photos, "pictures", 3),
    ):
        run = prepare(given, tmp_path / "new", path)
        assert (run.data.dataset, run.model.num_classes) == (dataset, classes)
        assert len(run.data.class_names) == classes
        assert run.data.coarse_labels == bool(given.get("coarse_labels"))


def test_a_resumed_run_finds_its_data_set_and_its_default_folder(tmp_path, monkeypatch):
    write_cifar100(tmp_path / "cifar-100-binary")
    monkeypatch.chdir(tmp_path)
    run = prepare({"dataset": "cifar100", "coarse_labels": True}, "run")
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=8))
    checkpoints.save(Trainer(run).checkpoint, "run", 0)
    assert prepare({}, "run") == prepare({"dataset": "cifar100"}, "run") == run
    for given, reason in (
        ({"dataset": "cifar10"}, "dataset=cifar10 .* dataset=cifar100"),
        ({"coarse_labels": False}, "coarse_labels=False .* coarse_labels=True"),
    ):
        with pytest.raises(UserError, match=reason):
            prepare(given, "run")
    with pytest.raises(UserError, match=r"dataset=pictures .* dataset=cifar100"):
        prepare({}, "run", write_photos(tmp_path / "pictures", 20))


def test_a_small_set_of_two_classes_is_trained_on_in_a_smaller_default_batch(tmp_path, capsys):
    data = find(str(write_photos(tmp_path / "pictures", 2, train=9, test=5)))
    given = {"num_iterations": 4, "num_layers": 8, "holdout": 3}
    run, _, _ = resume.prepare_run(given, str(tmp_path), data)
    assert run.training.batch_size == 6
    shown = capsys.readouterr().out
    assert shown == "Using --batch_size=6, because there are no more training images.\n"
    outcome = run_trainer.train(run, options(tmp_path, epochs_between_evals=1), data)
    assert (outcome.step, outcome.metrics.num_images) == (4, 3)
    assert outcome.metrics.confusion_matrix.shape == (2, 2)
    capsys.readouterr()
    assert resume.prepare_run({}, str(tmp_path), data) == (run, data, outcome.checkpoint)
    assert capsys.readouterr().out == ""


def test_a_given_batch_may_be_the_training_images_without_the_holdout_and_no_more(tmp_path):
    data = find(str(write_photos(tmp_path / "pictures", 2, train=9, test=5)))
    for holdout in (0, 3):
        given = {"holdout": holdout, "batch_size": 9 - holdout}
        run, _, _ = resume.prepare_run(given, str(tmp_path), data)
        assert run.training.batch_size == 9 - holdout
        with pytest.raises(UserError, match=f"there are only {9 - holdout} training images"):
            resume.prepare_run(given | {"batch_size": 10 - holdout}, str(tmp_path), data)


@pytest.mark.parametrize(("size", "fits"), [(128, True), (200, False)])
def test_a_run_of_an_older_version_resumes_with_the_default_batch_for_few_images(
    tmp_path, size, fits
):
    data = find(str(write_photos(tmp_path / "pictures", 2, train=9, test=5)))
    run = RunConfig(
        dataclasses.replace(SMALL, num_classes=2),
        DataConfig("pictures", ("class 0", "class 1")),
        TrainingConfig(batch_size=size),
    )
    checkpoints.save(Trainer(run).checkpoint, str(tmp_path / "run"), 0)
    if fits:
        assert resume.prepare_run({}, str(tmp_path / "run"), data)[0] == run
    else:
        with pytest.raises(UserError, match="batch_size=200 is invalid: there are only 9 "):
            resume.prepare_run({}, str(tmp_path / "run"), data)
