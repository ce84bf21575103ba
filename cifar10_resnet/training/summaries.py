"""What TensorBoard shows of a run: curves, pictures, the graph, the hyperparameters.

Two writers in the run's log folder, `train` and `eval`, use the same tags for the same quantities,
so that their curves share charts.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cifar10_resnet.config import RunConfig
from cifar10_resnet.errors import UserError, reason_of
from cifar10_resnet.evaluation.metrics import Metrics

GRID, GAP = 8, 2  # pictures a side, and pixels around each
FILE_SUFFIX = ".cifar10-resnet.v2"  # by which --clean knows these event files from others
DPI = 100  # half of what files get
# The columns of TensorBoard's table of runs. The text "run" has all settings.
SETTINGS = ("init_lr", "num_layers", "recipe", "seed", "shortcut_connections")
RESULTS = ("accuracy", "best_accuracy", "loss", "train_accuracy", "train_loss")


class Summaries:
    """Writes a run's event files. Each method leaves on the disk what it was given.

    Without TensorBoard nothing is written, for `tf.summary` needs it; without Matplotlib no plot.
    """

    def __init__(self, log_path: str):
        self._log_path = log_path
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._plots = importlib.util.find_spec("matplotlib") is not None
        if importlib.util.find_spec("tensorboard") is None:
            print("No learning curves are written: TensorBoard is not installed.", flush=True)
            return
        with self._telling():
            self._writers = {
                name: tf.summary.create_file_writer(
                    os.path.join(log_path, name), filename_suffix=FILE_SUFFIX
                )
                for name in ("train", "eval")
            }

    @property
    def are_written(self) -> bool:
        """Whether there are any."""
        return bool(self._writers)

    def close(self) -> None:
        """Closes the files."""
        with self._telling():
            for writer in self._writers.values():
                writer.close()

    def scalars(self, writer: str, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers under their tags."""
        if not self.are_written:
            return
        with self._writing(writer, step):
            for tag, value in values.items():
                tf.summary.scalar(tag, value)

    def run(self, step: int, run: RunConfig, graph: tf.Graph, images: np.ndarray) -> None:
        """What there is to show once of a run: `images` are such as the network learns from."""
        if not self.are_written:
            return
        # not its `api`, which wants Keras, and not before the first step, which need not wait
        from tensorboard.plugins.hparams import summary_v2 as hp

        settings = run.settings()
        rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in settings.items())
        columns = [hp.HParam(name) for name in SETTINGS]
        metrics = [hp.Metric(f"result/{name}", display_name=name) for name in RESULTS]
        with self._writing("train", step):
            tf.summary.text("run", f"| setting | value |\n| --- | --- |\n{rows}")
            tf.summary.graph(graph)
            hp.hparams_config(columns, metrics)
            hp.hparams({name: settings[name] for name in SETTINGS}, trial_id=self._log_path)
        text = "Training images as the network sees them: cropped and flipped at random."
        self._pixels("train", step, "augmented_images", picture_grid(images), text)

    def confusion_matrix(self, step: int, metrics: Metrics, names: Sequence[str]) -> None:
        """Writes the confusion matrix of an evaluation, as a plot."""
        if not (self.are_written and self._plots):
            return
        from cifar10_resnet.figures import evaluation, style

        figure = evaluation.confusion_matrix_figure(metrics.confusion_matrix, names)
        png = style.figure_to_png(figure, DPI)
        text = "Rows: true class. Columns: predicted class."
        self._pixels("eval", step, "confusion_matrix", tf.io.decode_png(png), text)

    def mistakes(
        self, step: int, images: np.ndarray, metrics: Metrics, names: Sequence[str]
    ) -> None:
        """Writes the most confident mistakes of an evaluation, as a plot."""
        if not (self.are_written and self._plots):
            return
        from cifar10_resnet.figures import evaluation, style

        figure = evaluation.mistakes_figure(
            images, metrics.labels, metrics.predictions, metrics.confidences, names
        )
        png = style.figure_to_png(figure, DPI)
        text = "The most confident mistakes."
        self._pixels("eval", step, "mistakes", tf.io.decode_png(png), text)

    def results(self, step: int, values: Mapping[str, float]) -> None:
        """The figures that TensorBoard shows beside a run's hyperparameters."""
        self.scalars("train", step, {f"result/{name}": value for name, value in values.items()})

    def _pixels(
        self, writer: str, step: int, tag: str, pixels: np.ndarray | tf.Tensor, description: str
    ) -> None:
        with self._writing(writer, step):
            tf.summary.image(tag, pixels[None], description=description)

    @contextlib.contextmanager
    def _writing(self, writer: str, step: int) -> Iterator[None]:
        """While entered, what `tf.summary` is given is this writer's; it is on the disk after."""
        with self._telling(), self._writers[writer].as_default(step):
            yield
            self._writers[writer].flush()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except tf.errors.OpError as error:
            raise UserError(
                f"cannot write TensorBoard's files in {self._log_path}: {reason_of(error)}. The "
                "checkpoints are unchanged. Free some space, fix the folder or use another "
                "--train_log_path, and run the same command."
            ) from error


def picture_grid(images: np.ndarray) -> np.ndarray:
    """Pictures [N, H, W, 3] with values from 0 to 255, in rows of eight and twice as large."""
    images = np.clip(np.rint(images[: GRID * GRID]), 0, 255).astype(np.uint8)
    images = images.repeat(2, axis=1).repeat(2, axis=2)
    missing = -len(images) % GRID
    images = np.pad(images, ((0, missing), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)
    rows = images.reshape(-1, GRID, *images.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def _shown(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, tuple) else value
