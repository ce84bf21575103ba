"""CIFAR-10's binary batches as `tf.data`: reading and checking the files, the mean, the batches.

A training batch is a pure function of (seed, step): the order of each epoch, every crop and every
flip come from stateless random functions, so a resumed run sees what an uninterrupted one would
have seen, and starting at any step costs nothing.
"""

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import synthetic_data
from errors import UserError
from run_config import CIFAR10_NAMES, DataConfig

FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
NAMES_FILE = "batches.meta.txt"

SIDE, CHANNELS, PAD = 32, 3, 4
IMAGE_BYTES = SIDE * SIDE * CHANNELS
RECORD_BYTES = 1 + IMAGE_BYTES
SHIFTS = 2 * PAD + 1
ALIGNMENT = 64

# the generated stand-in, where it is made in memory
SYNTHETIC_IMAGES = {"train": 10_000, "test": 2_000}


class ImageSet(NamedTuple):
    """Images as uint8 [N, 32, 32, 3] and their labels as int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def part(self, where: slice) -> "ImageSet":
        return ImageSet(self.images[where], self.labels[where])


def data_folder(path: str) -> str:
    """The folder of `.bin` files that `path` names: itself, or the one inside it."""
    try:
        os.stat(path)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no data at {path}: get it with `python cifar10_download_and_extract.py`, "
            "name its folder with --path, or try the programs on generated pictures with "
            "--use_synthetic_data."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    if not os.path.isdir(path):
        raise UserError(
            f"{path} is a file: --path wants the folder that holds {TRAIN_FILES[0]} … "
            f"{TEST_FILES[0]}, or the folder above it."
        )
    inside = os.path.join(path, FOLDER)
    return inside if os.path.isdir(inside) else path


def class_names(dataset: str, path: str) -> tuple[str, ...]:
    """The names of the classes, from the file beside the batches if there is one."""
    if dataset == "synthetic":
        return synthetic_data.CLASS_NAMES
    file = os.path.join(data_folder(path), NAMES_FILE)
    if not os.path.exists(file):
        return CIFAR10_NAMES
    try:
        with open(file, encoding="utf-8") as lines:
            names = tuple(line.strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names in {file}: {error}.") from error
    if len(names) != len(CIFAR10_NAMES):
        raise UserError(
            f"{file} names {len(names)} classes where CIFAR-10 has {len(CIFAR10_NAMES)}: "
            "this is another data set or a damaged file."
        )
    return names


def check_files(path: str, split: str) -> list[tuple[str, int]]:
    """The files of a split ("train" or "test") with their numbers of records; refuses bad ones."""
    folder = data_folder(path)
    names = {"train": TRAIN_FILES, "test": TEST_FILES}[split]
    return [(file, _count_records(file)) for file in (os.path.join(folder, n) for n in names)]


def _count_records(file: str) -> int:
    if os.path.isdir(file):
        raise UserError(f"{file} is a folder; a file of {RECORD_BYTES}-byte records was expected.")
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise UserError(
                f"{file} is missing: the folder is not a whole CIFAR-10 in binary form; "
                "`python cifar10_download_and_extract.py` gets one."
            ) from error
        raise UserError(f"cannot read {file}: {error.strerror}.") from error
    if size == 0 or size % RECORD_BYTES:
        found = "is empty" if size == 0 else f"has {size:,} bytes"
        raise UserError(
            f"{file} {found}, which is not a whole number of {RECORD_BYTES}-byte records (a label "
            "and 32x32x3 pixels): it is damaged or not a CIFAR-10 batch."
        )
    return size // RECORD_BYTES


def count_images(data: DataConfig, path: str, split: str) -> int:
    """How many images the files of a split ("train" or "test") hold."""
    if data.dataset == "synthetic":
        return SYNTHETIC_IMAGES[split]
    return sum(count for _, count in check_files(path, split))


def read_images(path: str, split: str, num_classes: int = 10) -> ImageSet:
    """Reads all images of a split ("train" or "test") into memory."""
    counts = check_files(path, split)
    total = sum(count for _, count in counts)
    images = _aligned([total, SIDE, SIDE, CHANNELS])
    labels = np.empty([total], np.int32)
    records = tf.data.FixedLengthRecordDataset([file for file, _ in counts], RECORD_BYTES)
    done = 0
    try:
        for batch in records.batch(1000).prefetch(1):
            decoded = tf.io.decode_raw(batch, tf.uint8).numpy()
            part = slice(done, done + len(decoded))
            labels[part] = decoded[:, 0]
            planes = decoded[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE)
            for channel in range(CHANNELS):
                images[part, :, :, channel] = planes[:, channel]
            done += len(decoded)
    except (tf.errors.OpError, ValueError) as error:
        raise UserError(f"cannot read {os.path.dirname(counts[0][0])}: {error}.") from error
    if done != total:
        raise UserError(
            f"{os.path.dirname(counts[0][0])} changed while it was read: {total} records were "
            f"there, {done} could be read."
        )
    _check_labels(labels, counts, num_classes)
    return ImageSet(images, labels)


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """An empty uint8 array that begins where TensorFlow wants its tensors to."""
    size = int(np.prod(shape))
    memory = np.empty([size + ALIGNMENT], np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].reshape(shape)


def _as_tensor(array: np.ndarray) -> tf.Tensor:
    """The array as a tensor: the same memory where that is aligned, else a copy."""
    if array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous and array.flags.writeable:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def _check_labels(labels: np.ndarray, counts: Sequence[tuple[str, int]], num_classes: int) -> None:
    wrong = np.flatnonzero(labels >= num_classes)
    if not wrong.size:
        return
    record = int(wrong[0])
    label = labels[record]
    for file, count in counts:
        if record < count:
            raise UserError(
                f"{file} has label {label} in record {record} (byte {record * RECORD_BYTES:,}); "
                f"labels from 0 to {num_classes - 1} were expected: it is damaged or another data "
                "set."
            )
        record -= count


def load_training(data: DataConfig, path: str) -> tuple[ImageSet, ImageSet]:
    """The images to train on, and those held out: the last `data.holdout` training images."""
    examples = _load(data, path, "train")
    kept = len(examples.labels) - data.holdout
    if kept < 1:
        raise UserError(
            f"--holdout={data.holdout} leaves nothing to train on: only {len(examples.labels)} "
            "training images are there."
        )
    return examples.part(slice(kept)), examples.part(slice(kept, None))


def load_split(data: DataConfig, path: str, split: str) -> ImageSet:
    """The images of one split: "train" (without those held out), "holdout" or "test"."""
    if split == "test":
        return _load(data, path, "test")
    if split == "holdout" and not data.holdout:
        raise UserError("there is no holdout to score: this run trained on all training images.")
    train, held_out = load_training(data, path)
    return train if split == "train" else held_out


def _load(data: DataConfig, path: str, split: str) -> ImageSet:
    if data.dataset == "synthetic":
        images, labels = synthetic_data.make_split(split, SYNTHETIC_IMAGES[split])
        return ImageSet(images, labels.astype(np.int32))
    return read_images(path, split, len(data.class_names))


def mean_image(images: np.ndarray) -> np.ndarray:
    """The per-pixel mean, float32 [32, 32, 3]; summed in whole numbers, so the same everywhere."""
    total = np.zeros(images.shape[1:], np.int64)
    for start in range(0, len(images), 10_000):
        total += images[start : start + 10_000].sum(axis=0, dtype=np.uint32)
    return (total / len(images)).astype(np.float32)


def training_batches(
    examples: ImageSet,
    mean: np.ndarray,
    batch_size: int,
    seed: int = 0,
    first_step: int = 0,
    num_steps: int | None = None,
    alternate_flips: bool = False,
) -> tf.data.Dataset:
    """Batches of augmented images, float32 [batch_size, 32, 32, 3], and labels, from `first_step`.

    The mean is subtracted, then the image is padded with 4 zeros on each side, cropped at random
    and flipped at random. With `alternate_flips` only an image's first epoch decides its flip at
    random, and from then on it takes turns: no two epochs in a row show it the same way. Epochs
    follow one another without a gap: a batch may hold the end of one and the beginning of the next.
    """
    with tf.device("cpu"):
        augment = _Augmentation(examples.images, mean)
        labels = tf.constant(examples.labels)

    @tf.autograph.experimental.do_not_convert
    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        place = step * batch_size + tf.range(batch_size, dtype=tf.int64)
        indices = _epoch_order(place, len(examples.labels), seed)
        dy, dx, flip = _draw_crops(step, batch_size, seed)
        if alternate_flips:
            first = tf.bitwise.right_shift(_hash(seed, indices), np.uint64(63))
            flip = (tf.cast(first, tf.int32) + tf.cast(place // len(examples.labels), tf.int32)) % 2
        return augment(indices, dy, dx, flip), tf.gather(labels, indices)

    last_step = np.iinfo(np.int64).max if num_steps is None else first_step + num_steps
    dataset = tf.data.Dataset.range(first_step, last_step)
    options = tf.data.Options()
    # A batch is one light graph: more threads would only take the network's processors from it.
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = 2
    options.autotune.enabled = False
    # They would make a second copy of all images, to compare graphs by their contents.
    options.experimental_optimization.apply_default_optimizations = False
    dataset = dataset.map(batch, num_parallel_calls=2, deterministic=True)
    return dataset.prefetch(4).with_options(options)


def _epoch_order(place: tf.Tensor, num_examples: int, seed: int) -> tf.Tensor:
    """The examples at these places of the endless row of epochs."""
    # With its default of 4 rounds, and keys that differ in their low bits alone, the orders of
    # neighbouring epochs resemble one another.
    return tf.raw_ops.RandomIndexShuffle(
        index=place % num_examples,
        seed=_shuffle_keys(seed, place // num_examples),
        max_index=np.int64(num_examples - 1),
        rounds=16,
    )


def _shuffle_keys(seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """Three key words for each epoch number."""
    mixed = _hash(seed, epoch)
    return tf.stack([tf.bitwise.right_shift(mixed, np.uint64(by)) for by in (0, 21, 42)], axis=1)


def _hash(seed: int, numbers: tf.Tensor) -> tf.Tensor:
    """64 well-mixed bits for each number: the outputs of SplitMix64, at random access."""
    return _splitmix64(
        _splitmix64(seed) + tf.cast(numbers, tf.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )


def _splitmix64(state: tf.Tensor | int) -> tf.Tensor:
    state = tf.convert_to_tensor(state, tf.uint64)
    for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ tf.bitwise.right_shift(state, np.uint64(by))) * np.uint64(factor)
    return state ^ tf.bitwise.right_shift(state, np.uint64(31))


def _draw_crops(step: tf.Tensor, count: int, seed: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """For each image of a batch: the crop's offsets, 0 to 8, and whether to flip it, 0 or 1."""
    drawn = tf.random.stateless_uniform(
        [count], tf.stack([np.int64(seed), step]), 0, SHIFTS * SHIFTS * 2, tf.int32
    )
    return drawn // (2 * SHIFTS), drawn // 2 % SHIFTS, drawn % 2


class _Augmentation:
    """Crops and flips whole batches of uint8 images and subtracts the mean.

    Works on bytes in long runs, which is several times as fast as cutting one picture after the
    other: rows are gathered for the vertical shift; the batch is parted into the 18 cases of
    horizontal shift and flip, where each case is one slice; and the mean, cropped in all 162 ways
    beforehand, is subtracted last. Padding is zero in the image and in the mean alike.
    """

    def __init__(self, images: np.ndarray, mean: np.ndarray):
        self._images = _as_tensor(images.reshape(len(images), IMAGE_BYTES))
        padded = np.pad(mean, ((PAD, PAD), (PAD, PAD), (0, 0)))
        self._means = tf.constant(
            np.stack(
                [
                    padded[dy : dy + SIDE, dx : dx + SIDE][:, :: -1 if flip else 1].reshape(-1)
                    for dy in range(SHIFTS)
                    for dx in range(SHIFTS)
                    for flip in (0, 1)
                ]
            )
        )

    def __call__(
        self, indices: tf.Tensor, dy: tf.Tensor, dx: tf.Tensor, flip: tf.Tensor
    ) -> tf.Tensor:
        count, height = indices.shape[0], SIDE + 2 * PAD
        images = tf.reshape(tf.gather(self._images, indices), [count, SIDE, SIDE * CHANNELS])
        images = tf.pad(images, [[0, 0], [PAD, PAD], [PAD * CHANNELS, PAD * CHANNELS]])
        places = (tf.range(count) * height + dy)[:, None] + tf.range(SIDE)
        rows = tf.gather(tf.reshape(images, [count * height, -1]), places)

        case = dx * 2 + flip
        parts = tf.dynamic_partition(rows, case, 2 * SHIFTS)
        places = tf.dynamic_partition(tf.range(count), case, 2 * SHIFTS)
        for i, part in enumerate(parts):
            shift, flipped = divmod(i, 2)
            part = part[:, :, shift * CHANNELS : (shift + SIDE) * CHANNELS]
            if flipped:
                part = tf.reverse(tf.reshape(part, [-1, SIDE, CHANNELS]), [1])
            parts[i] = tf.reshape(part, [-1, IMAGE_BYTES])
        cropped = tf.ensure_shape(tf.dynamic_stitch(places, parts), [count, IMAGE_BYTES])

        mean = tf.gather(self._means, dy * (2 * SHIFTS) + case)
        return tf.reshape(tf.cast(cropped, tf.float32) - mean, [count, SIDE, SIDE, CHANNELS])
