"""Builds a network with its optimizer, takes training steps, and restores its state."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from cifar10_resnet import checkpoints, device
from cifar10_resnet.config import RunConfig
from cifar10_resnet.distributed.replicas import Replicas
from cifar10_resnet.errors import UserError
from cifar10_resnet.native import kernels
from cifar10_resnet.training import mixup
from cifar10_resnet.training.average import WeightAverage
from cifar10_resnet.training.loss_scale import DynamicLossScale, loss_scaling
from cifar10_resnet.training.optimizers import OPTIMIZERS, learning_rates
from resnet_model import IMAGE_SHAPE, ResNet, assign


class Trainer:
    """A network with its optimizer state, its step counter and its training step."""

    def __init__(
        self,
        run: RunConfig,
        data_format: str = "channels_last",
        dtype: str = "fp32",
        loss_scale: float | str = 1.0,
        jit_compile: bool = False,
        steps_per_call: int = 1,
        replicas: Replicas | None = None,
        sync_batch_norm: bool = False,
        native_library: str | None = None,
    ):
        self.run = run
        self.replicas = replicas = replicas or Replicas()
        self.steps_per_call, self.loops_in_xla = steps_per_call, jit_compile and steps_per_call > 1
        # This makes a batch from an element of the pipeline. On a GPU, that is its draws only.
        self.make_batch: Callable[..., tuple[tf.Tensor, tf.Tensor]] = lambda batch: batch
        replicas.refuse_uneven(run.training.batch_size)
        self.is_native = native_library is not None
        ways = {"normalise": replicas.normalise(sync_batch_norm)}
        if native_library:
            ways = kernels.ways(native_library, dtype)
        arguments = run.model.arguments() | device.ways(data_format, dtype)
        with replicas.strategy.scope():
            self.model = ResNet(**arguments | ways, seed=run.training.seed)
            self.optimizer = OPTIMIZERS[run.training.optimizer](self.model, run.training)
            self._loss_scale = loss_scaling(loss_scale, dtype)
            self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
            # The mean of a run's images identifies them when the run is resumed. The network
            # subtracts this mean, unless a pretrained network brought its own.
            self.data_mean, parts = self.model.image_mean, {}
            if run.training.pretrained and not run.training.recompute_mean:
                parts["data_mean"] = self.data_mean = tf.Variable(tf.zeros(IMAGE_SHAPE))
            # These stay on the device, so no step waits for the host to read them.
            self._loss_sum = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            self._correct = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._counted = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._first_bad_step = tf.Variable(-1, dtype=tf.int64, trainable=False)
        self.average = None
        if run.training.average_weights:
            self.average = WeightAverage(self.model, arguments)  # one, whatever the replicas
        self.learning_rates = learning_rates(run.training)
        with tf.device("cpu"):
            parts["description"] = self._description = tf.Variable(run.to_json(), trainable=False)
        parts |= {"model": self.model, "momentum": self.optimizer.slots, "step": self.step}
        if self.average:
            parts["average"] = self.average
        self._required = tf.train.Checkpoint(**parts)
        self.checkpoint = tf.train.Checkpoint(**parts, **self._loss_scale.parts)
        self._rates = tf.constant(self.learning_rates)
        self._sync_batch_norm = sync_batch_norm
        # No Python code in a step depends on a tensor's value. Without AutoGraph, tracing takes
        # half the time.
        self.train_step = tf.function(
            lambda images, labels: replicas.strategy.run(self._train_step, (images, labels)),
            autograph=False,
            jit_compile=jit_compile,
        )
        self._watched: tuple[int, list] | None = None

    def batches_of(self, pipeline: tf.data.Dataset) -> "Iterator | Chunks":
        """Returns the batches of a pipeline, in the form that `train_steps` takes."""
        if self.loops_in_xla:
            return Chunks(pipeline, self.steps_per_call)  # XLA cannot read a pipeline.
        return iter(pipeline)

    def images_of(self, element: Any) -> np.ndarray:
        """Returns the images of an element of the pipeline, 0 to 255."""
        return (self.make_batch(element)[0] + self.model.image_mean).numpy()

    def add_to_average(self, pipeline: tf.data.Dataset) -> None:
        """Adds the present weights to their average, and measures its statistics on batches."""
        if self.run.training.fine_tune:
            pipeline = pipeline.take(0)  # The statistics are the pretrained network's.
        self.average.add(self.make_batch(element)[0] for element in pipeline)

    def train_steps(self, batches: "Iterator | Chunks", count: int) -> None:
        """Takes `count` steps in few calls, so a GPU does not wait for Python between them."""
        if self.loops_in_xla:
            for chunk, first, end in batches.take(count):
                self._steps_in_xla(chunk, tf.constant(first), tf.constant(end))
        elif count == 1:
            self.train_step(*self.make_batch(next(batches)))
        else:
            self._several_steps(batches, tf.constant(count))

    @tf.function(autograph=False)
    def _several_steps(self, batches: Iterator, count: tf.Tensor) -> None:
        def step(done: tf.Tensor) -> list[tf.Tensor]:
            self.train_step(*self.make_batch(batches.get_next()))
            return [done + 1]

        tf.while_loop(lambda done: done < count, step, [0], parallel_iterations=1)

    @tf.function(autograph=False, jit_compile=True)
    def _steps_in_xla(self, chunk: tf.Tensor, first: tf.Tensor, end: tf.Tensor) -> None:
        def step(place: tf.Tensor) -> list[tf.Tensor]:
            element = tf.nest.map_structure(lambda part: tf.gather(part, place), chunk)
            self._train_step(*self.make_batch(element))
            return [place + 1]

        tf.while_loop(lambda place: place < end, step, [first], parallel_iterations=1)

    def _train_step(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        """Takes one step on a batch of mean-subtracted images and integer labels.

        Runs on each replica, with its worker's part of the batch.
        """
        images, labels = self.replicas.own_share(images), self.replicas.own_share(labels)
        pairs = None
        if self.run.training.mixup:
            pairs = mixup.Pairs(self.run.training, self.step.read_value())
            images, others = pairs.mixed(images, mixup.before(images)), mixup.before(labels)
        frozen = self.run.training.fine_tune
        before = self._loss_scale.snapshot(self.changing)
        with tf.GradientTape() as tape:
            # Layers that the tape does not record have no backward pass.
            with tape.stop_recording() if frozen else contextlib.nullcontext():
                features = self.model.features(images, not frozen)
            logits = self.model.project(features)
            losses = self._cross_entropy(labels, logits)
            if pairs:
                losses = pairs.mixed(losses, self._cross_entropy(others, logits))
                labels = pairs.larger(labels, others)
            loss = tf.reduce_mean(losses)
            if self.replicas.count > 1:
                loss /= self.replicas.count  # this replica's part of the whole batch's mean
            scaled_loss = self._loss_scale.scaled(loss)
        gradients = tape.gradient(scaled_loss, self.optimizer.variables)
        gradients = self._loss_scale.unscaled(gradients)
        right = tf.equal(tf.argmax(logits, axis=1, output_type=labels.dtype), labels)
        right = tf.math.count_nonzero(right)
        if self.replicas.count > 1:
            gradients, loss, right = self._over_replicas(gradients, loss, right)
        with tf.name_scope("optimizer"):
            self.optimizer.apply(gradients, tf.gather(self._rates, self.step))
        has_diverged = self._loss_scale.settle(loss, before)

        # Each replica changes its own copies by handle, as in `assign`. They stay equal.
        add = tf.raw_ops.AssignAddVariableOp
        add(resource=self.step.handle, value=tf.constant(1, tf.int64))
        # A run may skip a step whose loss is not finite. Such a loss would spoil the means.
        counts = tf.math.is_finite(loss)
        add(resource=self._counted.handle, value=tf.cast(counts, tf.int64))
        add(resource=self._correct.handle, value=tf.where(counts, right, 0))
        add(resource=self._loss_sum.handle, value=tf.cast(tf.where(counts, loss, 0.0), tf.float64))
        is_first_bad = has_diverged & (self._first_bad_step < 0)
        assign(self._first_bad_step, tf.where(is_first_bad, self.step, self._first_bad_step))

    def _over_replicas(
        self, gradients: list[tf.Tensor], loss: tf.Tensor, right: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Returns the sums of the replicas' results. Averages the statistics that they updated."""
        statistics = [] if self._sync_batch_norm else self._statistics
        shares = [statistic / self.replicas.count for statistic in statistics]
        *sums, loss, right = self.replicas.sum(
            [*gradients, *shares, loss, tf.cast(right, tf.float32)]
        )
        for variable, mean in zip(statistics, sums[len(gradients) :], strict=True):
            assign(variable, mean)
        return sums[: len(gradients)], loss, tf.cast(right, tf.int64)

    @property
    def _statistics(self) -> tuple[tf.Variable, ...]:
        """Returns the statistics of batch norm that a step updates."""
        return () if self.run.training.fine_tune else self.model.statistics

    @property
    def changing(self) -> list[tf.Variable]:
        """Returns the weights, momenta and statistics that a step changes."""
        return [*self.optimizer.variables, *self.optimizer.slots.values(), *self._statistics]

    def trace(self) -> tf.Graph:
        """Returns the graph of `train_step`, traced now instead of in the first step."""
        size = self.run.training.batch_size // self.replicas.num_workers
        return self.train_step.get_concrete_function(
            tf.TensorSpec([size, *IMAGE_SHAPE], tf.float32), tf.TensorSpec([size], tf.int32)
        ).graph

    def _cross_entropy(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        smoothing = self.run.training.label_smoothing
        if not smoothing:
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        classes = self.run.model.num_classes
        targets = tf.one_hot(
            labels, classes, 1 - smoothing + smoothing / classes, smoothing / classes
        )
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    def record_machine(self, facts: dict[str, str]) -> None:
        """Adds facts about the machine to the description that checkpoints contain."""
        description = json.loads(self.run.to_json()) | {checkpoints.MACHINE: facts}
        self._description.assign(json.dumps(description, sort_keys=True))

    @property
    def network(self) -> ResNet:
        """Returns the network to evaluate: the averaged one once there is one."""
        return self.average.network if self.average and self.average.has_begun else self.model

    @property
    def steps_done(self) -> int:
        """Returns the value of `step`. Each replica has a copy of it."""
        return int(self.step.numpy())

    def means(self, reset: bool = False) -> tuple[float, float]:
        """Returns the mean loss and accuracy since the last reset, or NaN if no step counts."""
        steps = int(self._counted.numpy()) or math.nan
        loss = float(self._loss_sum.numpy()) / steps
        accuracy = int(self._correct.numpy()) / (steps * self.run.training.batch_size)
        if reset:
            for variable in (self._loss_sum, self._correct, self._counted):
                variable.assign(0)
        return loss, accuracy

    def watch_next_step(self) -> None:
        """Takes the snapshot from which `norms` computes the next step's gradients."""
        self._watched = self.steps_done + 1, self.optimizer.snapshot()

    def summary(self) -> dict[str, float]:
        """Returns the numbers for TensorBoard: the norms, and a dynamic loss scale."""
        return self.norms() | self._loss_scale.summary()

    def norms(self) -> dict[str, float]:
        """Returns each block's weight norms and, if the last step was watched, gradient norms."""
        weights = {v.name: v.numpy() for v in self.model.trainable_variables}
        norms = _block_norms("weight_norm", weights)
        is_watched = self._watched and self._watched[0] == self.steps_done
        if is_watched and not self._loss_scale.has_skipped:
            gradients = self.optimizer.gradients_since(self._watched[1])
            norms |= _block_norms("gradient_norm", gradients)
        self._watched = None
        return norms

    def restore(self, prefix: str) -> None:
        """Restores the run from a checkpoint that only the chief has to be able to read."""

        def read() -> str:
            # A run can change between a fixed and a dynamic loss scale.
            optional = {"loss_scale": DynamicLossScale()} | self._loss_scale.parts
            checkpoints.restore(self._required, prefix, optional)
            return str(self.step.numpy())

        self.step.assign(int(self.replicas.from_chief(read)))
        self.copy_from_chief()

    def copy_from_chief(self) -> None:
        """Copies the chief's state to every worker: all float32 variables of a checkpoint."""
        state = [*self.optimizer.slots.values(), *self._loss_scale.variables]
        state += self.average.variables if self.average else ()
        self.replicas.copy_from_chief([*self.model.variables, *state, self.data_mean])

    def check_finite(self, ckpt_path: str) -> None:
        """Refuses a loss or weights that are not finite, so they are never saved."""
        bad_step = int(self._first_bad_step.numpy())
        if bad_step >= 0:
            what = f"{self._loss_scale.guarded} was not finite at step {bad_step}"
        elif not all(np.isfinite(v.numpy()).all() for v in self.model.variables):
            # ReLU turns NaN into zero, so the loss may not show it.
            what = f"the weights were no longer finite by step {self.steps_done}"
        else:
            return
        good, _ = checkpoints.newest_intact(ckpt_path)
        rest = f"The last good checkpoint is {good}" if good else "No checkpoint was written yet"
        raise UserError(
            f"Training diverged: {what}. {rest}. Use a lower --init_lr than "
            f"{self.run.training.init_lr:g}, or --dtype=fp32, in a new --ckpt_path."
        )


class Chunks:
    """The batches of a pipeline in chunks. Each call takes some batches of a chunk."""

    def __init__(self, pipeline: tf.data.Dataset, size: int):
        # A chunk has a fixed size, because XLA compiles for each shape again.
        self._chunks = iter(pipeline.batch(size, drop_remainder=True).prefetch(2))
        self._size = self._place = size

    def take(self, count: int) -> Iterator[tuple[Any, int, int]]:
        """Yields chunks with the first place to take and the place after the last."""
        while count:
            if self._place == self._size:
                self._chunk, self._place = next(self._chunks), 0
            first, self._place = self._place, min(self._place + count, self._size)
            count -= self._place - first
            yield self._chunk, first, self._place


def _block_norms(kind: str, values: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the Euclidean norms of arrays, grouped by the first part of their names."""
    squares: dict[str, float] = {}
    for name, value in values.items():
        tag = f"{kind}/{name.split('/')[0]}"
        squares[tag] = squares.get(tag, 0.0) + float(np.square(value, dtype=np.float64).sum())
    return {tag: math.sqrt(square) for tag, square in squares.items()}
