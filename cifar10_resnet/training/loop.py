"""Runs the training loop: takes steps, and does what is due after each, until the run ends."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

from cifar10_resnet import checkpoints
from cifar10_resnet.config import RunConfig, TrainingConfig
from cifar10_resnet.data.splits import RunImages
from cifar10_resnet.errors import UserError
from cifar10_resnet.evaluation.evaluator import Evaluator
from cifar10_resnet.evaluation.metrics import Metrics
from cifar10_resnet.options import Options
from cifar10_resnet.storage import LOCK, HeldLock
from cifar10_resnet.training.progress import Silent
from cifar10_resnet.training.signals import StopSignals
from cifar10_resnet.training.trainer import Trainer

# After this many steps, several workers check whether one of them received a signal to stop.
STEPS_BETWEEN_AGREEMENTS = 10
BATCHES_MEASURED = 50  # at most, for the statistics of averaged weights


@dataclass(frozen=True)
class Outcome:
    """The end of a run: its last step, its checkpoint, and the signal that stopped it, if any.

    `summary` contains the rows of the table to print.
    """

    step: int
    checkpoint: str
    metrics: Metrics | None = None
    stopped_by: int | None = None
    summary: dict[str, str] = field(default_factory=dict)


# --- What is due ----------------------------------------------------------------------------------


def every(count: int) -> Callable[[int], int]:
    """Returns the function from a step to the next one that `count` divides."""
    return lambda step: step + count - step % count


def next_end(step: int, images: int, batch_size: int) -> int:
    """Returns the first later step that completes a multiple of `images` images."""
    done = step * batch_size // images
    return -(-(done + 1) * images // batch_size)


def next_average(training: TrainingConfig, images: int, step: int) -> int:
    """Returns the next step to average: the end of one of the last epochs, or the last step."""
    length, size = training.num_iterations, training.batch_size
    first = length - int(training.average_weights * length)
    return min(next_end(max(step, first), images, size), length)


class Agenda:
    """The duties of a run. Each is a function from a step to the next step when it is due."""

    def __init__(self, run: RunConfig, options: Options, num_images: int, num_workers: int = 1):
        self.last = options.last_step(run)
        self._steps_per_call = options.steps_per_call
        log = every(options.steps_per_log(run))
        self._next = {
            "log": log,
            # It is due one step before a log, because the log shows the last step's gradients.
            "watch": lambda step: log(step + 1) - 1,
            "save": every(options.save_per_iterations),
            # One worker checks for a signal after every call, several workers less often.
            "agree": every(STEPS_BETWEEN_AGREEMENTS if num_workers > 1 else 1),
            "end": lambda step: self.last,
        }
        if options.epochs_between_evals:
            between = options.epochs_between_evals * num_images
            size = run.training.batch_size
            self._next["evaluate"] = lambda step: min(next_end(step, between, size), self.last)
        if run.training.average_weights:
            self._next["average"] = functools.partial(next_average, run.training, num_images)
        if options.profile_steps:
            first, last = options.profile_steps
            self._next["profile"] = lambda step: first - 1 if step < first - 1 else last
        # In a short epoch, the statistics of fewer batches are enough.
        self.batches_measured = min(
            BATCHES_MEASURED, math.ceil(num_images / run.training.batch_size)
        )
        # These duties do not interrupt a call of several steps.
        self._waits = {"agree"} if num_workers == 1 else set()

    def due(self, step: int) -> set[str]:
        """Returns the duties after a step. The last step is logged and saved, too."""
        due = {name for name, after in self._next.items() if after(step - 1) == step}
        return due | {"log", "save"} if "end" in due else due

    def until_next(self, step: int) -> int:
        """Returns how many steps to take in one call without a duty in between."""
        duties = (after(step) for name, after in self._next.items() if name not in self._waits)
        return min(self._steps_per_call, *(at - step for at in duties if at > step))


# --- The loop -------------------------------------------------------------------------------------


def reason_to_end(
    trainer: Trainer, agenda: Agenda, evaluations: "Evaluations", resume_from: str | None
) -> str | None:
    """Returns why there is no step left to take, or None if there is one."""
    step, length = trainer.steps_done, trainer.run.training.num_iterations
    if step >= agenda.last:
        place = f"step {step:,} of {length:,} ({resume_from})"
        if step < length:
            return f"This run is past --max_train_steps: {place}. Remove the flag to resume it."
        return (
            f"This run is finished: {place}. Start another with a new --ckpt_path, or with --clean."
        )
    if resume_from and evaluations.have_threshold and evaluations.reach_threshold():
        return f"This run has reached --stop_threshold: step {step:,} ({resume_from})."
    return None


class Evaluations:
    """The evaluations of a run while it trains. The chief evaluates for all workers."""

    def __init__(self, trainer: Trainer, options: Options, images: RunImages):
        self._trainer, self._replicas, self._images = trainer, trainer.replicas, images
        self._are_made = options.epochs_between_evals and trainer.replicas.is_chief
        self._evaluate: Evaluator | None = None
        self.threshold = options.stop_threshold
        self.have_threshold = bool(options.epochs_between_evals and options.stop_threshold)
        self.split, self.metrics = images.scored_split, None

    @property
    def scored(self) -> np.ndarray | None:
        """Returns the images that are evaluated, if there are any."""
        return self._images.scored and self._images.scored.images

    def reach_threshold(self) -> bool:
        """Evaluates, and returns on all workers whether --stop_threshold is reached."""
        if self._are_made:
            network = self._trainer.network
            if self._evaluate is None or self._evaluate.model is not network:
                self._evaluate = Evaluator(network)
            self.metrics = self._evaluate(self._images.scored)
        reached = self.metrics and self.threshold and self.metrics.accuracy >= self.threshold
        return bool(self._replicas.largest(bool(reached)))


class Saving:
    """The two parts of saving a run: the checks, and the checkpoint."""

    def __init__(self, trainer: Trainer, options: Options, lock: HeldLock | None = None):
        self._trainer, self._options, self._lock = trainer, options, lock

    def check(self) -> None:
        """Refuses weights and losses that are not finite, and a run folder that was moved."""
        self._trainer.check_finite(self._options.ckpt_path)
        if self._lock and not self._lock.is_in_place():
            raise self._leave(self._options.ckpt_path)

    def _leave(self, folder: str) -> UserError:
        """Saves where the run folder is now, and returns why training ends."""
        place = self._lock.folder()
        if place:
            again = f"To resume, add --ckpt_path={place} to the same command."
            return UserError(
                f"{folder} was moved during training. Saved {self.save(place)}. {again}"
            )
        if self._lock.is_replaced():
            why = "was deleted during training, and another trainer uses the new folder"
            step = f"This run ended at step {self._trainer.steps_done:,} without saving."
            return UserError(f"{folder} {why}. {step} Use a separate --ckpt_path for each run.")
        lock = os.path.join(folder, LOCK)
        saved = f"Saved {self.save()}. To resume, run the same command."
        return UserError(f"{lock} was deleted during training. {saved}")

    def save(self, folder: str | None = None) -> str:
        """Saves a checkpoint and returns its path."""
        trainer, options = self._trainer, self._options
        return checkpoints.save(
            *(trainer.checkpoint, folder or options.ckpt_path),
            *(trainer.steps_done, options.max_ckpts),
        )


def train(
    trainer: Trainer,
    batches_from: Callable[..., tf.data.Dataset],
    agenda: Agenda,
    evaluations: Evaluations,
    saving: Saving,
    progress: Silent,
    stop: StopSignals,
) -> Outcome:
    """Takes steps, and does what is due after each. Returns how the run ended.

    `batches_from` returns the pipeline of the run's batches from a step on: this worker's `share`.
    """
    replicas, step, stopped_by, saved = trainer.replicas, trainer.steps_done, 0, ""
    pipeline = batches_from(step)
    batches = trainer.batches_of(pipeline)
    due = agenda.due(step)
    while True:
        if "watch" in due and replicas.is_chief:
            trainer.watch_next_step()
        with progress.taking(step):
            count = agenda.until_next(step)
            trainer.train_steps(batches, count)
        step += count
        due = agenda.due(step)
        if "agree" in due:
            stopped_by = replicas.largest(stop.signal or 0)
        if stopped_by:
            due |= {"log", "save", "end"}
        rate = trainer.learning_rates[step - 1]
        if progress.is_due():
            progress.update(step, *trainer.means(), rate)
        if due & {"log", "save", "evaluate", "average"}:
            saving.check()
        if "average" in due:
            whole = {"share": (0, 1), "num_steps": agenda.batches_measured}  # on all workers
            trainer.add_to_average(batches_from(step, **whole))
        if "evaluate" in due and evaluations.have_threshold:
            due.add("log")  # before an evaluation that may end the run
        if "log" in due:
            progress.log_training(step, *trainer.means(reset=True), rate, trainer.summary)
            progress.show_once(step, trainer.trace, lambda: trainer.images_of(next(iter(pipeline))))
        if "evaluate" in due:
            reached = evaluations.reach_threshold()
            progress.log_evaluation(step, evaluations.split, evaluations.metrics)
            if reached:
                progress.write(f"--stop_threshold={evaluations.threshold:g} is reached.")
                due |= {"save", "end"}
        if "save" in due and replicas.is_chief:
            saved = saving.save()
        if "end" in due:
            summary = progress.finish(step, saved, evaluations.scored)
            return Outcome(step, saved, evaluations.metrics, stopped_by or None, summary)
