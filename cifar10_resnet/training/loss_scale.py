"""Scales the loss against fp16 underflow, by a fixed or by a dynamic factor."""

from collections.abc import Iterable

import tensorflow as tf

from resnet_model import assign

FIRST, LEAST, MOST = 2.0**15, 1.0, 2.0**24
GROWTH_STEPS = 2000
# The variables that a step changes, each with its value before the step.
Snapshot = list[tuple[tf.Variable, tf.Tensor]]


class FixedLossScale:
    """The same factor in each step. Every step counts."""

    guarded = "the loss"  # A run has diverged if this is not finite.
    has_skipped = False

    def __init__(self, factor: float):
        self._factor = factor
        # A checkpoint contains nothing of it.
        self.parts: dict[str, tf.Module] = {}
        self.variables: tuple[tf.Variable, ...] = ()

    def scaled(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss times the scale."""
        return loss * self._factor

    def unscaled(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the gradients of the loss from the gradients of the scaled loss."""
        if self._factor == 1.0:
            return gradients
        return [gradient / self._factor for gradient in gradients]

    def snapshot(self, variables: Iterable[tf.Variable]) -> Snapshot:
        """Returns what `settle` needs to undo a step. Call it before the step."""
        return []

    def settle(self, loss: tf.Tensor, before: Snapshot) -> tf.Tensor:
        """Undoes a step if it has to. Returns whether the run has diverged."""
        return ~tf.math.is_finite(loss)

    def summary(self) -> dict[str, float]:
        """Returns the numbers for TensorBoard."""
        return {}


class DynamicLossScale(tf.Module):
    """A factor that halves when a step overflows, and doubles after many good steps in a row.

    A step overflows if its loss is not finite, or if a variable that it changed is not finite. All
    gradients end in the momentum, after the sum over replicas, so this check covers them. The step
    is undone: weights, momentum and statistics of batch norm keep their bits. An overflow at the
    least scale is a divergence.
    """

    guarded = "the loss or a gradient"

    def __init__(self):
        super().__init__()
        # Both are float32, like all variables that workers copy from their chief.
        self.scale = tf.Variable(FIRST, trainable=False)
        self.good_steps = tf.Variable(0.0, trainable=False)

    @property
    def parts(self) -> dict[str, tf.Module]:
        """Returns the parts of a checkpoint."""
        return {"loss_scale": self}

    @property
    def has_skipped(self) -> bool:
        """Returns whether the last step was undone."""
        return float(self.good_steps.numpy()) == 0

    def scaled(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the loss times the scale."""
        return loss * self.scale

    def unscaled(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the gradients of the loss from the gradients of the scaled loss."""
        return [gradient / self.scale for gradient in gradients]

    def snapshot(self, variables: Iterable[tf.Variable]) -> Snapshot:
        """Returns what `settle` needs to undo a step. Call it before the step."""
        return [(variable, variable.read_value()) for variable in variables]

    def settle(self, loss: tf.Tensor, before: Snapshot) -> tf.Tensor:
        """Undoes a step that overflowed, and adapts the scale. Returns whether the run diverged."""
        after = [variable.read_value() for variable, _ in before]
        # One piece takes one kernel. A kernel for each variable would take longer.
        changed = tf.concat([tf.reshape(value, [-1]) for value in (loss, *after)], 0)
        is_good = tf.reduce_all(tf.math.is_finite(changed))
        # A branch would wait for the host, which has to read the condition. A choice does not.
        for (variable, old), new in zip(before, after, strict=True):
            assign(variable, tf.where(is_good, new, old))

        scale = self.scale.read_value()
        good_steps = tf.where(is_good, self.good_steps + 1, 0.0)
        is_due = is_good & tf.equal(good_steps % GROWTH_STEPS, 0)
        grown = tf.where(is_due, tf.minimum(scale * 2, MOST), scale)
        assign(self.scale, tf.where(is_good, grown, tf.maximum(scale / 2, LEAST)))
        assign(self.good_steps, good_steps)
        return ~is_good & (scale <= LEAST)

    def summary(self) -> dict[str, float]:
        """Returns the numbers for TensorBoard."""
        return {"loss_scale": float(self.scale.numpy())}


def loss_scaling(loss_scale: float | str, dtype: str) -> FixedLossScale | DynamicLossScale:
    """Returns the loss scaling for --loss_scale. Only fp16 needs one."""
    if dtype != "fp16":
        return FixedLossScale(1.0)
    return DynamicLossScale() if loss_scale == "dynamic" else FixedLossScale(loss_scale)
