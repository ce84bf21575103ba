"""Binary files of images as `tf.data`: reading and checking them, the mean, the batches.

A training batch is a pure function of (seed, step): the order of each epoch, every crop and every
flip come from stateless random functions, so a resumed run sees what an uninterrupted one would
have seen, and starting at any step costs nothing.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from cifar10_resnet import formats
from cifar10_resnet.config import DataConfig
from cifar10_resnet.data import synthetic
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import CHANNELS, IMAGE_BYTES, SIDE, Format

PAD = 4
SHIFTS = 2 * PAD + 1
ALIGNMENT = 64
CHUNK_RECORDS = 1000

GZIP = b"\x1f\x8b"
DAMAGED = "it is damaged, or of another data set"

# the generated stand-in, where it is made in memory
SYNTHETIC_IMAGES = {"train": 10_000, "test": 2_000}


class ImageSet(NamedTuple):
    """Images as uint8 [N, 32, 32, 3] and their labels as int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def part(self, where: slice) -> "ImageSet":
        return ImageSet(self.images[where], self.labels[where])

    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def describe_data(
    path: str | None, dataset: str | None = None, coarse_labels: bool = False
) -> DataConfig:
    """What there is to learn from the images in `path`: which data set, and its classes."""
    if dataset == "synthetic":
        return DataConfig(dataset, synthetic.CLASS_NAMES)
    folder, file_format = formats.find(path, dataset)
    names = file_format.class_names(folder, coarse_labels)
    return DataConfig(file_format.dataset, names, coarse_labels=coarse_labels)


def check_files(folder: str, file_format: Format, split: str) -> list[tuple[str, int]]:
    """The files of a split ("train" or "test") with their numbers of records; refuses bad ones."""
    files = [os.path.join(folder, name) for name in file_format.split_files(split)]
    return [(file, _count_records(file, file_format)) for file in files]


def _count_records(file: str, file_format: Format) -> int:
    if os.path.isdir(file):
        raise UserError(
            f"{file} is a folder; a file of {file_format.record_bytes}-byte records was expected."
        )
    try:
        with open(file, "rb") as opened:
            size, start = os.fstat(opened.fileno()).st_size, opened.read(2)
    except FileNotFoundError as error:
        raise UserError(
            f"{file} is missing: the folder does not hold the whole of {file_format.title}; name "
            "another with --path, or get it again."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}.") from error
    if problem := file_format.size_problem(file, size):
        packed = "it is packed with gzip, so unpack it first"
        raise UserError(f"{problem}; {packed if start == GZIP else DAMAGED}.")
    return size // file_format.record_bytes


def count_training_images(data: DataConfig, path: str | None) -> int:
    """How many images there are to train on, by the sizes of their files."""
    if data.dataset == "synthetic":
        return _without_holdout(data, SYNTHETIC_IMAGES["train"])
    files = check_files(*formats.find(path, data.dataset), "train")
    return _without_holdout(data, sum(count for _, count in files))


def _without_holdout(data: DataConfig, count: int) -> int:
    if data.holdout >= count:
        raise UserError(
            f"--holdout={data.holdout} leaves nothing to train on: only {count} training images "
            "are there."
        )
    return count - data.holdout


def read_images(
    path: str | None, split: str, dataset: str | None = None, coarse_labels: bool = False
) -> ImageSet:
    """Reads all images of a split ("train" or "test") into memory."""
    folder, file_format = formats.find(path, dataset)
    counts = check_files(folder, file_format, split)
    total = sum(count for _, count in counts)
    images = _aligned([total, SIDE, SIDE, CHANNELS])
    labels = np.empty([total, len(file_format.labels)], np.uint8)
    done = 0
    for file, count in counts:
        for records in _read_records(file, count, file_format.record_bytes):
            part = slice(done, done + len(records))
            labels[part], pixels = np.split(records, [len(file_format.labels)], axis=1)
            planes = pixels.reshape(-1, CHANNELS, SIDE, SIDE)
            for channel in range(CHANNELS):
                images[part, :, :, channel] = planes[:, channel]
            done += len(records)
    _check_labels(labels, counts, folder, file_format)
    return ImageSet(images, labels[:, file_format.label_column(coarse_labels)].astype(np.int32))


def _read_records(file: str, count: int, record_bytes: int) -> Iterator[np.ndarray]:
    """The records of a file, as many as it had when it was checked, some at a time."""
    read, end = 0, count * record_bytes
    try:
        with open(file, "rb") as opened:
            while read < end:
                chunk = opened.read(min(CHUNK_RECORDS * record_bytes, end - read))
                read += len(chunk)
                if len(chunk) % record_bytes or not chunk:
                    raise UserError(
                        f"{file} changed while it was read: it had {end:,} bytes and now ends at "
                        f"byte {read:,}; start again once it is whole."
                    )
                yield np.frombuffer(chunk, np.uint8).reshape(-1, record_bytes)
    except OSError as error:
        raise UserError(f"cannot read {file} from byte {read:,} on: {error.strerror}.") from error


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


def _check_labels(
    labels: np.ndarray, counts: Sequence[tuple[str, int]], folder: str, file_format: Format
) -> None:
    class_counts = file_format.class_counts(folder)
    for file, count in counts:
        columns = [column.tobytes() for column in labels[:count].T]
        if problem := file_format.label_problem(file, columns, class_counts):
            raise UserError(f"{problem}; {DAMAGED}.")
        labels = labels[count:]


def load_training(data: DataConfig, path: str | None) -> tuple[ImageSet, ImageSet]:
    """The images to train on, and those held out: the last `data.holdout` training images."""
    examples = _load(data, path, "train")
    kept = _without_holdout(data, len(examples.labels))
    return examples.part(slice(kept)), examples.part(slice(kept, None))


def load_split(data: DataConfig, path: str | None, split: str) -> ImageSet:
    """The images of one split: "train" (without those held out), "holdout" or "test"."""
    if split == "test":
        return _load(data, path, "test")
    if split == "holdout" and not data.holdout:
        raise UserError("there is no holdout to score: this run trained on all training images.")
    train, held_out = load_training(data, path)
    return train if split == "train" else held_out


def _load(data: DataConfig, path: str | None, split: str) -> ImageSet:
    if data.dataset == "synthetic":
        images, labels = synthetic.make_split(split, SYNTHETIC_IMAGES[split])
        return ImageSet(images, labels.astype(np.int32))
    return read_images(path, split, data.dataset, data.coarse_labels)


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
    cutout: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tf.data.Dataset:
    """Batches of augmented images, float32 [batch_size, 32, 32, 3], and labels, from `first_step`.

    With a `share` of (i, n) only the i-th of n equal parts of every batch.

    The mean is subtracted, then the image is padded with 4 zeros on each side, cropped at random
    and flipped at random. With `alternate_flips` only an image's first epoch decides its flip at
    random, and from then on it takes turns: no two epochs in a row show it the same way. With
    `cutout`, a square of so many pixels a side around one of the image's pixels becomes zeros.
    Epochs follow one another without a gap: a batch may hold the end of one and the beginning of
    the next.
    """
    part = slice(*(batch_size * i // share[1] for i in (share[0], share[0] + 1)))
    with tf.device("cpu"):
        augment = _Augmentation(examples.images, mean)
        labels = tf.constant(examples.labels)

    @tf.autograph.experimental.do_not_convert
    def batch(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        place = step * batch_size + tf.range(part.start, part.stop, dtype=tf.int64)
        indices = _epoch_order(place, len(examples.labels), seed)
        dy, dx, flip = (drawn[part] for drawn in _draw_crops(step, batch_size, seed))
        if alternate_flips:
            first = tf.bitwise.right_shift(_hash(seed, indices), np.uint64(63))
            flip = (tf.cast(first, tf.int32) + tf.cast(place // len(examples.labels), tf.int32)) % 2
        images = augment(indices, dy, dx, flip)
        if cutout:
            images = _cut_out(images, _draw_centres(step, batch_size, seed)[part], cutout)
        return images, tf.gather(labels, indices)

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


def _draw_centres(step: tf.Tensor, count: int, seed: int) -> tf.Tensor:
    """For each image of a batch: row and column of a pixel."""
    # a seed that no other draws have, since seeds are not negative
    return tf.random.stateless_uniform(
        [count, 2], tf.stack([np.int64(~seed), step]), 0, SIDE, tf.int32
    )


def _cut_out(images: tf.Tensor, centres: tf.Tensor, side: int) -> tf.Tensor:
    places = tf.range(SIDE) - centres[:, :, None] + side // 2
    inside = (places >= 0) & (places < side)
    inside = inside[:, 0, :, None] & inside[:, 1, None, :]
    return tf.where(inside[..., None], 0.0, images)


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
