"""The training loop as a library: the step, the optimizer, saving, evaluating. No flags."""

import contextlib
import dataclasses
import errno
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from cifar10_input import training_batches
from cifar10_resnet import checkpoints
from cifar10_resnet.config import (
    MAX_ITERATIONS,
    ModelConfig,
    RunConfig,
    learning_rates,
    refuse_contradictions,
    training_config,
    with_given,
)
from cifar10_resnet.data import dataset, splits
from cifar10_resnet.data.dataset import Dataset
from cifar10_resnet.distributed.replicas import Replicas
from cifar10_resnet.errors import UserError
from cifar10_resnet.evaluation.evaluator import Evaluator
from cifar10_resnet.evaluation.metrics import Metrics
from cifar10_resnet.training.optimizers import OPTIMIZERS
from cifar10_resnet.training.progress import NoProgress, Progress
from resnet_model import IMAGE_SHAPE, ResNet, assign

# Several workers ask each other this often whether one was told to stop.
STEPS_BETWEEN_AGREEMENTS = 10
# Depths that networks for ImageNet have too.
IMAGENET_DEPTHS = (50, 152, 200)


@dataclass(frozen=True)
class Options:
    """How to go about a run: all that may change from one start of it to the next."""

    ckpt_path: str
    train_log_path: str
    data_format: str = "channels_last"
    dtype: str = "fp32"
    loss_scale: float = 128.0
    jit_compile: bool = False
    sync_batch_norm: bool = False
    steps_per_call: int = 1
    log_per_iterations: int = 200
    save_per_iterations: int = 1000
    max_ckpts: int = 5
    epochs_between_evals: int = 0
    stop_threshold: float | None = None
    max_train_steps: int | None = None
    profile_steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a training ended: where it is saved, and the signal that stopped it if one did.

    `summary` holds the rows of a table for people.
    """

    step: int
    checkpoint: str
    metrics: Metrics | None = None
    stopped_by: int | None = None
    summary: dict[str, str] = field(default_factory=dict)


class Trainer:
    """A network in training: its weights, its momentum, its step, and how one step is taken."""

    def __init__(
        self,
        run: RunConfig,
        data_format: str = "channels_last",
        dtype: str = "fp32",
        loss_scale: float = 1.0,
        jit_compile: bool = False,
        replicas: Replicas | None = None,
        sync_batch_norm: bool = False,
    ):
        self.run = run
        self.replicas = replicas = replicas or Replicas()
        replicas.refuse_uneven(run.training.batch_size)
        with replicas.strategy.scope():
            self.model = ResNet(
                **run.model.arguments(),
                data_format=data_format,
                dtype=dtype,
                seed=run.training.seed,
                normalise=replicas.normalise(sync_batch_norm),
            )
            self.optimizer = OPTIMIZERS[run.training.optimizer](self.model, run.training)
            self.step = tf.Variable(0, dtype=tf.int64, trainable=False)
            # The mean of the run's own images, by which it knows them again: the one that the
            # network subtracts, unless that came with the network.
            self.data_mean, parts = self.model.image_mean, {}
            if run.training.pretrained and not run.training.recompute_mean:
                parts["data_mean"] = self.data_mean = tf.Variable(tf.zeros(IMAGE_SHAPE))
            # Gathered on the device, so that no step waits for the host to read them.
            self._loss_sum = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            self._correct = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._first_bad_step = tf.Variable(-1, dtype=tf.int64, trainable=False)
        self.learning_rates = learning_rates(run.training)
        with tf.device("cpu"):
            self._description = tf.Variable(run.to_json(), trainable=False)
        parts |= {"model": self.model, "momentum": self.optimizer.slots, "step": self.step}
        self.checkpoint = tf.train.Checkpoint(description=self._description, **parts)
        self._loss_scale = loss_scale if dtype == "fp16" else 1.0
        self._rates = tf.constant(self.learning_rates)
        # Moved by each replica for itself, and so to be brought together again in each step.
        self._statistics: list[tf.Variable] = []
        if replicas.count > 1 and not sync_batch_norm and not run.training.fine_tune:
            for norm in self.model.norms:
                self._statistics += [norm.moving_mean, norm.moving_variance]
        # Nothing in a step depends on values while it is traced: without AutoGraph, that takes half
        # the time.
        self.train_step = tf.function(
            lambda images, labels: replicas.strategy.run(self._train_step, (images, labels)),
            autograph=False,
            jit_compile=jit_compile,
        )
        self._means_since = 0
        self._watched: tuple[int, list] | None = None

    def train_steps(self, batches: Iterator, count: int) -> None:
        """So many steps, in one call: a GPU need not wait for Python between them."""
        if count == 1:
            self.train_step(*next(batches))
        else:
            self._several_steps(batches, tf.constant(count))

    @tf.function(autograph=False)
    def _several_steps(self, batches: Iterator, count: tf.Tensor) -> None:
        def step(done: tf.Tensor) -> list[tf.Tensor]:
            self.train_step(*batches.get_next())
            return [done + 1]

        tf.while_loop(lambda done: done < count, step, [0], parallel_iterations=1)

    def _train_step(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        """One step on a batch of mean-subtracted images and integer labels.

        Runs on each replica, with the batch that its worker has.
        """
        images, labels = self.replicas.own_share(images), self.replicas.own_share(labels)
        frozen = self.run.training.fine_tune
        with tf.GradientTape() as tape:
            # What the tape does not see has no backward pass.
            with tape.stop_recording() if frozen else contextlib.nullcontext():
                features = self.model.features(images, not frozen)
            logits = self.model.project(features)
            loss = tf.reduce_mean(self._cross_entropy(labels, logits))
            if self.replicas.count > 1:
                loss /= self.replicas.count  # what this replica adds to the whole batch's mean
            scaled_loss = loss * self._loss_scale
        gradients = tape.gradient(scaled_loss, self.optimizer.variables)
        if self._loss_scale != 1.0:
            gradients = [gradient / self._loss_scale for gradient in gradients]
        right = tf.equal(tf.argmax(logits, axis=1, output_type=labels.dtype), labels)
        right = tf.math.count_nonzero(right)
        if self.replicas.count > 1:
            gradients, loss, right = self._over_replicas(gradients, loss, right)
        with tf.name_scope("optimizer"):
            self.optimizer.apply(gradients, tf.gather(self._rates, self.step))

        # By handle, as in `assign`: each replica has its own copies, which stay the same.
        add = tf.raw_ops.AssignAddVariableOp
        add(resource=self.step.handle, value=tf.constant(1, tf.int64))
        add(resource=self._correct.handle, value=right)
        add(resource=self._loss_sum.handle, value=tf.cast(loss, tf.float64))
        is_first_bad = ~tf.math.is_finite(loss) & (self._first_bad_step < 0)
        assign(self._first_bad_step, tf.where(is_first_bad, self.step, self._first_bad_step))

    def _over_replicas(
        self, gradients: list[tf.Tensor], loss: tf.Tensor, right: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """What the replicas found, added up; and the means of the statistics they moved."""
        statistics = [statistic / self.replicas.count for statistic in self._statistics]
        *sums, loss, right = self.replicas.sum(
            [*gradients, *statistics, loss, tf.cast(right, tf.float32)]
        )
        for variable, mean in zip(self._statistics, sums[len(gradients) :], strict=True):
            assign(variable, mean)
        return sums[: len(gradients)], loss, tf.cast(right, tf.int64)

    def trace(self) -> tf.Graph:
        """Does now what the first step would begin with: turning `train_step` into a graph."""
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

    @property
    def steps_done(self) -> int:
        """The number in `step`, which each replica has a copy of."""
        return int(self.step.numpy())

    def means(self, reset: bool = False) -> tuple[float, float]:
        """Mean loss and accuracy over the steps since the last reset."""
        step = self.steps_done
        steps = max(step - self._means_since, 1)
        loss = float(self._loss_sum.numpy()) / steps
        accuracy = int(self._correct.numpy()) / (steps * self.run.training.batch_size)
        if reset:
            self._loss_sum.assign(0)
            self._correct.assign(0)
            self._means_since = step
        return loss, accuracy

    def watch_next_step(self) -> None:
        """Has `norms` tell of the gradients of the step that comes next."""
        self._watched = self.steps_done + 1, self.optimizer.snapshot()

    def norms(self) -> dict[str, float]:
        """The norms of each block's weights, and of its gradients if the last step was watched."""
        weights = {v.name: v.numpy() for v in self.model.trainable_variables}
        norms = _block_norms("weight_norm", weights)
        if self._watched and self._watched[0] == self.steps_done:
            gradients = self.optimizer.gradients_since(self._watched[1])
            norms |= _block_norms("gradient_norm", gradients)
        self._watched = None
        return norms

    def restore(self, prefix: str) -> None:
        """Goes on from the chief's checkpoint, which other workers need not be able to read."""

        def read() -> str:
            checkpoints.restore(self.checkpoint, prefix)
            return str(self.step.numpy())

        self._means_since = int(self.replicas.from_chief(read))
        self.step.assign(self._means_since)
        self.copy_from_chief()

    def copy_from_chief(self) -> None:
        """Gives every worker the chief's network and momentum."""
        self.replicas.copy_from_chief(
            [*self.model.variables, *self.optimizer.slots.values(), self.data_mean]
        )

    def check_finite(self, ckpt_path: str) -> None:
        """Stops a run whose loss or weights are no longer numbers, before it is saved so."""
        bad_step = int(self._first_bad_step.numpy())
        if bad_step >= 0:
            what = f"the loss was not finite at step {bad_step}"
        elif not all(np.isfinite(v.numpy()).all() for v in self.model.variables):
            # ReLU turns what is not a number into zero, and so may hide it from the loss
            what = f"the weights were no longer finite by step {self.steps_done}"
        else:
            return
        good, _ = checkpoints.newest_intact(ckpt_path)
        rest = f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
        raise UserError(
            f"{what}: training diverged; {rest}. A lower "
            f"--init_lr (it was {self.run.training.init_lr:g}) or --dtype=fp32 usually helps, in "
            "another --ckpt_path or with --clean."
        )


def _block_norms(kind: str, values: dict[str, np.ndarray]) -> dict[str, float]:
    """The Euclidean norms of arrays taken together by the first part of their names."""
    squares: dict[str, float] = {}
    for name, value in values.items():
        tag = f"{kind}/{name.split('/')[0]}"
        squares[tag] = squares.get(tag, 0.0) + float(np.square(value, dtype=np.float64).sum())
    return {tag: math.sqrt(square) for tag, square in squares.items()}


def prepare_run(
    given: dict[str, Any],
    ckpt_path: str | None,
    data: Dataset | None = None,
    train_epochs: float | None = None,
    pretrained: str | None = None,
) -> tuple[RunConfig, str | None]:
    """The run in `ckpt_path` and its newest intact checkpoint; or a new run from what is given.

    A new run starts from the network of the `pretrained` checkpoint, where one is named. Without
    `data`, a run uses its own data set in its default folder.
    """
    if data:
        given = {**given, "dataset": data.name}
    newest, passed_over = checkpoints.newest_intact(ckpt_path) if ckpt_path else (None, [])
    if newest:
        for reason in passed_over:
            print(f"Passed over: {reason}", file=sys.stderr, flush=True)
        if pretrained:
            print(f"The run in {ckpt_path} goes on; {pretrained} is not used.", flush=True)
        run, _ = checkpoints.read_run(newest)
        if given.get("fine_tune") and not run.training.fine_tune:
            raise UserError(
                f"--fine_tune does not match the run in {ckpt_path}, which trains all layers. To "
                "fine-tune its network, start a new run: "
                f"--pretrained_model_checkpoint_path={ckpt_path} --fine_tune, with another "
                "--ckpt_path."
            )
        refuse_contradictions(run, given, newest)
        if checkpoints.is_network_alone(newest):
            raise UserError(
                f"{newest} is a network without the rest of its training, which so cannot go on: "
                f"start a new one from it with --pretrained_model_checkpoint_path={ckpt_path}, and "
                "name another --ckpt_path."
            )
    elif passed_over:
        raise UserError(
            f"{ckpt_path} holds no intact checkpoint to go on from: {passed_over[0]} "
            "(--clean starts over.)"
        )
    else:
        run = _new_run(given, data or dataset.find(None, given.get("dataset")), pretrained)
    data = data or dataset.find(None, run.data.dataset)
    examples = data.count_without_holdout(run.data.holdout)
    length = {}
    if train_epochs:
        steps = train_epochs * examples / run.training.batch_size
        length["num_iterations"] = math.ceil(min(max(steps, 1), MAX_ITERATIONS + 1))
    if newest:
        refuse_contradictions(run, length, newest)
        return run, newest
    return dataclasses.replace(run, training=with_given(run.training, length)), None


def _new_run(given: dict[str, Any], data: Dataset, pretrained: str | None) -> RunConfig:
    model = ModelConfig()
    if pretrained:
        pretrained = checkpoints.find(pretrained)
        origin, _ = checkpoints.read_run(pretrained)
        network = {n: given.get(n) for n in dataclasses.asdict(model) if n != "batch_norm_decay"}
        named_by = "--pretrained_model_checkpoint_path"
        refuse_contradictions(origin, network, pretrained, named_by)
        model = dataclasses.replace(origin.model, batch_norm_decay=model.batch_norm_decay)
    for name in ("fine_tune", "recompute_mean"):
        if given.get(name) and not pretrained:
            raise UserError(
                f"--{name} is for a network that was trained before: name its checkpoint with "
                "--pretrained_model_checkpoint_path."
            )
    described = data.describe(given.get("coarse_labels") or False)
    return RunConfig(
        with_given(dataclasses.replace(model, num_classes=len(described.class_names)), given),
        with_given(described, given),
        training_config({**given, "pretrained": pretrained}),
    )


def train(
    run: RunConfig,
    options: Options,
    data: Dataset | None = None,
    resume_from: str | None = None,
    replicas: Replicas | None = None,
) -> Outcome:
    """Trains a run to its end, from its beginning or from a checkpoint of its own.

    Without `data`, it uses its own data set in its default folder. Where several workers train
    together, the chief alone reads and writes checkpoints.
    """
    replicas = replicas or Replicas()
    chief = replicas.is_chief
    say = print if chief else lambda line: None
    last_step = min(run.training.num_iterations, options.max_train_steps or 2**62)
    data = data or dataset.find(None, run.data.dataset)
    trainer, images = _ready(run, options, data, resume_from, replicas, last_step)
    step = trainer.steps_done
    if step >= last_step:
        reason = "finished" if step >= run.training.num_iterations else "past --max_train_steps"
        say(f"This run is {reason}: {resume_from} is step {step} of {run.training.num_iterations}.")
        return Outcome(step, resume_from)

    evaluate = Evaluator(trainer.model) if options.epochs_between_evals and chief else None
    steps_per_epoch = len(images.train.labels) / run.training.batch_size
    metrics = None

    def reaches_threshold() -> bool:
        reached = metrics and options.stop_threshold and metrics.accuracy >= options.stop_threshold
        return bool(replicas.largest(bool(reached)))

    if resume_from and options.epochs_between_evals and options.stop_threshold:
        metrics = evaluate(images.scored) if evaluate else None
        if reaches_threshold():
            say(f"This run has reached --stop_threshold: {resume_from} is step {step}.")
            return Outcome(step, resume_from, metrics)
    say(_opening(run, options, trainer, len(images.train.labels)))
    say(f"Going on from {resume_from}, step {step}." if resume_from else _beginning(run))
    if options.profile_steps and not step < options.profile_steps[0] <= last_step:
        say(f"Nothing is profiled: --profile_steps begins outside of {step + 1} to {last_step}.")

    def check() -> None:
        trainer.check_finite(options.ckpt_path)

    def save() -> str:
        return checkpoints.save(
            trainer.checkpoint, options.ckpt_path, trainer.steps_done, options.max_ckpts
        )

    saved, first_step, stopped_by = resume_from, step, 0
    with (
        StopSignals() as stop,
        (Progress if chief else NoProgress)(
            *(run, first_step, last_step, steps_per_epoch),
            log_path=options.train_log_path,
            profile_steps=options.profile_steps,
        ) as progress,
        _saving_unheard(check, save),
    ):
        pipeline = training_batches(
            images.train,
            trainer.model.image_mean.numpy(),
            run.training.batch_size,
            run.training.seed,
            first_step,
            last_step - first_step,
            run.training.alternate_flips,
            run.training.cutout,
            (replicas.worker, replicas.num_workers),
        )
        batches = iter(pipeline)
        agree_every = 1 if replicas.num_workers == 1 else STEPS_BETWEEN_AGREEMENTS
        pauses = [options.log_per_iterations, options.save_per_iterations]
        pauses += [agree_every] if agree_every > 1 else []
        evaluation_due = 0  # never
        while True:
            if options.epochs_between_evals and evaluation_due <= step:
                between = options.epochs_between_evals * len(images.train.labels)
                evaluation_due = _next_end(step, between, run.training.batch_size)
            stations = [last_step, evaluation_due, *progress.stations]
            ahead = [every - step % every for every in pauses]
            ahead += [station - step for station in stations if station > step]
            count = min(options.steps_per_call, *ahead)
            if (step + count) % options.log_per_iterations == 0:
                # the last step before a log is taken alone, and its gradients are watched
                if count > 1:
                    count -= 1
                elif chief:
                    trainer.watch_next_step()
            with progress.taking(step):
                trainer.train_steps(batches, count)
            step += count
            if step % agree_every == 0:
                stopped_by = replicas.largest(stop.signal or 0)
            ending = step == last_step or bool(stopped_by)
            rate = trainer.learning_rates[step - 1]
            if progress.wants_update():
                progress.update(step, *trainer.means(), rate)
            logging = ending or step % options.log_per_iterations == 0
            saving = ending or step % options.save_per_iterations == 0
            evaluating = options.epochs_between_evals and step in (evaluation_due, last_step)
            if logging or saving or evaluating:
                check()
            if logging:
                progress.log_training(step, *trainer.means(reset=True), rate, trainer.norms)
                progress.show_once(
                    step,
                    trainer.trace,
                    lambda: next(iter(pipeline))[0] + trainer.model.image_mean,
                )
            if evaluating:
                if evaluate:
                    metrics = evaluate(images.scored)
                    progress.log_evaluation(step, images.scored_split, metrics)
                if reaches_threshold():
                    progress.write(f"--stop_threshold={options.stop_threshold:g} is reached.")
                    ending = True
            if chief and (ending or saving):
                saved = save()
            if ending:
                break
        summary = progress.finish(step, saved, images.scored and images.scored.images)
    return Outcome(step, saved, metrics, stopped_by or None, summary)


@contextlib.contextmanager
def _saving_unheard(check: Callable[[], None], save: Callable[[], str]) -> Iterator[None]:
    """Saves where nobody reads what is printed any more: the terminal, or the `| tee`, has gone."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            check()
            print(f"Nobody reads the output any more; saved as {save()}.", file=sys.stderr)
        raise


def _next_end(step: int, images: int, batch_size: int) -> int:
    """The first step after this one in which so many images, or a multiple of them, are through."""
    done = step * batch_size // images
    return -(-(done + 1) * images // batch_size)


def _ready(
    run: RunConfig,
    options: Options,
    data: Dataset,
    resume_from: str | None,
    replicas: Replicas,
    last_step: int,
) -> tuple[Trainer, splits.RunImages]:
    """The network as the training begins or goes on with it, and its images."""
    with ThreadPoolExecutor(1) as reader:
        # The files are read while the network is built and traced.
        reading = reader.submit(splits.load_run, data, run.data, bool(options.epochs_between_evals))
        trainer = Trainer(
            run,
            options.data_format,
            options.dtype,
            options.loss_scale,
            options.jit_compile,
            replicas,
            options.sync_batch_norm,
        )
        if resume_from:
            trainer.restore(resume_from)
        elif run.training.pretrained:
            if replicas.is_chief:
                checkpoints.restore_pretrained(trainer.model, run.training.pretrained)
            trainer.copy_from_chief()
        if trainer.steps_done < last_step:
            trainer.trace()
        images = reading.result()
    if replicas.num_workers > 1:
        replicas.refuse_differences({"SHA-256 of its training images": images.train.digest()})
    if not resume_from:
        trainer.data_mean.assign(images.mean)
    elif not np.array_equal(images.mean, trainer.data_mean.numpy()):
        raise UserError(
            f"{data.folder or data.name} has other training images than {resume_from}: their mean "
            "differs. Use the run's data, or another --ckpt_path."
        )
    return trainer, images


def _opening(run: RunConfig, options: Options, trainer: Trainer, num_images: int) -> str:
    parameters = f"{_count(trainer.model.trainable_variables):,} parameters"
    what = f"Training {run.model.name} ({parameters})"
    if run.training.fine_tune:
        trained = f"{_count(trainer.optimizer.variables):,} of its {parameters}"
        what = f"Fine-tuning the final layer of {run.model.name} ({trained})"
    note = ""
    if run.model.num_layers in IMAGENET_DEPTHS:
        note = (
            f"This network is for 32x32 images. ImageNet's ResNet-{run.model.num_layers} is "
            "another.\n"
        )
    return (
        f"{note}{what} on {num_images:,} images ({run.data.dataset}):\n"
        f"{run.training.num_iterations} steps of {run.training.batch_size} images"
        f"{trainer.replicas.describe()}, recipe {run.training.recipe}, {options.dtype}, "
        f"{options.data_format}.\nCheckpoints go to {options.ckpt_path}."
    )


def _count(variables: Sequence[tf.Variable]) -> int:
    return sum(np.prod(v.shape) for v in variables)


def _beginning(run: RunConfig) -> str:
    if not run.training.pretrained:
        return "Starting at step 0."
    mean = "computed from the new images" if run.training.recompute_mean else "restored too"
    return (
        f"Starting at step 0 from {run.training.pretrained}: restored all of the network but the "
        f"final layer, which starts at random with {run.model.num_classes} classes; the mean image "
        f"is {mean}."
    )


class StopSignals:
    """While entered, Ctrl-C, SIGTERM and a closed terminal ask for a tidy end; a second insists."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        # of a closed terminal, the system tells and then the shell: that is not to insist
        if self.signal is not None and number != signal.SIGHUP:
            raise SystemExit(128 + number)
        self.signal = self.signal or number
