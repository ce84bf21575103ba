"""Turns gradients into steps: SGD with momentum, and Muon on top of it."""

import numpy as np
import tensorflow as tf

from cifar10_resnet.config import TrainingConfig
from resnet_model import ResNet, assign

# Muon turns a kernel this far at a learning rate of 1. So one --init_lr suits both the kernels that
# Muon moves and all other variables.
MUON_STEP = 0.1


class Momentum:
    """Stochastic gradient descent with momentum, and with the L2 penalty in its gradients."""

    def __init__(self, model: ResNet, training: TrainingConfig):
        self._training = training
        self.variables = model.final_layer if training.fine_tune else model.trainable_variables
        self._decayed = {kernel.ref() for kernel in model.kernels}
        self.slots = {
            v.name.removesuffix(":0").replace("/", "_"): tf.Variable(tf.zeros_like(v))
            for v in self.variables
        }

    def apply(self, gradients: list[tf.Tensor], learning_rate: tf.Tensor) -> None:
        slots = self.slots.values()
        for variable, slot, gradient in zip(self.variables, slots, gradients, strict=True):
            self._move(variable, slot, gradient, learning_rate)

    def snapshot(self) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Returns the current variables and momenta. They are copied only if they change."""
        pairs = zip(self.variables, self.slots.values(), strict=True)
        return [(variable.read_value(), slot.read_value()) for variable, slot in pairs]

    def gradients_since(self, before: list[tuple[tf.Tensor, tf.Tensor]]) -> dict[str, np.ndarray]:
        """Returns the gradients, by variable, of the step since a snapshot, without L2 penalty.

        It derives them from the momenta, so watching a step cannot change what it computes.
        """
        gradients = {}
        pairs = zip(self.variables, self.slots.values(), strict=True)
        for (variable, slot), (old_value, old_slot) in zip(pairs, before, strict=True):
            gained = slot - self._training.momentum * old_slot
            if variable.ref() in self._decayed:
                gained -= self._training.weight_decay * old_value
            gradients[variable.name] = gained.numpy()
        return gradients

    def _move(
        self, variable: tf.Variable, slot: tf.Variable, gradient: tf.Tensor, rate: tf.Tensor
    ) -> None:
        if variable.ref() in self._decayed:
            # This adds the gradient of weight_decay * tf.nn.l2_loss(kernel).
            gradient += self._training.weight_decay * variable
        tf.raw_ops.ResourceApplyMomentum(
            var=variable.handle,
            accum=slot.handle,
            lr=rate,
            grad=gradient,
            momentum=tf.constant(self._training.momentum),
            use_nesterov=self._training.nesterov,
        )


class Muon(Momentum):
    """Muon for the kernels in units (orthogonalised momentum), plain momentum for the rest.

    A kernel counts as a matrix with a column for each of its output channels. Its step is near the
    closest orthogonal matrix to its momentum. So directions with small gradients are learned as
    fast as directions with large ones. Instead of weight decay, the kernel keeps a fixed length:
    the square root of its number of channels. Kernels of one shape are computed together.
    """

    def __init__(self, model: ResNet, training: TrainingConfig):
        super().__init__(model, training)
        in_units = {conv.kernel.ref() for unit in model.units for conv in unit.convs}
        self._decayed -= in_units
        self._groups: dict[tuple[int, ...], list[int]] = {}
        for i, variable in enumerate(self.variables):
            if variable.ref() in in_units:
                self._groups.setdefault(tuple(variable.shape), []).append(i)

    def apply(self, gradients: list[tf.Tensor], learning_rate: tf.Tensor) -> None:
        slots = list(self.slots.values())
        grouped = {i for places in self._groups.values() for i in places}
        for i, variable in enumerate(self.variables):
            if i not in grouped:
                self._move(variable, slots[i], gradients[i], learning_rate)
        for shape, places in self._groups.items():
            steps = self._steps([slots[i] for i in places], [gradients[i] for i in places], shape)
            for i, step in zip(places, steps, strict=True):
                turned = self.variables[i] - learning_rate * MUON_STEP * step
                assign(self.variables[i], turned * (shape[-1] ** 0.5 / tf.norm(turned)))

    def _steps(
        self, slots: list[tf.Variable], gradients: list[tf.Tensor], shape: tuple[int, ...]
    ) -> list[tf.Tensor]:
        momentum = self._training.momentum
        moved = []
        for slot, gradient in zip(slots, gradients, strict=True):
            average = momentum * slot + gradient
            assign(slot, average)
            moved.append(momentum * average + gradient if self._training.nesterov else average)
        matrices = tf.reshape(tf.stack(moved), [len(moved), -1, shape[-1]])
        return tf.unstack(tf.reshape(orthogonal(matrices), [len(moved), *shape]))


OPTIMIZERS = {"momentum": Momentum, "muon": Muon}


def orthogonal(matrices: tf.Tensor) -> tf.Tensor:
    """Returns the matrices [N, rows, columns] with singular values near 1 (0.7 to 1.2).

    It repeats Newton-Schulz five times with the coefficients of Muon (Jordan et al., 2024), which
    give up exactness for speed.
    """
    x = matrices / (tf.norm(matrices, axis=[1, 2], keepdims=True) + 1e-7)
    wide = matrices.shape[1] < matrices.shape[2]
    for _ in range(5):
        # This is the smaller of the two products.
        gram = tf.matmul(x, x, transpose_b=True) if wide else tf.matmul(x, x, transpose_a=True)
        factor = -4.7750 * gram + 2.0315 * tf.matmul(gram, gram)
        x = 3.4445 * x + (tf.matmul(factor, x) if wide else tf.matmul(x, factor))
    return x


def learning_rates(training: TrainingConfig) -> np.ndarray:
    """Returns the learning rate of each step, as float32 [num_iterations]."""
    steps = np.arange(training.num_iterations)
    fraction = steps / training.num_iterations
    if training.recipe != "paper":
        # The rate rises to its peak at a fifth of the run. Then it falls, and never reaches zero.
        rise, fall = (steps + 1) / training.num_iterations / 0.2, (1 - fraction) / 0.8
        factors = np.minimum(np.minimum(rise, fall), 1.0)
    else:
        # These boundaries are for 64,000 steps. A run of another length keeps the proportions.
        boundaries = np.round(np.array([500, 32_000, 48_000]) * training.num_iterations / 64_000)
        factors = np.array([0.1, 1.0, 0.1, 0.01])[np.searchsorted(boundaries, steps, side="right")]
    peak = training.init_lr
    if training.scale_lr:
        peak *= training.batch_size / TrainingConfig.batch_size
    return (peak * factors).astype(np.float32)
