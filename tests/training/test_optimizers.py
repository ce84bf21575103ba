"""Muon against its definition in NumPy; plain momentum is tested with the training step."""

from dataclasses import fields

import numpy as np
import pytest
import tensorflow as tf

from cifar10_resnet.config import TrainingConfig
from cifar10_resnet.training.optimizers import OPTIMIZERS, Momentum, Muon, orthogonal
from resnet_model import ResNet


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Applies the quintic 3.4445 x - 4.775 x^3 + 2.0315 x^5 five times, in float64."""
    x = matrix.astype(np.float64) / np.linalg.norm(matrix)
    for _ in range(5):
        cube = x @ x.T @ x
        x = 3.4445 * x - 4.7750 * cube + 2.0315 * (x @ x.T @ cube)
    return x


@pytest.mark.parametrize("shape", [(144, 16), (16, 16), (16, 64)])
def test_orthogonal_keeps_the_singular_vectors_and_makes_the_values_nearly_one(shape):
    matrices = np.random.default_rng(0).normal(size=[3, *shape]).astype(np.float32)
    result = orthogonal(tf.constant(matrices)).numpy()
    for matrix, found in zip(matrices, result, strict=True):
        np.testing.assert_allclose(found, newton_schulz(matrix), atol=2e-4)
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ found @ vt.T
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=2e-3)
        well_conditioned = values > values.max() / 20
        assert (np.abs(np.diag(inner)[well_conditioned] - 0.95) < 0.3).all()


def test_a_gradient_of_zero_leaves_the_kernels_where_they_are():
    assert not orthogonal(tf.zeros([2, 9, 4])).numpy().any()


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_of_muon_are_those_of_its_definition(nesterov):
    training = TrainingConfig(nesterov=nesterov, weight_decay=0.01, momentum=0.8)
    model = ResNet(num_layers=8, seed=1)
    muon = Muon(model, training)
    variables = model.trainable_variables
    weights = [v.numpy().astype(np.float64) for v in variables]
    momenta = [np.zeros_like(w) for w in weights]
    rng = np.random.default_rng(2)
    for rate in (0.1, 0.04):
        gradients = [rng.normal(size=v.shape).astype(np.float32) for v in variables]
        muon.apply([tf.constant(g) for g in gradients], tf.constant(rate))
        for i, variable in enumerate(variables):
            turned = "block" in variable.name and "conv" in variable.name
            gradient = gradients[i].astype(np.float64)
            if not turned and "kernel" in variable.name:
                gradient += 0.01 * weights[i]
            momenta[i] = 0.8 * momenta[i] + gradient
            change = 0.8 * momenta[i] + gradient if nesterov else momenta[i]
            if turned:
                channels = change.shape[-1]
                change = newton_schulz(change.reshape(-1, channels)).reshape(change.shape)
                weights[i] = weights[i] - rate * 0.1 * change
                weights[i] *= np.sqrt(channels) / np.linalg.norm(weights[i])
            else:
                weights[i] = weights[i] - rate * change
            np.testing.assert_allclose(
                variable.numpy(), weights[i], rtol=1e-3, atol=2e-4, err_msg=variable.name
            )


def test_both_optimizers_keep_the_same_things_in_a_checkpoint():
    shapes = []
    for optimizer in (Momentum, Muon):
        slots = optimizer(ResNet(num_layers=8), TrainingConfig()).slots
        shapes.append({name: slot.shape for name, slot in slots.items()})
    assert shapes[0] == shapes[1]


def test_every_optimizer_that_a_run_may_name_is_there():
    (item,) = (item for item in fields(TrainingConfig) if item.name == "optimizer")
    assert item.metadata["choices"] == tuple(OPTIMIZERS)
