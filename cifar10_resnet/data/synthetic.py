"""Makes synthetic images with NumPy: ten classes of 32x32 colour images.

They replace CIFAR-10 on machines that cannot download it. The images show shapes and textures.
Colours, places, sizes, angles and noise are independent of the class, so a network has to learn
the form. Neither the mean colour nor a linear model on the pixels is accurate.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cifar10_resnet.formats import FORMATS, IMAGE_BYTES, SIDE

SPLITS = ("train", "test")
BLOCK_SIZE = 500  # images per random stream: a multiple of ten that bounds the memory

# Each form is a function of x and y, in units of the shape's radius. It is negative inside and
# grows by one per unit outside: close enough to a signed distance for smooth edges. No form is the
# mirror image of another, because training flips images and must not change their class.


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.9


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.75) - 0.2


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt(x * x + y * y) - 0.95, 0.75 - np.sqrt((x - 0.5) ** 2 + y * y))


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.55


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A point is inside a pentagram when it is beyond at most one of its five lines.
    angles = np.pi / 2 + 2 * np.pi / 5 * np.arange(5)
    beyond = np.stack([np.float32(np.cos(a)) * x + np.float32(np.sin(a)) * y for a in angles])
    return np.sort(beyond, axis=0)[-2] - 0.36


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.3)


def _triangle_wave(t: np.ndarray) -> np.ndarray:
    """Returns a zigzag between -0.5 and 0.5 with slope one."""
    return np.abs(np.mod(t, 2.0) - 1.0) - 0.5


def _stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 * _triangle_wave(2 * y)


def _checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = _triangle_wave(2 * x), _triangle_wave(2 * y)
    return 0.5 * np.where(x * y < 0, -1, 1) * np.minimum(np.abs(x), np.abs(y))


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.mod(x, 1.0) - 0.5, np.mod(y, 1.0) - 0.5
    return np.sqrt(x * x + y * y) - 0.3


_FORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": _disc,
    "ring": _ring,
    "crescent": _crescent,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "cross": _cross,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
}
CLASS_NAMES: tuple[str, ...] = tuple(_FORMS)


def make_split(split: str, num_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images [N, 32, 32, 3] and uint8 labels [N] of the split "train" or "test".

    Every ten images contain each class once, in random order. The same split and seed always
    begin with the same images. A larger `num_images` only adds to the end.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    if num_images < 0:
        raise ValueError(f"num_images must not be negative, got {num_images}")
    images = np.empty((num_images, SIDE, SIDE, 3), np.uint8)
    labels = np.empty(num_images, np.uint8)
    for start in range(0, num_images, BLOCK_SIZE):
        # The seed comes last. A large seed becomes several words, which must not shift others.
        stream = [SPLITS.index(split), start // BLOCK_SIZE, seed]
        rng = np.random.Generator(np.random.PCG64(stream))
        block = slice(start, min(start + BLOCK_SIZE, num_images))
        count = block.stop - start
        block_images, block_labels = _make_block(rng)
        images[block], labels[block] = block_images[:count], block_labels[:count]
    return images, labels


def _make_block(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return (low + (high - low) * rng.random((BLOCK_SIZE, *shape))).astype(np.float32)

    shuffle_keys = rng.random((BLOCK_SIZE // len(CLASS_NAMES), len(CLASS_NAMES)))
    labels = np.argsort(shuffle_keys, axis=1).astype(np.uint8).ravel()

    # Pixel coordinates are relative to the shape's centre and rotated by a small angle. Half the
    # shapes are mirrored. So flipped images are as likely as the others, and no form is
    # recognisable by the way that it faces.
    mirror = np.copysign(np.float32(1), uniform(-1, 1, 1, 1))
    radius = uniform(5, 11, 1, 1)
    angle = uniform(-0.5, 0.5, 1, 1)
    grid = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    across = (grid[None, None, :] - uniform(-5, 5, 1, 1)) / radius
    down = (grid[None, :, None] - uniform(-5, 5, 1, 1)) / radius
    x = mirror * (np.cos(angle) * across - np.sin(angle) * down)
    y = np.sin(angle) * across + np.cos(angle) * down

    coverage = np.empty(x.shape, np.float32)
    for label, form in enumerate(_FORMS.values()):
        chosen = labels == label
        distance = radius[chosen] * form(x[chosen], y[chosen])
        coverage[chosen] = np.clip(0.5 - distance, 0, 1)  # a soft edge, one pixel wide

    # Two colours are on either side of a middle one. Either can be the form or the background.
    middle = uniform(0.3, 0.7, 1, 1, 3)
    offset = rng.standard_normal((BLOCK_SIZE, 1, 1, 3), dtype=np.float32)
    offset *= uniform(0.12, 0.4, 1, 1, 1) / np.sqrt((offset**2).sum(-1, keepdims=True))
    images = middle + offset * (2 * coverage[..., None] - 1)

    # Images also have a gentle gradient of light and some grain.
    slope = uniform(-0.15, 0.15, 2, 1, 1) * 2 / SIDE
    light = slope[:, 0] * grid[None, None, :] + slope[:, 1] * grid[None, :, None]
    images += light[..., None]
    grain = rng.standard_normal(images.shape, dtype=np.float32)
    images += uniform(0.02, 0.12, 1, 1, 1) * grain
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8), labels


def source(train_images: int, test_images: int, seed: int) -> str:
    """Returns the line that records the source of such files in their data folder."""
    return (
        f"synthetic images: {train_images} training images, {test_images} test images, seed {seed}"
    )


def write(folder: Path, train_images: int, test_images: int, seed: int) -> None:
    """Writes the images in CIFAR-10's file format: a label, then the red, green and blue planes."""
    file_format = FORMATS["cifar10"]
    for split, num_images in (("train", train_images), ("test", test_images)):
        names = file_format.split_files(split)
        images, labels = make_split(split, num_images, seed)
        planes = images.transpose(0, 3, 1, 2).reshape(num_images, IMAGE_BYTES)
        records = np.concatenate([labels[:, np.newaxis], planes], axis=1)
        for name, batch in zip(names, np.split(records, len(names)), strict=True):
            (folder / name).write_bytes(batch.tobytes())
    # CIFAR-10's file of names ends in an empty line too.
    meta = "".join(f"{name}\n" for name in (*CLASS_NAMES, ""))
    (folder / file_format.labels[0].names_file).write_bytes(meta.encode())
