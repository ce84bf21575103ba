"""A fast step computes what a plain version computes: 500 steps of both.

Training amplifies rounding, so two correct versions drift apart too. The limit is the drift of the
plain version itself, after a change of its weights that a float32 sum does not show.
"""

import numpy as np
import tensorflow as tf

from cifar10_input import ImageSet, mean_image, training_batches
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data.synthetic import CLASS_NAMES, make_split
from cifar10_resnet.training.trainer import Trainer
from resnet_model import ResNet

STEPS = 500
RUN = RunConfig(
    ModelConfig(num_layers=8),
    DataConfig("synthetic", CLASS_NAMES),
    TrainingConfig(num_iterations=STEPS, batch_size=16, init_lr=0.01, weight_decay=2e-4),
)


class PlainTraining:
    """The network, its loss with the L2 penalty and momentum, each in its textbook form."""

    def __init__(self, model: ResNet):
        self.weights = {
            v.name.removesuffix(":0"): tf.Variable(v) for v in model.trainable_variables
        }
        self.momenta = {name: tf.Variable(tf.zeros_like(w)) for name, w in self.weights.items()}

    def norm_relu(self, x: tf.Tensor, name: str) -> tf.Tensor:
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        beta, gamma = self.weights[f"{name}/beta"], self.weights[f"{name}/gamma"]
        return tf.nn.relu(tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-3))

    def conv(self, x: tf.Tensor, name: str, stride: int = 1) -> tf.Tensor:
        return tf.nn.conv2d(x, self.weights[f"{name}/kernel"], stride, "SAME")

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        x = self.conv(images, "init_conv")
        for block in (1, 2, 3):
            name, stride = f"block{block}/unit1", 1 if block == 1 else 2
            activated = self.norm_relu(x, f"{name}/norm1")
            shortcut = activated if block == 1 else x
            if stride == 2:
                depth = x.shape[-1]
                shortcut = tf.nn.avg_pool2d(shortcut, 2, 2, "VALID")
                shortcut = tf.pad(shortcut, [[0, 0]] * 3 + [[depth // 2, depth // 2]])
            x = self.conv(activated, f"{name}/conv1", stride)
            x = self.conv(self.norm_relu(x, f"{name}/norm2"), f"{name}/conv2") + shortcut
        pooled = tf.reduce_mean(self.norm_relu(x, "final_norm"), [1, 2])
        return pooled @ self.weights["logits/kernel"] + self.weights["logits/bias"]

    @tf.function(autograph=False)
    def step(self, images: tf.Tensor, labels: tf.Tensor, rate: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, self.logits(images))
            loss = tf.reduce_mean(losses)
            kernels = [w for name, w in self.weights.items() if name.endswith("kernel")]
            penalty = RUN.training.weight_decay * tf.add_n([tf.nn.l2_loss(w) for w in kernels])
            total = loss + penalty
        gradients = tape.gradient(total, self.weights)
        for name, weight in self.weights.items():
            momentum = self.momenta[name].assign(0.9 * self.momenta[name] + gradients[name])
            weight.assign_sub(rate * momentum)
        return loss


def test_the_loss_curve_of_500_steps_stays_within_rounding_of_a_plain_version():
    images, labels = make_split("train", 1000)
    examples = ImageSet(images, labels.astype(np.int32))
    trainer = Trainer(RUN)
    plain, nudged = PlainTraining(trainer.model), PlainTraining(trainer.model)
    for weight in nudged.weights.values():
        weight.assign(weight * (1 + 1e-7))
    curves = []
    batches = training_batches(examples, mean_image(images), 16, num_steps=STEPS)
    for rate, batch in zip(trainer.learning_rates, batches, strict=True):
        trainer.train_step(*batch)
        ours, _ = trainer.means(reset=True)
        curves.append([ours, *(float(p.step(*batch, tf.constant(rate))) for p in (plain, nudged))])
    ours, expected, other = np.array(curves).T
    drift, rounding = np.abs(ours - expected), np.abs(other - expected)
    assert drift[:20].max() < 2e-3
    assert drift.mean() < 2 * rounding.mean()
    assert abs((ours - expected).mean()) < rounding.mean(), "it drifts to neither side"
    assert expected[-50:].mean() < 0.8 * expected[:10].mean(), "it learned"
