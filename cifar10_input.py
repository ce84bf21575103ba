"""Turns binary files of images into training batches: reads them, averages them, augments them.

This file needs TensorFlow and NumPy only, and works in any project.

A training batch is a pure function of (seed, step). The order of each epoch, every crop and every
flip come from stateless random functions. So a resumed run sees the same batches as an
uninterrupted run, and starting at any step costs nothing.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

CHANNELS = 3
PAD = 4
SHIFTS = 2 * PAD + 1
ALIGNMENT = 64
CHUNK_RECORDS = 1000


class ImageSet(NamedTuple):
    """Square images as uint8 [N, size, size, 3] and their labels as int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def part(self, where: slice) -> "ImageSet":
        return ImageSet(self.images[where], self.labels[where])

    def digest(self) -> str:
        """Returns the SHA-256 of all images and labels."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def read_records(
    files: Sequence[str], label_bytes: int = 1, size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images of binary files, uint8 [N, size, size, 3], and their label bytes.

    A record is its label bytes and the red, green and blue planes, each row by row. The label
    bytes are uint8 [N, label_bytes]. An incomplete file raises ValueError with the place.
    """
    record_bytes = label_bytes + size * size * CHANNELS
    counts = [_count_records(file, record_bytes) for file in files]
    images = _aligned([sum(counts), size, size, CHANNELS])
    labels = np.empty([sum(counts), label_bytes], np.uint8)
    done = 0
    for file, count in zip(files, counts, strict=True):
        for records in _read_chunks(file, count, record_bytes):
            part = slice(done, done + len(records))
            labels[part], pixels = np.split(records, [label_bytes], axis=1)
            planes = pixels.reshape(-1, CHANNELS, size, size)
            for channel in range(CHANNELS):
                images[part, :, :, channel] = planes[:, channel]
            done += len(records)
    return images, labels


def _count_records(file: str, record_bytes: int) -> int:
    size = os.path.getsize(file)
    if size == 0:
        raise ValueError(f"{file} is empty, where {record_bytes}-byte records were expected")
    count, rest = divmod(size, record_bytes)
    if rest:
        raise ValueError(
            f"{file} has {size:,} bytes, not a multiple of {record_bytes}: the last "
            f"record, at byte {count * record_bytes:,}, is cut off after {rest:,}"
        )
    return count


def _read_chunks(file: str, count: int, record_bytes: int) -> Iterator[np.ndarray]:
    """Yields the first `count` records of a file, some at a time."""
    read, end = 0, count * record_bytes
    try:
        with open(file, "rb") as opened:
            while read < end:
                chunk = opened.read(min(CHUNK_RECORDS * record_bytes, end - read))
                read += len(chunk)
                if len(chunk) % record_bytes or not chunk:
                    raise ValueError(
                        f"{file} changed while it was read: it had {end:,} bytes and now ends at "
                        f"byte {read:,}"
                    )
                yield np.frombuffer(chunk, np.uint8).reshape(-1, record_bytes)
    except OSError as error:
        raise ValueError(f"cannot read {file} from byte {read:,} on: {error.strerror}") from error


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """Returns an empty uint8 array that begins at an address which TensorFlow can use."""
    size = int(np.prod(shape))
    memory = np.empty([size + ALIGNMENT], np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].reshape(shape)


def _as_tensor(array: np.ndarray) -> tf.Tensor:
    """Returns the array as a tensor: the same memory if that is aligned, else a copy."""
    if array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous and array.flags.writeable:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def mean_image(images: np.ndarray) -> np.ndarray:
    """Returns the mean of each pixel, float32. Integer sums are the same on every machine."""
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
    drawn_only: bool = False,
) -> tf.data.Dataset:
    """Returns batches of augmented images, float32 [batch_size, size, size, 3], and labels.

    The batches start at `first_step`. A `share` of (i, n) selects part i of n of each batch.

    The mean is subtracted. Then the image is padded with 4 zeros on each side, cropped at random
    and flipped at random. With `alternate_flips` only an image's first epoch decides its flip at
    random. Later epochs alternate, so no two epochs in a row show it the same way. `cutout` is the
    width in pixels of a square of zeros around a random pixel. Epochs follow one another without a
    gap: a batch may contain the end of one and the start of the next.

    With `drawn_only`, an element has only what was drawn for each image: int32 [batch_size, 4], or
    [batch_size, 6] with `cutout`. `DeviceAugmentation` makes the same batch from it.
    """
    part = slice(*(batch_size * i // share[1] for i in (share[0], share[0] + 1)))
    size = examples.images.shape[1]
    with tf.device("cpu"):
        augment = None if drawn_only else _Augmentation(examples, mean, cutout)

    @tf.autograph.experimental.do_not_convert
    def batch(step: tf.Tensor) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
        place = step * batch_size + tf.range(part.start, part.stop, dtype=tf.int64)
        indices = _epoch_order(place, len(examples.labels), seed)
        dy, dx, flip = (drawn[part] for drawn in _draw_crops(step, batch_size, seed))
        if alternate_flips:
            first = tf.bitwise.right_shift(_hash(seed, indices), np.uint64(63))
            flip = (tf.cast(first, tf.int32) + tf.cast(place // len(examples.labels), tf.int32)) % 2
        drawn = [tf.cast(indices, tf.int32), dy, dx, flip]
        if cutout:
            drawn += tf.unstack(_draw_centres(step, batch_size, seed, size)[part], axis=1)
        drawn = tf.stack(drawn, axis=1)
        return drawn if augment is None else augment(drawn)

    last_step = np.iinfo(np.int64).max if num_steps is None else first_step + num_steps
    dataset = tf.data.Dataset.range(first_step, last_step)
    options = tf.data.Options()
    # A batch is one light graph. More threads would only take processors from the network.
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = 2
    options.autotune.enabled = False
    # These optimizations would copy all images, to compare graphs by their contents.
    options.experimental_optimization.apply_default_optimizations = False
    dataset = dataset.map(batch, num_parallel_calls=2, deterministic=True)
    return dataset.prefetch(4).with_options(options)


def _epoch_order(place: tf.Tensor, num_examples: int, seed: int) -> tf.Tensor:
    """Returns the indices of the images at these places of an endless row of epochs."""
    # With the default of 4 rounds, and keys that differ only in their low bits, the orders of
    # neighbouring epochs resemble one another.
    return tf.raw_ops.RandomIndexShuffle(
        index=place % num_examples,
        seed=_shuffle_keys(seed, place // num_examples),
        max_index=np.int64(num_examples - 1),
        rounds=16,
    )


def _shuffle_keys(seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """Returns three key words for each epoch number."""
    mixed = _hash(seed, epoch)
    return tf.stack([tf.bitwise.right_shift(mixed, np.uint64(by)) for by in (0, 21, 42)], axis=1)


def _hash(seed: int, numbers: tf.Tensor) -> tf.Tensor:
    """Returns 64 well-mixed bits for each number: SplitMix64's outputs, at random access."""
    return _splitmix64(
        _splitmix64(seed) + tf.cast(numbers, tf.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )


def _splitmix64(state: tf.Tensor | int) -> tf.Tensor:
    state = tf.convert_to_tensor(state, tf.uint64)
    for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ tf.bitwise.right_shift(state, np.uint64(by))) * np.uint64(factor)
    return state ^ tf.bitwise.right_shift(state, np.uint64(31))


def _draw_crops(step: tf.Tensor, count: int, seed: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns for each image the crop's offsets, 0 to 8, and whether to flip it, 0 or 1."""
    drawn = tf.random.stateless_uniform(
        [count], tf.stack([np.int64(seed), step]), 0, SHIFTS * SHIFTS * 2, tf.int32
    )
    return drawn // (2 * SHIFTS), drawn // 2 % SHIFTS, drawn % 2


def _draw_centres(step: tf.Tensor, count: int, seed: int, size: int) -> tf.Tensor:
    """Returns for each image the row and the column of a pixel."""
    # No other draws have this seed, because seeds are not negative.
    return tf.random.stateless_uniform(
        [count, 2], tf.stack([np.int64(~seed), step]), 0, size, tf.int32
    )


def _square(centres: Sequence[tf.Tensor], side: int, size: int) -> tf.Tensor:
    """Returns which pixels are in a square around each (row, column): bool [N, size, size]."""
    places = tf.range(size) - tf.stack(centres, axis=1)[:, :, None] + side // 2
    inside = (places >= 0) & (places < side)
    return inside[:, 0, :, None] & inside[:, 1, None, :]


class _Augmentation:
    """A function that makes batches on a CPU: crops and flips uint8 images, subtracts the mean.

    It moves long rows of bytes, which is several times as fast as cutting one image after the
    other. Rows are gathered for the vertical shift. Then the batch is split into the 18 cases of
    horizontal shift and flip, and each case is one slice. The mean, cropped in all 162 ways
    beforehand, is subtracted last. Padding is zero in both the image and the mean.
    """

    def __init__(self, examples: ImageSet, mean: np.ndarray, cutout: int):
        images = examples.images
        self._size, self._cutout = images.shape[1], cutout
        size = self._size
        self._images = _as_tensor(images.reshape(len(images), -1))
        self._labels = tf.constant(examples.labels)
        padded = np.pad(mean, ((PAD, PAD), (PAD, PAD), (0, 0)))
        self._means = tf.constant(
            np.stack(
                [
                    padded[dy : dy + size, dx : dx + size][:, :: -1 if flip else 1].reshape(-1)
                    for dy in range(SHIFTS)
                    for dx in range(SHIFTS)
                    for flip in (0, 1)
                ]
            )
        )

    def __call__(self, drawn: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        indices, dy, dx, flip, *centres = tf.unstack(drawn, axis=1)
        images = self._crop(indices, dy, dx, flip)
        if centres:
            is_cut = _square(centres, self._cutout, self._size)
            images = tf.where(is_cut[..., None], 0.0, images)
        return images, tf.gather(self._labels, indices)

    def _crop(self, indices: tf.Tensor, dy: tf.Tensor, dx: tf.Tensor, flip: tf.Tensor) -> tf.Tensor:
        size, count = self._size, indices.shape[0]
        height, image_bytes = size + 2 * PAD, size * size * CHANNELS
        images = tf.reshape(tf.gather(self._images, indices), [count, size, size * CHANNELS])
        images = tf.pad(images, [[0, 0], [PAD, PAD], [PAD * CHANNELS, PAD * CHANNELS]])
        places = (tf.range(count) * height + dy)[:, None] + tf.range(size)
        rows = tf.gather(tf.reshape(images, [count * height, -1]), places)

        case = dx * 2 + flip
        parts = tf.dynamic_partition(rows, case, 2 * SHIFTS)
        places = tf.dynamic_partition(tf.range(count), case, 2 * SHIFTS)
        for i, part in enumerate(parts):
            shift, flipped = divmod(i, 2)
            part = part[:, :, shift * CHANNELS : (shift + size) * CHANNELS]
            if flipped:
                part = tf.reverse(tf.reshape(part, [-1, size, CHANNELS]), [1])
            parts[i] = tf.reshape(part, [-1, image_bytes])
        cropped = tf.ensure_shape(tf.dynamic_stitch(places, parts), [count, image_bytes])

        mean = tf.gather(self._means, dy * (2 * SHIFTS) + case)
        return tf.reshape(tf.cast(cropped, tf.float32) - mean, [count, size, size, CHANNELS])


class DeviceAugmentation:
    """A function that makes the same batches on a GPU, which keeps all images in its memory.

    XLA compiles it to one pass over the pixels of a batch: each is gathered from its place in its
    image, or is zero in the padding and the square.
    """

    # A pixel's place is an int32. Twice as much would fit, but a GPU has other uses for its memory.
    MOST_BYTES = 2**31

    def __init__(self, examples: ImageSet, mean: np.ndarray, cutout: int = 0):
        self._size, self._cutout = examples.images.shape[1], cutout
        self._pixels = tf.constant(examples.images.reshape(-1, CHANNELS))
        # An int32 constant would stay in the host's memory.
        self._labels = tf.constant(examples.labels, tf.int64)
        self._means = tf.constant(mean.reshape(-1, CHANNELS), tf.float32)
        self._compiled = tf.function(self._make, autograph=False, jit_compile=True)

    def __call__(self, drawn: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return self._compiled(drawn)

    def _make(self, drawn: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        indices, dy, dx, flip, *centres = tf.unstack(drawn, axis=1)
        size, there = self._size, tf.range(self._size)
        across = tf.where(flip[:, None] == 1, size - 1 - there, there)
        rows = (there + dy[:, None] - PAD)[:, :, None]
        columns = (across + dx[:, None] - PAD)[:, None, :]
        is_shown = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        if centres:
            is_shown &= ~_square(centres, self._cutout, size)
        places = tf.where(is_shown, rows * size + columns, 0)
        pixels = tf.gather(self._pixels, indices[:, None, None] * size * size + places)
        pixels = tf.cast(pixels, tf.float32) - tf.gather(self._means, places)
        labels = tf.cast(tf.gather(self._labels, indices), tf.int32)
        return tf.where(is_shown[..., None], pixels, 0.0), labels
