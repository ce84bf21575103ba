"""Mixes the images and labels of a batch in pairs (Zhang et al., 2018)."""

import tensorflow as tf

from cifar10_resnet.config import TrainingConfig


class Pairs:
    """The pairs of one step: each image with the one before it in the batch, in one proportion.

    The order of a batch is random, and so are the pairs. The share of the first image is uniform
    from 0 to 1, and a function of (seed, step). After the mixed part of the run, it is 1.
    """

    def __init__(self, training: TrainingConfig, step: tf.Tensor):
        # No other draws have this seed, because steps are not negative.
        seed = tf.stack([tf.constant(training.seed, tf.int64), ~step])
        drawn = tf.random.stateless_uniform([], seed, alg="philox")
        last = round(training.mixup * training.num_iterations)
        self._share = tf.where(step < last, drawn, 1.0)

    def mixed(self, values: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
        """Returns the mean of two values, weighted by their shares."""
        return self._share * values + (1 - self._share) * others

    def larger(self, labels: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
        """Returns the labels whose images have the larger share."""
        return tf.where(self._share >= 0.5, labels, others)


def before(batch: tf.Tensor) -> tf.Tensor:
    """Returns the second of each pair: the image or label before it in the batch."""
    return tf.roll(batch, 1, axis=0)
