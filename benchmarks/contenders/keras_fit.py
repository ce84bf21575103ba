"""Keras 3 as a contender: a functional model, `compile` and `fit`."""

import time
from collections.abc import Mapping
from typing import Any

import keras
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


def convolution(x: Any, depth: int, stride: int, decay: keras.Regularizer, name: str) -> Any:
    return keras.layers.Conv2D(
        depth,
        3,
        stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=decay,
        name=name,
    )(x)


def norm_relu(x: Any, name: str) -> Any:
    x = keras.layers.BatchNormalization(
        momentum=BATCH_NORM_DECAY, epsilon=BATCH_NORM_EPSILON, name=name
    )(x)
    return keras.layers.ReLU()(x)


def build(num_layers: int, weight_decay: float) -> keras.Model:
    decay = keras.regularizers.L2(weight_decay / 2)  # Keras sums the squares without a half.
    inputs = keras.Input([32, 32, 3])
    depth_in = BLOCK_DEPTHS[0]
    x = convolution(inputs, depth_in, 1, decay, "init_conv")
    for block, depth in enumerate(BLOCK_DEPTHS, 1):
        for unit in range(1, (num_layers - 2) // 6 + 1):
            name = f"block{block}_unit{unit}"
            stride = 2 if block > 1 and unit == 1 else 1
            shortcut = x
            x = norm_relu(x, f"{name}_norm1")
            if block == unit == 1:
                shortcut = x
            x = convolution(x, depth, stride, decay, f"{name}_conv1")
            x = norm_relu(x, f"{name}_norm2")
            x = convolution(x, depth, 1, decay, f"{name}_conv2")
            if stride > 1:
                more = (depth - depth_in) // 2
                shortcut = keras.layers.AveragePooling2D(2)(shortcut)
                shortcut = keras.ops.pad(shortcut, [[0, 0], [0, 0], [0, 0], [more, more]])
            x = keras.layers.Add()([x, shortcut])
            depth_in = depth
    x = keras.layers.GlobalAveragePooling2D()(norm_relu(x, "final_norm"))
    logits = keras.layers.Dense(
        NUM_CLASSES,
        kernel_initializer="he_normal",
        kernel_regularizer=decay,
        dtype="float32",
        name="logits",
    )(x)
    return keras.Model(inputs, logits)


def augmented_batches(folder: str) -> tf.data.Dataset:
    images, labels = read_split(folder, "train")
    mean = images.mean(axis=0, dtype=np.float64).astype(np.float32)

    def augment(pixels: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.cast(pixels, tf.float32) - mean
        image = tf.image.pad_to_bounding_box(image, 4, 4, 40, 40)
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


class Stopwatch(keras.callbacks.Callback):
    """A timer of an epoch's steps except the first, which waits for the input to start up."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            int(self.model.optimizer.iterations)  # waits for a GPU to finish the first step
            self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = time.perf_counter() - self.started


class KerasFit(Contender):
    def prepare(
        self,
        layers: int,
        dtype: str,
        weight_decay: float = WEIGHT_DECAY,
        folder: str | None = None,
    ) -> dict[str, Any]:
        """Builds the network to train on a folder's augmented images, or on batches in memory."""
        keras.mixed_precision.set_global_policy(
            {"fp32": "float32", "bf16": "mixed_bfloat16"}[dtype]
        )
        self.model = build(layers, weight_decay)
        self.model.compile(
            keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        if folder:
            self.batches = augmented_batches(folder)
        else:
            images, labels = (np.stack(p) for p in zip(*memory_batches(BATCH_SIZE), strict=True))
            dataset = tf.data.Dataset.from_tensor_slices((images, labels))
            self.batches = dataset.repeat().prefetch(tf.data.AUTOTUNE)
        return {
            "parameters": self.model.count_params()
            - sum(int(np.prod(v.shape)) for v in self.model.non_trainable_variables),
            "device": "gpu" if tf.config.list_logical_devices("GPU") else "cpu",
            "jit_compile": self.model.jit_compile,
        }

    def train(self, count: int) -> float:
        history = self.model.fit(self.batches, steps_per_epoch=count, verbose=0)
        return history.history["loss"][0]

    def timed(self, count: int) -> tuple[float, float]:
        stopwatch = Stopwatch()
        history = self.model.fit(
            self.batches, steps_per_epoch=count + 1, verbose=0, callbacks=[stopwatch]
        )
        return stopwatch.seconds, history.history["loss"][0]

    def load(self, variables: Mapping[str, np.ndarray]) -> None:
        for name, value in variables.items():
            layer, _, attribute = name.rpartition("/")
            getattr(self.model.get_layer(layer.replace("/", "_")), attribute).assign(value)

    def logits(self, images: np.ndarray) -> np.ndarray:
        return self.model.predict(images, verbose=0)

    def open_pipeline(self, folder: str) -> None:
        self._pipeline = iter(augmented_batches(folder))

    def pipeline(self, count: int) -> float:
        return BATCH_SIZE * batches_per_second(self._pipeline, count)

    def commands(self) -> dict[str, Any]:
        more = {"open_pipeline": self.open_pipeline, "pipeline": self.pipeline}
        return super().commands() | more


if __name__ == "__main__":
    serve(KerasFit().commands())
