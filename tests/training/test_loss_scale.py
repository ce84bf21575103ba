"""Dynamic loss scaling: what an overflow changes, and what it does not change."""

import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_same_checkpoint, values_in
from programs import SMALL, run, run_code
from test_trainer import make_batch, make_run

from cifar10_resnet import checkpoints
from cifar10_resnet.errors import UserError
from cifar10_resnet.training.loss_scale import DynamicLossScale
from cifar10_resnet.training.trainer import Trainer

# The largest number in fp16 is 65,504. With this scale, every batch's gradients are larger.
OVERFLOWS = 2.0**40


def make_trainer(
    scale: float = 2.0**10, jit_compile: bool = False, steps_per_call: int = 1, **hyperparameters
) -> Trainer:
    trainer = Trainer(
        make_run(**hyperparameters),
        dtype="fp16",
        loss_scale="dynamic",
        jit_compile=jit_compile,
        steps_per_call=steps_per_call,
    )
    trainer._loss_scale.scale.assign(scale)
    return trainer


def huge_batch(seed: int = 0) -> tuple[tf.Tensor, tf.Tensor]:
    """A batch whose pixels are infinite in fp16, so the activations overflow at any scale."""
    images, labels = make_batch(seed)
    return images * 1e6, labels


def state(trainer: Trainer) -> list[bytes]:
    """The bits of the weights, of the statistics of batch norm and of the momentum."""
    variables = [*trainer.model.variables, *trainer.optimizer.slots.values()]
    return [variable.numpy().tobytes() for variable in variables]


def scaling(trainer: Trainer) -> tuple[float, float]:
    found = trainer._loss_scale
    return float(found.scale.numpy()), float(found.good_steps.numpy())


# --- The rule, by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "good_steps", "is_good", "after", "diverged"),
    [
        (2**15, 0, True, (2**15, 1), False),
        (2**15, 1998, True, (2**15, 1999), False),
        (2**15, 1999, True, (2**16, 2000), False),
        (2**16, 2000, True, (2**16, 2001), False),
        (2**16, 3999, True, (2**17, 4000), False),
        (2**24, 1999, True, (2**24, 2000), False),  # the cap
        (2**15, 1999, False, (2**14, 0), False),
        (2, 5, False, (1, 0), False),
        (1.5, 5, False, (1, 0), False),
        (1, 5, False, (1, 0), True),  # the floor
        (1, 5, True, (1, 6), False),
    ],
)
def test_the_scale_follows_its_rule(scale, good_steps, is_good, after, diverged):
    rule = DynamicLossScale()
    rule.scale.assign(scale)
    rule.good_steps.assign(good_steps)
    loss = tf.constant(2.5 if is_good else np.nan, tf.float32)
    assert bool(rule.settle(loss, [])) is diverged
    assert (float(rule.scale), float(rule.good_steps)) == after
    assert rule.has_skipped is not is_good


def test_a_new_run_begins_at_32768():
    rule = DynamicLossScale()
    assert (float(rule.scale), float(rule.good_steps)) == (32_768, 0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_bad_number_in_any_variable_undoes_all_of_the_step(bad):
    first, second = tf.Variable([1.0, -0.0]), tf.Variable([[3.0]])
    rule = DynamicLossScale()
    before = rule.snapshot([first, second])
    first.assign([5.0, 6.0])
    second.assign([[bad]])
    rule.settle(tf.constant(1.0), before)
    assert first.numpy().tobytes() == np.float32([1.0, -0.0]).tobytes()
    assert second.numpy() == 3
    assert float(rule.scale) == 2**14


# --- Training steps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "jit_compile"), [("momentum", False), ("muon", False), ("momentum", True)]
)
def test_a_step_that_overflows_halves_the_scale_and_changes_nothing_else(optimizer, jit_compile):
    trainer = make_trainer(jit_compile=jit_compile, optimizer=optimizer, nesterov=True)
    trainer.train_step(*make_batch(0))
    assert scaling(trainer) == (2**10, 1)
    trainer._loss_scale.scale.assign(OVERFLOWS)
    before = state(trainer)
    for halvings in (1, 2):
        trainer.train_step(*make_batch(halvings))
        assert scaling(trainer) == (OVERFLOWS / 2**halvings, 0)
        assert state(trainer) == before
    trainer._loss_scale.scale.assign(2**10)
    trainer.train_step(*huge_batch())
    assert scaling(trainer) == (2**9, 0)
    assert state(trainer) == before
    assert int(trainer.step) == 4
    trainer.train_step(*make_batch(4))
    assert scaling(trainer) == (2**9, 1)
    after = state(trainer)
    assert [a != b for a, b in zip(after, before, strict=True)].count(False) == 1  # the mean image


def test_the_steps_around_an_overflow_are_those_of_a_fixed_scale():
    trainer = make_trainer()
    fixed = Trainer(make_run(), dtype="fp16", loss_scale=2**10)
    for batch in (make_batch(0), huge_batch(), make_batch(1)):
        trainer.train_step(*batch)
        trainer._loss_scale.scale.assign(2**10)
    for seed in (0, 1):  # The learning rate is the same in both steps.
        fixed.train_step(*make_batch(seed))
    assert state(trainer) == state(fixed)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_several_steps_in_a_call_skip_as_single_ones_do(jit_compile):
    batches = [make_batch(0), huge_batch(), make_batch(2), make_batch(3)]
    one_by_one, together = (make_trainer(jit_compile=jit_compile, steps_per_call=n) for n in (1, 4))
    for batch in batches:
        one_by_one.train_step(*batch)
    images, labels = (tf.stack(values) for values in zip(*batches, strict=True))
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    together.train_steps(together.batches_of(data), len(batches))
    assert scaling(together) == scaling(one_by_one) == (2**9, 2)
    assert together.means() == pytest.approx(one_by_one.means(), rel=1e-3)
    if not jit_compile:  # In a loop, XLA rounds in other places.
        assert state(together) == state(one_by_one)


def test_a_fine_tuned_layer_is_left_alone_too():
    trainer = make_trainer(pretrained="elsewhere", fine_tune=True)
    before = state(trainer)
    # The final layer's gradients are fp32, and so is the scaled loss, about 2.4 * 2**127.
    trainer._loss_scale.scale.assign(2.0**127)
    trainer.train_step(*make_batch())
    assert scaling(trainer)[1] == 0
    assert state(trainer) == before


def test_the_means_are_over_all_finite_losses():
    trainer, losses = make_trainer(OVERFLOWS), []
    before = [v.numpy() for v in trainer.model.variables]
    for seed in (0, 1):
        images, labels = make_batch(seed)
        log_probabilities = tf.nn.log_softmax(trainer.model(images, training=True))
        losses.append(-tf.reduce_mean(tf.gather(log_probabilities, labels, batch_dims=1)))
    for variable, value in zip(trainer.model.variables, before, strict=True):
        variable.assign(value)  # the reference moved the batch-norm averages
    for seed in (0, 1):  # Both steps are undone, so both losses belong to the first weights.
        trainer.train_step(*make_batch(seed))
    assert trainer.means()[0] == pytest.approx(np.mean(losses), rel=1e-4)

    bias = trainer.model.logits_bias.numpy()
    trainer.model.logits_bias.assign(np.full([10], np.nan))
    trainer.train_step(*make_batch(2))
    trainer.model.logits_bias.assign(bias)
    loss, accuracy = trainer.means(reset=True)
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert accuracy in [i / 16 for i in range(17)]

    trainer.model.logits_bias.assign(np.full([10], np.nan))
    trainer.train_step(*make_batch(2))
    assert np.isnan(trainer.means()).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_precisions_ignore_it(dtype, tmp_path):
    prefixes = []
    for loss_scale in ("dynamic", 1.0):
        trainer = Trainer(make_run(), dtype=dtype, loss_scale=loss_scale)
        trainer.train_step(*make_batch())
        prefixes.append(checkpoints.save(trainer.checkpoint, str(tmp_path / str(loss_scale)), 1))
    assert_same_checkpoint(*prefixes)


# --- Divergence -----------------------------------------------------------------------------------


def test_an_overflow_at_scale_1_is_a_divergence_with_its_own_step(tmp_path):
    trainer = make_trainer(4)
    before = state(trainer)
    for scale in (2, 1):
        trainer.train_step(*huge_batch())
        assert scaling(trainer) == (scale, 0)
        trainer.check_finite(str(tmp_path))
    for _ in range(2):
        trainer.train_step(*huge_batch())
    assert scaling(trainer) == (1, 0)
    assert state(trainer) == before
    with pytest.raises(UserError, match=r"the loss or a gradient was not finite at step 3\. No "):
        trainer.check_finite(str(tmp_path))


def test_weights_that_are_not_finite_are_reported(tmp_path):
    trainer = make_trainer()
    trainer.model.logits_bias.assign(np.full([10], np.inf))
    trainer.train_step(*make_batch())
    with pytest.raises(UserError, match="weights were no longer finite by step 1"):
        trainer.check_finite(str(tmp_path))


# --- Checkpoints ----------------------------------------------------------------------------------


def test_a_resumed_run_is_bit_identical(tmp_path):
    def take(trainer: Trainer, steps: range) -> str:
        for step in steps:
            trainer.train_step(*(huge_batch() if step == 4 else make_batch(step)))
        return checkpoints.save(trainer.checkpoint, str(tmp_path / str(steps)), steps.stop)

    whole = make_trainer(2.0**26)
    whole._loss_scale.good_steps.assign(1998)
    whole = take(whole, range(7))
    first = make_trainer(2.0**26)
    first._loss_scale.good_steps.assign(1998)
    half = take(first, range(3))
    resumed = make_trainer(1)
    resumed.restore(half)
    assert_same_checkpoint(take(resumed, range(3, 7)), whole)
    assert values_in(half)["loss_scale/scale/.ATTRIBUTES/VARIABLE_VALUE"] < 2**26


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        (("fp16", 128.0), ("fp16", "dynamic")),
        (("fp32", 128.0), ("fp16", "dynamic")),
        (("fp16", "dynamic"), ("fp16", 128.0)),
        (("fp16", "dynamic"), ("fp32", "dynamic")),
    ],
)
def test_a_run_can_change_between_fixed_and_dynamic(saved_by, resumed_by, tmp_path):
    saved, resumed = (Trainer(make_run(), "channels_last", *way) for way in (saved_by, resumed_by))
    saved.train_step(*make_batch())
    prefix = checkpoints.save(saved.checkpoint, str(tmp_path), 1)
    is_dynamic = saved_by == ("fp16", "dynamic")
    assert is_dynamic == any(name.startswith("loss_scale") for name in values_in(prefix))
    resumed.restore(prefix)
    assert state(resumed) == state(saved)
    if resumed_by == ("fp16", "dynamic"):
        assert scaling(resumed) == (2**15, 0)
    resumed.train_step(*make_batch(1))
    assert int(resumed.step) == 2


def test_a_checkpoint_with_a_part_too_few_or_too_many_is_refused(tmp_path):
    trainer = make_trainer()
    parts = {
        "description": trainer._description,
        "model": trainer.model,
        "step": trainer.step,
        "momentum": trainer.optimizer.slots,
    }
    for missing in ("momentum", "model"):
        kept = {name: part for name, part in parts.items() if name != missing}
        for more in ({}, trainer._loss_scale.parts):
            incomplete = tf.train.Checkpoint(**kept, **more)
            prefix = checkpoints.save(incomplete, str(tmp_path), 1)
            with pytest.raises(UserError, match="cannot be restored"):
                trainer.restore(prefix)
    unknown = tf.train.Checkpoint(**parts, other=tf.Variable(1.0))
    prefix = checkpoints.save(unknown, str(tmp_path), 1)
    with pytest.raises(UserError, match="cannot be restored"):
        trainer.restore(prefix)


# --- TensorBoard ----------------------------------------------------------------------------------


def test_a_step_that_was_undone_has_no_gradient_norms():
    trainer = make_trainer()
    for batch, is_shown in ((make_batch(), True), (huge_batch(), False)):
        trainer.watch_next_step()
        trainer.train_step(*batch)
        summary = trainer.summary()
        assert summary["loss_scale"] == scaling(trainer)[0]
        assert any(tag.startswith("gradient_norm") for tag in summary) is is_shown
    assert "loss_scale" not in Trainer(make_run(), dtype="fp16", loss_scale=128).summary()


# --- Replicas and the program ---------------------------------------------------------------------

REPLICAS = """
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from test_loss_scale import huge_batch, make_batch, make_run, scaling, state
from cifar10_resnet.distributed import replicas as distributed
from cifar10_resnet.training.trainer import Trainer

replicas = distributed.choose("auto", None)
images, labels = make_batch(1)
half = tf.concat([images[:4], huge_batch(1)[0][4:]], 0)  # overflows on the second replica only
for sync_batch_norm in (False, True):
    trainer = Trainer(
        make_run(), dtype="fp16", loss_scale="dynamic", replicas=replicas,
        sync_batch_norm=sync_batch_norm,
    )
    trainer.train_step(*make_batch(0))
    before = state(trainer)
    trainer.train_step(half, labels)
    assert state(trainer) == before
    assert scaling(trainer) == (2**14, 0), scaling(trainer)
    trainer.train_step(images, labels)
    assert state(trainer) != before
    assert scaling(trainer) == (2**14, 1), scaling(trainer)
    rule = trainer._loss_scale
    for variable in [*trainer.changing, trainer.step, rule.scale, rule.good_steps]:
        one, other = replicas.strategy.experimental_local_results(variable)
        assert one.numpy().tobytes() == other.numpy().tobytes(), variable.name
"""


def test_two_replicas_skip_together():
    code = "import sys; sys.path[:0] = ['tests', 'tests/training']\n" + REPLICAS
    run_code(code)


def test_the_program_trains_stops_and_resumes_bit_identically(tmp_path):
    command = ("run_trainer.py", "--use_synthetic_data", *SMALL, "--dtype=fp16")
    command += ("--num_iterations=8", "--verbose")
    dynamic, folder = "--loss_scale=dynamic", f"--ckpt_path={tmp_path / 'parts'}"
    shown = run(*command, dynamic, f"--ckpt_path={tmp_path / 'whole'}").stdout
    assert re.search("^  loss_scale  +dynamic$", shown, re.M)
    run(*command, dynamic, folder, "--max_train_steps=3")
    assert "at step 3" in run(*command, dynamic, folder).stdout
    assert_same_checkpoint(tmp_path / "whole/model.ckpt-8", tmp_path / "parts/model.ckpt-8")
    saved = values_in(tmp_path / "parts/model.ckpt-8")
    assert saved["loss_scale/good_steps/.ATTRIBUTES/VARIABLE_VALUE"] == 8
    assert "This run is finished" in run(*command, "--loss_scale=64", folder).stdout
