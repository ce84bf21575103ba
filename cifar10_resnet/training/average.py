"""Averages a network's weights over the last epochs of a run."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from resnet_model import ResNet


class WeightAverage(tf.Module):
    """The mean of a network's variables at several steps, as a separate network.

    The loss is often lower between the weights of several steps than at each of the steps
    (Izmailov et al., 2018). Averaged statistics of batch norm would not fit the mean weights, so
    training batches give its statistics.
    """

    def __init__(self, model: ResNet, arguments: dict[str, Any]):
        super().__init__()
        self._model = model
        # With a decay of 0, the moving averages are the last batch's statistics.
        self.network = ResNet(**arguments | {"batch_norm_decay": 0.0})
        # It is float32, like all variables that workers copy from their chief.
        self.count = tf.Variable(0.0, trainable=False)
        self._add_variables = tf.function(self._add_in_graph, autograph=False)
        self._measure = tf.function(self._measure_in_graph, autograph=False)

    @property
    def has_begun(self) -> bool:
        """Returns whether the mean has a value."""
        return float(self.count.numpy()) > 0

    def add(self, batches: Iterable[tf.Tensor]) -> None:
        """Adds the network's present variables to the mean, and measures its statistics.

        Without batches, its statistics are the mean of the network's.
        """
        self._add_variables()
        measured = [self._measure(images) for images in batches]
        for statistic, *values in zip(self.network.statistics, *measured, strict=True):
            if values:
                statistic.assign(tf.add_n(values) / len(values))

    def _add_in_graph(self) -> None:
        count = self.count.assign_add(1)
        for mean, variable in zip(self.network.variables, self._model.variables, strict=True):
            mean.assign_add((variable - mean) / count)

    def _measure_in_graph(self, images: tf.Tensor) -> list[tf.Tensor]:
        """Returns the statistics of a batch."""
        self.network.features(images, training=True)
        return [statistic.read_value() for statistic in self.network.statistics]
