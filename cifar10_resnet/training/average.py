"""Averages a network's weights over the last epochs of a run."""

import tensorflow as tf

from resnet_model import ResNet


class WeightAverage(tf.Module):
    """The mean of a network's variables at several steps, as a separate network.

    The loss is often lower between the weights of several steps than at each of the steps
    (Izmailov et al., 2018). The statistics of batch norm are averaged like the weights.
    """

    def __init__(self, model: ResNet, network: ResNet):
        super().__init__()
        self._model = model
        self.network = network
        # It is float32, like all variables that workers copy from their chief.
        self.count = tf.Variable(0.0, trainable=False)
        self._add = tf.function(self._add_in_graph, autograph=False)

    @property
    def has_begun(self) -> bool:
        """Returns whether the mean has a value."""
        return float(self.count.numpy()) > 0

    def add(self) -> None:
        """Adds the network's present variables to the mean."""
        self._add()

    def _add_in_graph(self) -> None:
        count = self.count.assign_add(1)
        for mean, variable in zip(self.network.variables, self._model.variables, strict=True):
            mean.assign_add((variable - mean) / count)
