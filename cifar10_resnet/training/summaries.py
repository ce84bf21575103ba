"""Writes TensorBoard's files of a run: curves, images, plots, the graph, the hyperparameters.

Two writers in the run's log folder, `train` and `eval`, use the same tags for the same quantities,
so their curves share plots.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cifar10_resnet import storage
from cifar10_resnet.config import RunConfig
from cifar10_resnet.errors import UserError, reason_of
from cifar10_resnet.evaluation.metrics import Metrics

GRID, GAP = 8, 2  # images per row, and pixels around each
FILE_SUFFIX = ".cifar10-resnet.v2"  # --clean recognises these event files by it.
DPI = 100  # half the resolution of plot files
# These are the columns of TensorBoard's table of runs. The text "run" has all settings.
SETTINGS = ("init_lr", "num_layers", "recipe", "seed", "shortcut_connections")
RESULTS = ("accuracy", "best_accuracy", "loss", "train_accuracy", "train_loss")


class Summaries:
    """The event files of a run. When a method returns, its values are on the disk.

    Without TensorBoard nothing is written, because `tf.summary` needs it. Without Matplotlib there
    are no plots.
    """

    def __init__(self, log_path: str):
        self._log_path = log_path
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._plots = importlib.util.find_spec("matplotlib") is not None
        self.are_written = importlib.util.find_spec("tensorboard") is not None
        if self.are_written:
            storage.make_folder(log_path)  # A folder that cannot be written is refused at once.
        else:
            print("No learning curves are written: TensorBoard is not installed.", flush=True)

    def close(self) -> None:
        """Closes the files."""
        with self._refusing():
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
        """Writes a run's settings and graph, and `images` as the network sees them in training."""
        if not self.are_written:
            return
        # The plugin's `api` needs Keras. A late import does not delay the first step.
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
        self._pixels("train", step, "augmented_images", image_grid(images), text)

    def confusion_matrix(self, step: int, metrics: Metrics, names: Sequence[str]) -> None:
        """Writes the confusion matrix of an evaluation, as a plot."""
        if not self._can_plot():
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
        if not self._can_plot():
            return
        from cifar10_resnet.figures import evaluation, style

        png = style.figure_to_png(evaluation.mistakes_figure(metrics, images, names), DPI)
        text = "The most confident mistakes."
        self._pixels("eval", step, "mistakes", tf.io.decode_png(png), text)

    def results(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the results that TensorBoard shows next to a run's hyperparameters."""
        self.scalars("train", step, {f"result/{name}": value for name, value in values.items()})

    def _can_plot(self) -> bool:
        """Returns whether plots are written. Prints why if Matplotlib exists but cannot start."""
        if self.are_written and self._plots:
            try:
                from cifar10_resnet.figures import style  # noqa: F401
            except UserError as error:
                self._plots = False
                print(f"No plots are written: {error}", flush=True)
        return self.are_written and self._plots

    def _pixels(
        self, writer: str, step: int, tag: str, pixels: np.ndarray | tf.Tensor, description: str
    ) -> None:
        with self._writing(writer, step):
            tf.summary.image(tag, pixels[None], description=description)

    @contextlib.contextmanager
    def _writing(self, writer: str, step: int) -> Iterator[None]:
        """Makes `tf.summary` use this writer in the block, and flushes it to the disk after."""
        with self._refusing(), self._writer(writer).as_default(step):
            yield
            self._writer(writer).flush()

    def _writer(self, name: str) -> tf.summary.SummaryWriter:
        """Returns a writer. Opens it when it is first used, so TensorBoard lists no empty run."""
        if name not in self._writers:
            self._writers[name] = tf.summary.create_file_writer(
                os.path.join(self._log_path, name), filename_suffix=FILE_SUFFIX
            )
        return self._writers[name]

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except tf.errors.OpError as error:
            raise UserError(
                f"{self._log_path} cannot be written: {reason_of(error)}. The checkpoints are "
                "unchanged. Free some space, or use another --train_log_path."
            ) from error


def image_grid(images: np.ndarray) -> np.ndarray:
    """Returns up to 64 images [N, H, W, 3], 0 to 255, in rows of eight and twice as large."""
    images = np.clip(np.rint(images[: GRID * GRID]), 0, 255).astype(np.uint8)
    images = images.repeat(2, axis=1).repeat(2, axis=2)
    missing = -len(images) % GRID
    images = np.pad(images, ((0, missing), (GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)
    rows = images.reshape(-1, GRID, *images.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def _shown(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, tuple) else value
