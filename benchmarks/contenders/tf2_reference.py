"""The common way to write this network in TensorFlow 2, as a contender.

It has subclassed Keras layers and a subclassed model, and a custom step under `tf.function`. The
loss includes the L2 term, and `tf.image` augments the images one by one. The file is also a small
program: `tf2_reference.py train` and `tf2_reference.py evaluate`.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

# The program needs this. The benchmark sets it for all contenders.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from contender import (
    BATCH_NORM_DECAY,
    BATCH_NORM_EPSILON,
    BATCH_SIZE,
    BLOCK_DEPTHS,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Contender,
    batches_per_second,
    memory_batches,
    read_split,
    serve,
)

EVALUATION_BATCH_SIZE = 100


def convolution(depth: int, stride: int = 1) -> tf.keras.layers.Conv2D:
    return tf.keras.layers.Conv2D(
        depth, 3, stride, padding="same", use_bias=False, kernel_initializer="he_normal"
    )


def batch_norm() -> tf.keras.layers.BatchNormalization:
    return tf.keras.layers.BatchNormalization(momentum=BATCH_NORM_DECAY, epsilon=BATCH_NORM_EPSILON)


class ResidualUnit(tf.keras.layers.Layer):
    def __init__(self, depth_in: int, depth: int, stride: int, first: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self.norm1, self.norm2 = batch_norm(), batch_norm()
        self.conv1, self.conv2 = convolution(depth, stride), convolution(depth)
        self.stride, self.first, self.more = stride, first, (depth - depth_in) // 2

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        activated = tf.nn.relu(self.norm1(x, training=training))
        shortcut = activated if self.first else x
        if self.stride > 1:
            shortcut = tf.nn.avg_pool2d(shortcut, self.stride, self.stride, "VALID")
            shortcut = tf.pad(shortcut, [[0, 0], [0, 0], [0, 0], [self.more, self.more]])
        x = self.conv1(activated)
        x = self.conv2(tf.nn.relu(self.norm2(x, training=training)))
        return x + shortcut


class ResNet(tf.keras.Model):
    def __init__(self, num_layers: int):
        super().__init__()
        self.init_conv = convolution(BLOCK_DEPTHS[0])
        self.units = []
        depth_in = BLOCK_DEPTHS[0]
        for block, depth in enumerate(BLOCK_DEPTHS, 1):
            for unit in range(1, (num_layers - 2) // 6 + 1):
                stride = 2 if block > 1 and unit == 1 else 1
                first = block == unit == 1
                name = f"block{block}_unit{unit}"
                self.units.append(ResidualUnit(depth_in, depth, stride, first, name=name))
                depth_in = depth
        self.final_norm = batch_norm()
        self.pool = tf.keras.layers.GlobalAveragePooling2D()
        self.dense = tf.keras.layers.Dense(NUM_CLASSES, kernel_initializer="he_normal")

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        x = self.init_conv(images)
        for unit in self.units:
            x = unit(x, training=training)
        x = tf.nn.relu(self.final_norm(x, training=training))
        return self.dense(self.pool(x))


def build(num_layers: int) -> ResNet:
    model = ResNet(num_layers)
    model(tf.zeros([1, 32, 32, 3]))  # makes the variables
    return model


class Training:
    """The parts of the custom training loop."""

    def __init__(self, model: ResNet, weight_decay: float = WEIGHT_DECAY):
        self.model, self.weight_decay = model, weight_decay
        self.optimizer = tf.keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
        self.optimizer.build(model.trainable_variables)
        self.cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.loss = tf.keras.metrics.Mean()
        self.accuracy = tf.keras.metrics.SparseCategoricalAccuracy()

    @tf.function
    def step(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        kernels = [v for v in self.model.trainable_variables if v.path.endswith("kernel")]
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            cross_entropy = self.cross_entropy(labels, logits)
            penalty = tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
            loss = cross_entropy + self.weight_decay * penalty
        gradients = tape.gradient(loss, self.model.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        self.loss.update_state(cross_entropy)
        self.accuracy.update_state(labels, logits)


def load_float_images(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pixels, labels = read_split(folder, "train")
    images = pixels.astype(np.float32)
    mean = images.mean(axis=0, dtype=np.float64).astype(np.float32)
    images -= mean
    return images, labels, mean


def augmented_batches(images: np.ndarray, labels: np.ndarray) -> tf.data.Dataset:
    def augment(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.image.resize_with_crop_or_pad(image, 40, 40)
        image = tf.image.random_crop(image, [32, 32, 3])
        return tf.image.random_flip_left_right(image), label

    return (
        tf.data.Dataset.from_tensor_slices((images, labels))
        .shuffle(len(labels))
        .repeat()
        .map(augment, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(BATCH_SIZE, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )


class Tf2Reference(Contender):
    def prepare(
        self,
        layers: int,
        dtype: str,
        weight_decay: float = WEIGHT_DECAY,
        folder: str | None = None,
    ) -> dict[str, Any]:
        """Builds the network to train on a folder's augmented images, or on batches in memory."""
        if dtype != "fp32":
            raise ValueError(f"no {dtype} here")
        self.training = Training(build(layers), weight_decay)
        if folder:
            images, labels, _ = load_float_images(folder)
            self.batches = iter(augmented_batches(images, labels))
        else:
            batches = memory_batches(BATCH_SIZE)
            tensors = [(tf.constant(images), tf.constant(labels)) for images, labels in batches]
            self.batches = (tensors[i % len(tensors)] for i in range(sys.maxsize))
        return {
            "parameters": sum(
                int(np.prod(v.shape)) for v in self.training.model.trainable_variables
            ),
            "device": "gpu" if tf.config.list_logical_devices("GPU") else "cpu",
        }

    def train(self, count: int) -> float:
        self.training.loss.reset_state()
        for _ in range(count):
            self.training.step(*next(self.batches))
        return float(self.training.loss.result())

    def load(self, variables: Mapping[str, np.ndarray]) -> None:
        model = self.training.model
        units = {unit.name: unit for unit in model.units}
        for name, value in variables.items():
            *unit, layer, attribute = name.split("/")
            owner = units["_".join(unit)] if unit else model
            layer = "dense" if layer == "logits" else layer
            getattr(getattr(owner, layer), attribute).assign(value)

    def logits(self, images: np.ndarray) -> np.ndarray:
        return self.training.model(images, training=False).numpy()

    def open_pipeline(self, folder: str) -> None:
        images, labels, _ = load_float_images(folder)
        self._pipeline = iter(augmented_batches(images, labels))

    def pipeline(self, count: int) -> float:
        return BATCH_SIZE * batches_per_second(self._pipeline, count)

    def commands(self) -> dict[str, Any]:
        more = {"open_pipeline": self.open_pipeline, "pipeline": self.pipeline}
        return super().commands() | more


def train(folder: str, layers: int, steps: int, checkpoint: str | None) -> None:
    images, labels, mean = load_float_images(folder)
    training = Training(build(layers))
    batches = augmented_batches(images, labels).take(steps)
    for step, (batch_images, batch_labels) in enumerate(batches, 1):
        training.step(batch_images, batch_labels)
        print(f"step {step} loss {float(training.loss.result()):.4f}", flush=True)
    if checkpoint:
        # With the mean, evaluating does not have to read the training images.
        saved = tf.train.Checkpoint(model=training.model, mean=tf.Variable(mean))
        saved.write(checkpoint)


def evaluate(folder: str, layers: int, checkpoint: str) -> None:
    pixels, labels = read_split(folder, "test")
    model, mean = build(layers), tf.Variable(tf.zeros([32, 32, 3]))
    status = tf.train.Checkpoint(model=model, mean=mean).read(checkpoint)
    status.assert_existing_objects_matched().expect_partial()
    loss, accuracy = tf.keras.metrics.Mean(), tf.keras.metrics.SparseCategoricalAccuracy()
    cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> None:
        logits = model(images, training=False)
        loss.update_state(cross_entropy(labels, logits))
        accuracy.update_state(labels, logits)

    images = pixels.astype(np.float32) - mean.numpy()
    dataset = tf.data.Dataset.from_tensor_slices((images, labels))
    for batch_images, batch_labels in dataset.batch(EVALUATION_BATCH_SIZE).prefetch(
        tf.data.AUTOTUNE
    ):
        step(batch_images, batch_labels)
    print(f"loss {float(loss.result()):.4f} accuracy {float(accuracy.result()):.4f}")


def main() -> None:
    if len(sys.argv) == 1:
        serve(Tf2Reference().commands())
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("do", choices=["train", "evaluate"])
    parser.add_argument("--folder", required=True, help="CIFAR-10's binary batches")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--checkpoint")
    flags = parser.parse_args()
    if flags.do == "train":
        train(flags.folder, flags.layers, flags.steps, flags.checkpoint)
    else:
        evaluate(flags.folder, flags.layers, flags.checkpoint)


if __name__ == "__main__":
    main()
