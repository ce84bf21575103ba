"""Evaluates networks and checkpoints on a set of images."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from cifar10_input import ImageSet
from cifar10_resnet.checkpoints import SavedRun, find, restore_model
from cifar10_resnet.config import refuse_contradictions
from cifar10_resnet.data import dataset, splits
from cifar10_resnet.data.dataset import Dataset
from cifar10_resnet.device import ways
from cifar10_resnet.errors import UserError
from cifar10_resnet.evaluation.metrics import Metrics, Scored
from cifar10_resnet.terminal import LiveLine
from resnet_model import IMAGE_SHAPE, ResNet


class Evaluator:
    """An evaluation of a network, which is traced once and runs any number of times."""

    def __init__(self, model: ResNet, batch_size: int = 500):
        self.model = model
        self.batch_size = batch_size
        self._score = tf.function(self._score_batch, autograph=False).get_concrete_function(
            tf.TensorSpec([None, *IMAGE_SHAPE], tf.uint8), tf.TensorSpec([None], tf.int32)
        )

    def __call__(self, examples: ImageSet) -> Metrics:
        """Evaluates every image exactly once and returns the results."""
        loss, top_5, predictions, confidences = 0.0, 0, [], []
        count = len(examples.labels)
        with LiveLine() as line:
            for start in range(0, count, self.batch_size):
                line.update(start / count, f"evaluating: {start:,} of {count:,} images")
                images, labels = examples.part(slice(start, start + self.batch_size))
                scores = self._score(tf.constant(images), tf.constant(labels))
                batch_loss, batch_top_5, predicted, confidence = (s.numpy() for s in scores)
                loss += float(batch_loss)
                top_5 += int(batch_top_5)
                predictions.append(predicted)
                confidences.append(confidence)
        return Metrics(
            loss / count,
            top_5 / count,
            examples.labels,
            np.concatenate(predictions),
            np.concatenate(confidences),
            self.model.num_classes,
        )

    def _score_batch(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, ...]:
        logits = self.model.logits_of_raw(images)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        in_top_5 = tf.math.in_top_k(labels, logits, min(5, self.model.num_classes))
        return (
            tf.reduce_sum(tf.cast(losses, tf.float64)),
            tf.reduce_sum(tf.cast(in_top_5, tf.int64)),
            tf.argmax(logits, axis=1, output_type=tf.int32),
            tf.reduce_max(tf.nn.softmax(logits), axis=1),
        )


def score_checkpoints(
    checkpoints_of_run: Sequence[SavedRun],
    data: Dataset | None = None,
    split: str = "test",
    data_format: str = "channels_last",
    dtype: str = "fp32",
    batch_size: int = 500,
    given: dict[str, Any] | None = None,
) -> Iterator[Scored]:
    """Yields the results of checkpoints of one run, one after the other.

    Without `data`, it uses the run's own data set in its default folder. Refuses `given` values
    that contradict the checkpoint.
    """
    for saved in checkpoints_of_run:
        refuse_contradictions(saved.run, given or {}, saved.prefix)
    first = checkpoints_of_run[0]
    with ThreadPoolExecutor(1) as reader:
        # The images are read while the network is built and traced.
        reading = reader.submit(_images_for, first, data, split)
        model = ResNet(**first.run.model.arguments(), **ways(data_format, dtype))
        evaluator = Evaluator(model, batch_size)
        examples = reading.result()
    for saved in checkpoints_of_run:
        restore_model(model, saved.prefix)
        metrics = evaluator(examples)
        yield Scored(saved.prefix, saved.step, saved.run, split, metrics, examples.images)


def score_newest(
    directory: str, data: Dataset | None, data_format: str, dtype: str, given: dict[str, Any]
) -> Scored:
    """Evaluates a run's newest checkpoint on its holdout, or on the test images without one."""
    saved = find(directory)
    split = saved.run.data.scored_split
    (scored,) = score_checkpoints([saved], data, split, data_format, dtype, given=given)
    return scored


def _images_for(saved: SavedRun, data: Dataset | None, split: str) -> ImageSet:
    run = saved.run
    if data is None:
        return splits.load_split(dataset.find(None, run.data.dataset), run.data, split)
    # Any data set with the run's classes works.
    found = data.describe(run.data.coarse_labels)
    if found.class_names != run.data.class_names:
        raise UserError(
            f"has images of {_listed(found.class_names)}, but {saved.prefix} was trained on "
            f"{_listed(run.data.class_names)}. Use the data that it was trained on.",
            "path",
            data.folder or data.name,
        )
    return splits.load_split(data, run.data, split)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" … ({len(names)} classes)" if len(names) > 10 else "")
