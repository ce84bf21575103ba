"""This project as a contender."""

import dataclasses
import math
import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from cifar10_input import mean_image, training_batches
from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig, units_per_block
from cifar10_resnet.data import dataset, splits
from cifar10_resnet.device import resolve_data_format
from cifar10_resnet.native import kernels
from cifar10_resnet.options import Options
from cifar10_resnet.training.trainer import Trainer
from contender import (
    BATCH_SIZE,
    BLOCK_DEPTHS,
    LEARNING_RATE,
    MOMENTUM,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Contender,
    batches_per_second,
    memory_batches,
    serve,
)
from resnet_model import DTYPES, ResNet

MATRIX_SIDE = 4096
MATMUL_SECONDS = 1.0


def multiply_adds(config: ModelConfig) -> int:
    """Returns the multiply-adds of a forward pass for one image.

    They are in the convolutions and the final layer. The rest is per pixel and negligible.
    """
    side, depth_in = 32, BLOCK_DEPTHS[0]
    total = side * side * 9 * 3 * depth_in
    for block, depth in enumerate(BLOCK_DEPTHS):
        for unit in range(units_per_block(config.num_layers, config.bottleneck)):
            before, stride = side, 2 if block > 0 and unit == 0 else 1
            side //= stride
            if config.bottleneck:
                total += before * before * depth_in * depth
                total += side * side * (9 * depth * depth + depth * 4 * depth)
                depth_in = 4 * depth
            else:
                total += side * side * 9 * (depth_in * depth + depth * depth)
                depth_in = depth
    return total + depth_in * config.num_classes


def network_variables(model: ResNet) -> list[tf.Variable]:
    """Returns all variables except the mean image, which is only saved with the network."""
    return [v for v in model.variables if v is not model.image_mean]


class ThisProject(Contender):
    def prepare(
        self,
        layers: int,
        dtype: str,
        weight_decay: float = WEIGHT_DECAY,
        batch_size: int = BATCH_SIZE,
        bottleneck: bool = False,
        fine_tune: bool = False,
        native: str = "auto",
    ) -> dict[str, Any]:
        self.batch_size = batch_size
        model = ModelConfig(num_layers=layers, bottleneck=bottleneck, num_classes=NUM_CLASSES)
        training = TrainingConfig(
            batch_size=batch_size,
            # A run begins with a tenth of its rate. A run of this length does so for 10,000 steps.
            init_lr=10 * LEARNING_RATE,
            num_iterations=1_280_000,
            momentum=MOMENTUM,
            weight_decay=weight_decay,
            fine_tune=fine_tune,
        )
        device = "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
        data_format = resolve_data_format("auto", dtype, device)
        options = Options(native=native, data_format=data_format, dtype=dtype)
        library = kernels.library(options)
        run = RunConfig(model=model, training=training)
        self.trainer = Trainer(run, data_format, dtype, native_library=library)
        self.batches = [
            (tf.constant(images), tf.constant(labels))
            for images, labels in memory_batches(batch_size)
        ]
        self.done = 0
        return {
            "parameters": sum(math.prod(v.shape) for v in self.trainer.model.trainable_variables),
            "multiply_adds": multiply_adds(model),
            "device": device,
            "layout": data_format,
            "native": library is not None,
        }

    def train(self, count: int) -> float:
        for _ in range(count):
            self.trainer.train_step(*self.batches[self.done % len(self.batches)])
            self.done += 1
        loss, _ = self.trainer.means(reset=True)
        return loss

    def load(self, variables: Mapping[str, np.ndarray]) -> None:
        for variable in network_variables(self.trainer.model):
            variable.assign(variables[variable.name.removesuffix(":0")])

    def logits(self, images: np.ndarray) -> np.ndarray:
        return self.trainer.model(images).numpy()

    def export(self, file: str) -> None:
        """Writes variables for `check`: all are different, and the batch statistics fit."""
        config = dataclasses.replace(self.trainer.run.model, batch_norm_decay=0.0)
        model = ResNet(**config.arguments())
        rng = np.random.default_rng(0)
        for variable in model.trainable_variables:
            if not variable.name.endswith("/kernel:0"):
                variable.assign_add(rng.uniform(-0.3, 0.3, variable.shape).astype(np.float32))
        images, _ = self.batches[0]
        model(images, training=True)
        values = {v.name.removesuffix(":0"): v.numpy() for v in network_variables(model)}
        np.savez(file, **values)

    def matmul(self, dtype: str) -> float:
        """Returns the GMAC/s of one large matrix product, about the most of this machine."""
        a, b = (
            tf.cast(tf.random.stateless_normal([MATRIX_SIDE] * 2, [0, seed]), DTYPES[dtype])
            for seed in (1, 2)
        )
        float(tf.linalg.matmul(a, b)[0, 0])
        products, started = 0, time.perf_counter()
        while time.perf_counter() - started < MATMUL_SECONDS:
            float(tf.linalg.matmul(a, b)[0, 0])
            products += 1
        return products * MATRIX_SIDE**3 / (time.perf_counter() - started) / 1e9

    def open_pipeline(self, folder: str) -> None:
        examples = splits.load(dataset.find(folder), "train")
        mean = mean_image(examples.images)
        self._pipeline = iter(training_batches(examples, mean, BATCH_SIZE))

    def pipeline(self, count: int) -> float:
        return BATCH_SIZE * batches_per_second(self._pipeline, count)

    def peak_memory(self) -> float:
        """Returns the peak memory of this process in MiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def commands(self) -> dict[str, Any]:
        names = ("export", "matmul", "open_pipeline", "pipeline", "peak_memory")
        return super().commands() | {name: getattr(self, name) for name in names}


if __name__ == "__main__":
    serve(ThisProject().commands())
