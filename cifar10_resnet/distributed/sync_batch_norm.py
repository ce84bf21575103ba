"""Computes batch norm with the statistics of a batch that is spread over replicas."""

from collections.abc import Callable, Sequence
from typing import Protocol

import tensorflow as tf

from resnet_model import BatchNorm, Normalise, assign, batch_norm_relu


class Replicas(Protocol):
    """The replicas that a batch is spread over, as far as batch norm needs them."""

    count: int

    def sum(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns each value's sum over all replicas. Call it in a replica."""


def over(replicas: Replicas) -> Normalise:
    """Returns the `normalise` for a ResNet that trains with the whole batch's statistics."""

    def normalise(
        norm: BatchNorm,
        x: tf.Tensor,
        training: bool,
        shortcut: tf.Tensor | None = None,
        relu: bool = True,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        if not training:
            return batch_norm_relu(norm, x, training, shortcut, relu)
        if shortcut is not None:
            x += shortcut
        normalised = _normalise_and_move(norm, x, replicas)
        return tf.nn.relu(normalised) if relu else normalised, x

    return normalise


def _normalise_and_move(norm: BatchNorm, x: tf.Tensor, replicas: Replicas) -> tf.Tensor:
    """Returns x, normalised over all replicas. Updates this replica's moving averages."""
    axes = [norm.layout.index(axis) for axis in "NHW"]
    count = tf.cast(tf.size(x) // x.shape[norm.layout.index("C")] * replicas.count, tf.float32)
    mean, variance = tf.nn.moments(tf.cast(x, tf.float32), axes)
    # Squares about the moving mean keep the digits that squares about zero would lose.
    shift = (mean - norm.moving_mean) / replicas.count
    square = variance / replicas.count + shift**2 * replicas.count
    shift, square = replicas.sum([shift, square])
    mean, variance = norm.moving_mean + shift, square - shift**2
    normalised = _with_gradient(norm, mean, variance, count, replicas)(
        x, tf.convert_to_tensor(norm.gamma), tf.convert_to_tensor(norm.beta)
    )
    for moving, value in (
        (norm.moving_mean, mean),
        (norm.moving_variance, variance * count / (count - 1)),
    ):
        assign(moving, norm.decay * moving + (1 - norm.decay) * value)
    return normalised


def _with_gradient(
    norm: BatchNorm, mean: tf.Tensor, variance: tf.Tensor, count: tf.Tensor, replicas: Replicas
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
    """Returns the function that normalises x by statistics of `count` values on all replicas.

    Its gradient goes through the statistics too, so it reaches x on all replicas.
    """
    axes = [norm.layout.index(axis) for axis in "NHW"]
    shape = [-1 if axis == "C" else 1 for axis in norm.layout]
    centre, scale = (tf.reshape(v, shape) for v in (mean, tf.math.rsqrt(variance + norm.epsilon)))

    @tf.custom_gradient
    def normalise(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor):
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=gamma,
            offset=beta,
            mean=mean,
            variance=variance,
            epsilon=norm.epsilon,
            data_format=norm.layout,
            is_training=False,
        )

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            upstream = tf.cast(upstream, tf.float32)
            normalised = (tf.cast(x, tf.float32) - centre) * scale
            for_beta = tf.reduce_sum(upstream, axes)
            for_gamma = tf.reduce_sum(upstream * normalised, axes)
            through_mean, through_variance = (
                tf.reshape(total / count, shape) for total in replicas.sum([for_beta, for_gamma])
            )
            centred = upstream - through_mean - normalised * through_variance
            for_x = tf.reshape(gamma, shape) * scale * centred
            return tf.cast(for_x, x.dtype), for_gamma, for_beta

        return y, gradient

    return normalise
