"""Shows a run: a live line on a terminal, plain lines elsewhere, and TensorBoard's files."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from cifar10_resnet.config import RunConfig
from cifar10_resnet.device import slowness
from cifar10_resnet.errors import UserError
from cifar10_resnet.evaluation.metrics import Metrics
from cifar10_resnet.options import Options
from cifar10_resnet.terminal import LiveLine, duration, fitting
from cifar10_resnet.training.summaries import Summaries
from cifar10_resnet.training.trainer import Trainer

# Networks for ImageNet have these depths too.
IMAGENET_DEPTHS = (50, 152, 200)
# The table at the end of a run has the mean training loss over its last logs: this many steps.
STEPS_OF_RESULT = 200


class Silent:
    """Prints and records nothing. Used by every worker except the chief."""

    def __init__(self, *values: object):
        pass

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def taking(self, step: int) -> contextlib.AbstractContextManager:
        """Returns the context for the steps that follow this one."""
        return contextlib.nullcontext()

    def is_due(self) -> bool:
        """Returns whether the live line is due. Asked every step, so no step waits for it."""
        return False

    def update(self, step: int, loss: float, accuracy: float, learning_rate: float) -> None:
        """Moves the live line."""

    def log_training(self, step: int, *values: object) -> None:
        """Records the mean training loss and accuracy since the last log."""

    def show_once(self, step: int, *values: object) -> None:
        """Records the run's settings, graph and images, once."""

    def log_evaluation(self, step: int, *values: object) -> None:
        """Records the results of an evaluation."""

    def write(self, line: str) -> None:
        """Prints a line."""

    def finish(self, step: int, *values: object) -> dict[str, str]:
        """Returns the rows of the table at the end of a run."""
        return {}


class Progress(Silent):
    """The display of a run from `first_step` on. As a context, it leaves the terminal tidy."""

    def __init__(
        self,
        run: RunConfig,
        first_step: int,
        last_step: int,
        steps_per_epoch: float,
        log_path: str,
        profile_steps: tuple[int, int] | None = None,
    ):
        self._run, self._log_path = run, log_path
        self._last_step = last_step
        self._steps_per_epoch, self._batch_size = steps_per_epoch, run.training.batch_size
        self._summaries = Summaries(log_path)
        self._has_shown_run = False
        self._profile_steps, self._profiling = profile_steps, False
        self._trained: list[tuple[float, float, int]] = []  # last logs: loss, accuracy, steps
        self._evaluated: tuple[int, str, Metrics] | None = None  # its step, split and metrics
        self._started = self._logged_at = time.monotonic()
        self._first_step = self._logged_step = first_step
        # Only a terminal gets the live line. A pipe or a file gets lines that grep can read.
        self._line = LiveLine()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._line.close()
        self._stop_profiling()
        self._summaries.close()

    def taking(self, step: int) -> contextlib.AbstractContextManager:
        """Returns the context for the steps that follow this one. Starts and stops the profile."""
        if self._profile_steps is None:
            return contextlib.nullcontext()
        first, last = self._profile_steps
        if step == last:
            self._stop_profiling()
        elif step == first - 1:
            tf.profiler.experimental.start(self._log_path)
            self._profiling = True
        return tf.profiler.experimental.Trace("train", step_num=step + 1, _r=1)

    def _stop_profiling(self) -> None:
        if self._profiling:
            tf.profiler.experimental.stop()
            self._profiling = False
            self.write(f'The profile is in {self._log_path}: see TensorBoard, "Profile".')

    def is_due(self) -> bool:
        """Returns whether the live line is due. Asked every step, so no step waits for it."""
        return self._line.is_due()

    def update(self, step: int, loss: float, accuracy: float, learning_rate: float) -> None:
        """Moves the live line."""
        rate = self._rate(self._first_step, self._started, step)
        self._line.show(
            step / self._last_step,
            f"{step}/{self._last_step}",
            f"left {self._left(step, rate)}",
            f"loss {loss:.3f}",
            f"accuracy {accuracy:.1%}",
            f"{rate:,.0f} images/s",
            f"epoch {step / self._steps_per_epoch:.2f}",
            f"lr {learning_rate:.4g}",
        )

    def log_training(
        self,
        step: int,
        loss: float,
        accuracy: float,
        learning_rate: float,
        more: Callable[[], dict[str, float]],
    ) -> None:
        """Records the mean training loss and accuracy since the last log."""
        rate = self._rate(self._logged_step, self._logged_at, step)
        if np.isfinite(loss):  # A dynamic loss scale may have skipped all steps since the last log.
            self._trained.append((loss, accuracy, step - self._logged_step))
        while sum(steps for *_, steps in self._trained[1:]) >= STEPS_OF_RESULT:
            del self._trained[0]
        self._logged_step, self._logged_at = step, time.monotonic()
        parts = [
            f"step {step}/{self._last_step}",
            f"left {self._left(step, rate)}",
            f"loss {loss:.4f}",
            f"accuracy {accuracy:.1%}",
            f"images/s {rate:.0f}",
            f"epoch {step / self._steps_per_epoch:.2f}",
            f"lr {learning_rate:.4g}",
        ]
        room = self._line.columns if self._line.is_live else sys.maxsize
        self.write(fitting(parts, " ", room))
        values = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": learning_rate,
            "images_per_second": rate,
            "epoch": step / self._steps_per_epoch,
        }
        if self._summaries.are_written:
            self._summaries.scalars("train", step, values | more())

    def show_once(
        self, step: int, graph: Callable[[], tf.Graph], images: Callable[[], np.ndarray]
    ) -> None:
        """Records the run's settings, graph and images, once."""
        if self._summaries.are_written and not self._has_shown_run:
            self._summaries.run(step, self._run, graph(), images())
            self._has_shown_run = True

    def log_evaluation(self, step: int, split: str, metrics: Metrics) -> None:
        """Records the results of an evaluation."""
        self._evaluated = step, split, metrics
        self.write(
            f"step {step}/{self._last_step} evaluated on {split}: loss {metrics.loss:.4f} "
            f"accuracy {metrics.accuracy:.2%}"
        )
        values = {"loss": metrics.loss, "accuracy": metrics.accuracy}
        self._summaries.scalars("eval", step, values)
        self._summaries.confusion_matrix(step, metrics, self._run.data.class_names)

    def finish(self, step: int, saved: str, images: np.ndarray | None) -> dict[str, str]:
        """Records the final results, and returns the rows of the table at the end of a run.

        `images` are the evaluated images.
        """
        rows, results = {}, {}
        if self._trained:
            losses, accuracies, steps = zip(*self._trained, strict=True)
            loss, accuracy = (np.average(v, weights=steps) for v in (losses, accuracies))
            results = {"train_loss": loss, "train_accuracy": accuracy}
        if self._evaluated:
            at, split, metrics = self._evaluated
            best, best_at = self._best_evaluation(step)
            rows["best accuracy"] = f"{best:.2%} on {split} images, step {best_at}"
            rows["last accuracy"] = f"{metrics.accuracy:.2%} on {split} images, step {at}"
            results |= {"loss": metrics.loss, "accuracy": metrics.accuracy, "best_accuracy": best}
            self._summaries.mistakes(at, images, metrics, self._run.data.class_names)
        self._summaries.results(step, results)
        if self._trained:
            rows["training"] = (
                f"loss {loss:.4f}, accuracy {accuracy:.2%} on augmented images, "
                f"last {sum(steps)} steps"
            )
        seconds = time.monotonic() - self._started
        rows["time"] = f"{duration(seconds)} for {step - self._first_step} steps"
        rows["saved as"] = saved
        if self._summaries.are_written:
            rows["curves"] = f"tensorboard --logdir {shlex.quote(self._log_path)}"
        return rows

    def _best_evaluation(self, last_step: int) -> tuple[float, int]:
        """Returns the best accuracy of the whole run, with earlier starts, and its step."""
        step, _, metrics = self._evaluated
        found = [(metrics.accuracy, step)]
        # A damaged file or a missing TensorBoard must not make the run fail at the very end.
        with contextlib.suppress(UserError, ModuleNotFoundError):
            from cifar10_resnet.training.history import read_history

            for row in read_history(self._log_path):
                if "eval_accuracy" in row and row["step"] <= last_step:
                    found.append((row["eval_accuracy"], row["step"]))
        return max(found)

    def write(self, line: str) -> None:
        """Prints a line, above the live line if there is one."""
        self._line.write(line)
        sys.stdout.flush()

    def _rate(self, since_step: int, since: float, step: int) -> float:
        return (step - since_step) * self._batch_size / max(time.monotonic() - since, 1e-9)

    def _left(self, step: int, rate: float) -> str:
        return duration((self._last_step - step) * self._batch_size / rate)


def opening(
    run: RunConfig,
    options: Options,
    trainer: Trainer,
    num_images: int,
    last_step: int,
    resume_from: str | None,
) -> str:
    """Returns the lines that are printed before the first step."""
    parameters = f"{_count(trainer.model.trainable_variables):,} parameters"
    what = f"Training {run.model.name} ({parameters})"
    if run.training.fine_tune:
        trained = f"{_count(trainer.optimizer.variables):,} of its {parameters}"
        what = f"Fine-tuning the final layer of {run.model.name} ({trained})"
    lines = [
        f"{what} on {num_images:,} images ({run.data.title}):",
        f"{run.training.num_iterations:,} steps of {run.training.batch_size} images"
        f"{trainer.replicas.describe()}, recipe {run.training.recipe}, {options.dtype}, "
        f"{options.data_format}{', native kernels' if trainer.is_native else ''}"
        f"{', deterministic operations' if options.deterministic != 'off' else ''}.",
        f"Checkpoints go to {options.ckpt_path}.",
    ]
    if run.model.num_layers in IMAGENET_DEPTHS:
        depth = run.model.num_layers
        lines.insert(0, f"This network is for 32x32 images. ImageNet's ResNet-{depth} is another.")
    if slow := slowness(options.dtype, options.device):
        lines.append(slow)
    step = trainer.steps_done
    lines.append(f"Resuming from {resume_from} at step {step}." if resume_from else _beginning(run))
    if options.profile_steps and not step < options.profile_steps[0] <= last_step:
        steps = f"{step + 1:,} to {last_step:,}"
        lines.append(f"--profile_steps is ignored: this start runs steps {steps}.")
    return "\n".join(lines)


def _count(variables: Sequence[tf.Variable]) -> int:
    return sum(np.prod(v.shape) for v in variables)


def _beginning(run: RunConfig) -> str:
    """Returns what a new run starts from."""
    if not run.training.pretrained:
        return "Starting at step 0."
    mean = "computed from the new images" if run.training.recompute_mean else "restored too"
    return (
        f"Starting at step 0 from {run.training.pretrained}: restored all of the network but the "
        f"final layer, which starts at random with {run.model.num_classes} classes; the mean image "
        f"is {mean}."
    )
