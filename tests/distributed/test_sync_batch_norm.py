"""Batch norm over replicas, compared with plain batch norm."""

from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf
from conftest import skip_without_channels_first

from cifar10_resnet.distributed import sync_batch_norm
from cifar10_resnet.distributed.replicas import Replicas
from resnet_model import Normalise, ResNet, batch_norm_relu


class One:
    """A single replica."""

    count = 1

    def sum(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return list(values)


def computed(normalise: Normalise, data_format: str, version: int) -> dict[str, np.ndarray]:
    """Logits in training and after it, the gradients, and the averages that were moved."""
    model = ResNet(
        num_layers=8, data_format=data_format, resnet_version=version, normalise=normalise
    )
    images = np.random.default_rng(0).normal(1, 2, (4, 32, 32, 3)).astype(np.float32)
    with tf.device("cpu"), tf.GradientTape() as tape:
        logits = model(images, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([1, 2, 3, 4], logits))
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    found = {f"gradient of {v.name}": g for v, g in zip(variables, gradients, strict=True)}
    found |= {variable.name: variable for variable in model.variables}
    found |= {"logits": logits, "logits afterwards": model(images)}
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_over_one_replica_it_computes_what_the_plain_one_computes(data_format, version):
    if data_format == "channels_first":
        skip_without_channels_first()
    expected = computed(batch_norm_relu, data_format, version)
    found = computed(sync_batch_norm.over(One()), data_format, version)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        distance = np.linalg.norm(found[name] - value)
        assert distance <= 1e-3 * np.linalg.norm(value) + 1e-6, name


def test_one_replica_computes_plain_batch_norm():
    assert Replicas().normalise(over_all=True) is batch_norm_relu
    several = Replicas()
    several.count = 2
    assert several.normalise(over_all=False) is batch_norm_relu
    assert several.normalise(over_all=True) is not batch_norm_relu
