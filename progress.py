"""What a training shows: a live line on a terminal, plain lines elsewhere, TensorBoard."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import tensorflow as tf
from tqdm import tqdm

from errors import UserError, reason_of
from evaluation import Metrics

WRITERS = ("train", "eval")


class Progress:
    """Shows a training from `first_step` on. A context manager: it leaves the terminal tidy."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        steps_per_epoch: float,
        batch_size: int,
        log_path: str,
    ):
        self._last_step = last_step
        self._steps_per_epoch, self._batch_size = steps_per_epoch, batch_size
        self._log_path = log_path
        with self._writing():
            self._writers = {
                name: tf.summary.create_file_writer(os.path.join(log_path, name))
                for name in WRITERS
            }
        self._started = self._logged_at = self._shown_at = time.monotonic()
        self._first_step = self._logged_step = first_step
        # A pipe or a file gets lines that grep can read; only a terminal gets the moving one.
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
            unit="step",
            bar_format="{percentage:3.0f}%|{bar:20}| {n}/{total}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        with self._writing():
            for writer in self._writers.values():
                writer.close()

    def wants_update(self) -> bool:
        """Whether the live line is due: asked every step, so that the step itself never waits."""
        return not self._bar.disable and time.monotonic() - self._shown_at > 0.5

    def update(self, step: int, loss: float, accuracy: float, learning_rate: float) -> None:
        """Moves the live line."""
        self._shown_at = time.monotonic()
        rate = self._rate(self._first_step, self._started, step)
        self._bar.set_postfix_str(
            f"epoch {step / self._steps_per_epoch:.2f}, loss {loss:.4f}, accuracy {accuracy:.4f}, "
            f"lr {learning_rate:.4g}, {rate:,.0f} images/s, left {self._left(step, rate)}",
            refresh=False,
        )
        # Not tqdm's own `update` and `remaining`: they go by the clock on the wall, and stand still
        # for an hour where that is put back by one.
        self._bar.n = step
        self._bar.refresh()

    def log_training(self, step: int, loss: float, accuracy: float, learning_rate: float) -> None:
        """Writes down the training's mean loss and accuracy since the last time."""
        rate = self._rate(self._logged_step, self._logged_at, step)
        self._logged_step, self._logged_at = step, time.monotonic()
        self.write(
            f"step {step}/{self._last_step} epoch {step / self._steps_per_epoch:.2f} "
            f"loss {loss:.4f} accuracy {accuracy:.4f} lr {learning_rate:.5g} "
            f"images/s {rate:.0f} left {self._left(step, rate)}"
        )
        values = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": learning_rate,
            "images_per_second": rate,
            "epoch": step / self._steps_per_epoch,
        }
        self._summarise("train", step, values)

    def log_evaluation(self, step: int, split: str, metrics: Metrics) -> None:
        """Writes down an evaluation made while training."""
        self.write(
            f"step {step}/{self._last_step} evaluated on {split}: loss {metrics.loss:.4f} "
            f"accuracy {metrics.accuracy:.4f}"
        )
        self._summarise("eval", step, {"loss": metrics.loss, "accuracy": metrics.accuracy})

    def write(self, line: str) -> None:
        """Prints a line, above the live one where there is one."""
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def elapsed(self) -> str:
        return duration(time.monotonic() - self._started)

    def _rate(self, since_step: int, since: float, step: int) -> float:
        return (step - since_step) * self._batch_size / max(time.monotonic() - since, 1e-9)

    def _left(self, step: int, rate: float) -> str:
        return duration((self._last_step - step) * self._batch_size / rate)

    def _summarise(self, name: str, step: int, values: dict[str, float]) -> None:
        with self._writing():
            with self._writers[name].as_default(step=step):
                for tag, value in values.items():
                    tf.summary.scalar(tag, value)
            self._writers[name].flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except tf.errors.OpError as error:
            raise UserError(
                f"cannot write the summaries in {self._log_path}: {reason_of(error)}; the "
                "checkpoints are as they were: make room or mend that folder, or name another with "
                "--train_log_path, and start the same command again."
            ) from error


def read_history(log_path: str) -> list[dict[str, float]]:
    """What a run's event files say: a row for each step at which something was written.

    Columns are named after writer and tag (`train_loss`, `eval_accuracy`). Where a resumed run
    repeated steps, the later values count.
    """
    # slow to import, and a training has no use for it
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: dict[int, dict[str, float]] = {}
    for writer in WRITERS:
        events = EventAccumulator(os.path.join(log_path, writer), {"tensors": 0})
        events.Reload()
        for tag in events.Tags()["tensors"]:
            for event in events.Tensors(tag):
                row = rows.setdefault(event.step, {"step": event.step})
                row[f"{writer}_{tag}"] = float(tf.make_ndarray(event.tensor_proto))
    return [rows[step] for step in sorted(rows)]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
