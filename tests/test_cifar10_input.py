"""The input pipeline: records become images, and images become batches."""

import itertools
import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import random_images, write_records

import cifar10_input
from cifar10_input import ImageSet
from cifar10_resnet.formats import FORMATS

NO_MEAN = np.zeros([32, 32, 3], np.float32)


# --- Records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label_bytes", "size"), [(1, 32), (2, 32), (1, 8)])
def test_records_become_images_and_all_their_label_bytes(tmp_path, label_bytes, size):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (5, size, size, 3), np.uint8)
    labels = rng.integers(0, 256, (5, label_bytes), np.uint8)
    files = [str(tmp_path / name) for name in ("a.bin", "b.bin")]
    write_records(files[0], images[:2], labels[:2])
    write_records(files[1], images[2:], labels[2:])
    read = cifar10_input.read_records(files, label_bytes, size)
    for found, expected in zip(read, (images, labels), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("size", [0, 1, 3072, 9300])
def test_a_file_that_is_not_whole_is_refused_with_the_same_facts_as_a_data_set(
    tmp_path, dataset, size
):
    file_format = FORMATS[dataset]
    file = tmp_path / file_format.test_files[0]
    file.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=re.escape(str(file))) as refused:
        cifar10_input.read_records([str(file)], len(file_format.labels))
    problem = file_format.size_problem(str(file), size)
    assert str(refused.value) == problem.replace(f" ({file_format.title})", "")


# --- The mean -------------------------------------------------------------------------------------


def test_the_mean_is_the_exact_one_rounded_once():
    images, _ = random_images(257)
    mean = cifar10_input.mean_image(images)
    assert mean.dtype == np.float32
    expected = images.astype(np.float64).mean(axis=0)  # exact: sums of whole numbers below 2 ** 53
    np.testing.assert_array_equal(mean, expected.astype(np.float32))


def test_the_mean_of_many_bright_images_is_exact():
    # float32 sums of 255s leave the whole numbers at 65,794 images, uint16 sums at 257
    images = np.broadcast_to(np.uint8(255), (70_001, 32, 32, 3))
    np.testing.assert_array_equal(cifar10_input.mean_image(images), np.full([32, 32, 3], 255.0))


# --- Training batches: which images ---------------------------------------------------------------


def numbered(count: int) -> ImageSet:
    """Images that differ, each with its number for a label."""
    return ImageSet(random_images(count)[0], np.arange(count, dtype=np.int32))


def batches_of(examples: ImageSet, batch_size: int, count: int, seed: int = 0, first_step: int = 0):
    dataset = cifar10_input.training_batches(
        examples, NO_MEAN + 100, batch_size, seed, first_step, count
    )
    return [(images.numpy(), labels.numpy()) for images, labels in dataset]


def assert_same_batches(one, other) -> None:
    assert len(one) == len(other)
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        np.testing.assert_array_equal(labels, other_labels)
        np.testing.assert_array_equal(images, other_images)


def test_batches_are_the_same_each_time_they_are_made():
    examples = numbered(50)
    once = batches_of(examples, 16, 8, seed=3)
    tf.random.set_seed(12345)  # TensorFlow's own state has no say
    assert_same_batches(once, batches_of(examples, 16, 8, seed=3))
    for images, labels in once:
        assert images.shape == (16, 32, 32, 3)
        assert images.dtype == np.float32
        assert labels.shape == (16,)


def test_starting_at_a_step_gives_what_the_uninterrupted_run_sees_from_there():
    examples = numbered(50)
    whole = batches_of(examples, 16, 12)
    for first_step in (1, 3, 4, 11):
        rest = batches_of(examples, 16, 12 - first_step, first_step=first_step)
        assert_same_batches(rest, whole[first_step:])


def test_a_start_far_into_a_run_is_a_step_like_any_other():
    examples = numbered(50)
    first_step = 2**31 // 16 + 5  # places beyond 32 bits
    at_once = batches_of(examples, 16, 3, first_step=first_step)
    assert_same_batches(batches_of(examples, 16, 1, first_step=first_step + 2), at_once[2:])
    assert all(set(labels) <= set(range(50)) for _, labels in at_once)


def test_batches_do_not_depend_on_how_they_are_read():
    examples = numbered(50)
    expected = batches_of(examples, 16, 6)
    endless = cifar10_input.training_batches(examples, NO_MEAN + 100, 16)
    # Two readers read alternately, one of them ahead of the other.
    ahead, behind = iter(endless), iter(endless)
    first_two = [next(ahead), next(ahead)]
    pairs = [(next(behind), next(ahead)) for _ in range(4)]
    read_behind = [pair[0] for pair in pairs]
    read_ahead = first_two + [pair[1] for pair in pairs]
    assert_same_batches([(i.numpy(), n.numpy()) for i, n in read_ahead], expected)
    assert_same_batches([(i.numpy(), n.numpy()) for i, n in read_behind], expected[:4])


def test_another_seed_gives_other_orders_and_other_crops():
    examples = numbered(60)
    one, other = (batches_of(examples, 60, 1, seed=seed)[0] for seed in (0, 1))
    assert (one[1] != other[1]).mean() > 0.8
    in_order, other_in_order = one[0][np.argsort(one[1])], other[0][np.argsort(other[1])]
    differing = (in_order != other_in_order).any(axis=(1, 2, 3))
    assert differing.mean() > 0.9, "an image may by chance be cropped alike, about one in 162"


@pytest.mark.parametrize(
    ("num_examples", "batch_size"),
    [(60, 20), (60, 16), (60, 60), (60, 7), (50, 128), (7, 20), (1, 3)],
)
def test_every_epoch_holds_every_example_exactly_once(num_examples, batch_size):
    epochs = 5
    examples = numbered(num_examples)
    steps = -(-num_examples * epochs // batch_size)
    batches = batches_of(examples, batch_size, steps)
    assert all(len(labels) == batch_size for _, labels in batches)
    labels = np.concatenate([labels for _, labels in batches])[: num_examples * epochs]
    orders = labels.reshape(epochs, num_examples)
    np.testing.assert_array_equal(np.sort(orders, axis=1), [np.arange(num_examples)] * epochs)
    if num_examples >= 50:
        for one, other in itertools.combinations(orders, 2):
            assert (one != other).mean() > 0.5


def orders_of_epochs(num_examples: int, epochs: int, seed: int = 0, first: int = 0) -> np.ndarray:
    """The order of each epoch, [epochs, num_examples], asked for as one batch per epoch."""
    blank = np.broadcast_to(np.uint8(0), (num_examples, 32, 32, 3))
    examples = ImageSet(blank, np.arange(num_examples, dtype=np.int32))
    dataset = cifar10_input.training_batches(
        examples, NO_MEAN, num_examples, seed, first_step=first, num_steps=epochs
    )
    return np.stack([labels.numpy() for _, labels in dataset])


def test_the_orders_of_epochs_are_not_alike():
    num_examples, epochs = 1000, 30
    orders = orders_of_epochs(num_examples, epochs)
    pairs = np.triu_indices(epochs, 1)
    correlations = np.corrcoef(orders)[pairs]
    # of independent orders: 435 draws with a standard deviation of 0.032 around zero
    assert np.abs(correlations.mean()) < 0.01
    assert np.abs(correlations).max() < 0.2


def test_an_epoch_leaves_neighbours_apart():
    orders = orders_of_epochs(1000, 30)
    # by chance 2 of 1000 neighbours stay neighbours: about 60 here
    assert (np.abs(np.diff(orders, axis=1)) == 1).sum() < 120


@pytest.mark.parametrize("later", [2**8, 2**10, 2**16])
def test_an_order_does_not_come_back_later_or_under_another_seed(later):
    order = orders_of_epochs(200, 1)
    for other in (orders_of_epochs(200, 1, first=later), orders_of_epochs(200, 1, seed=later)):
        assert (order != other).mean() > 0.9


def test_each_image_keeps_its_label():
    examples = numbered(40)
    # an image of one value each, which survives any crop
    values = np.arange(1, 41, dtype=np.uint8)
    examples = examples._replace(images=np.tile(values[:, None, None, None], (1, 32, 32, 3)))
    dataset = cifar10_input.training_batches(examples, NO_MEAN, 16, num_steps=10)
    for images, labels in dataset:
        np.testing.assert_array_equal(images[:, 16, 16, 0], labels.numpy() + 1)


def test_images_of_another_size_are_cropped_alike():
    image = np.random.default_rng(4).integers(1, 256, (1, 8, 8, 3), np.uint8)
    padded = np.pad(image[0], ((4, 4), (4, 4), (0, 0)))
    crops = [padded[y : y + 8, x : x + 8] for y, x in itertools.product(range(9), range(9))]
    examples = ImageSet(image, np.zeros(1, np.int32))
    mean = np.zeros([8, 8, 3], np.float32)
    ((images, _),) = cifar10_input.training_batches(examples, mean, 64, num_steps=1)
    for shown in images.numpy():
        assert any(np.array_equal(shown, crop[:, ::by]) for crop in crops for by in (1, -1))
    ((cut, _),) = cifar10_input.training_batches(examples, mean, 64, num_steps=1, cutout=3)
    changed = (images.numpy() != cut.numpy()).any(axis=3)
    assert 0 < changed.sum(axis=(1, 2)).max() <= 9
    assert not cut.numpy()[changed].any()


# --- Training batches: what happens to them -------------------------------------------------------


def all_crops(image: np.ndarray, mean: np.ndarray) -> dict[tuple[int, int, int], np.ndarray]:
    """Plain NumPy: subtract, pad by 4 zeros, cut at each of 81 offsets, mirror or not."""
    padded = np.zeros([40, 40, 3], np.float32)
    padded[4:36, 4:36] = image.astype(np.float32) - mean
    crops = {}
    for dy, dx in itertools.product(range(9), range(9)):
        crop = padded[dy : dy + 32, dx : dx + 32]
        crops[dy, dx, 0], crops[dy, dx, 1] = crop, crop[:, ::-1]
    return crops


def test_every_augmented_image_is_one_of_the_162_crops_of_its_original():
    examples = numbered(20)
    mean = cifar10_input.mean_image(examples.images)
    references = [all_crops(image, mean) for image in examples.images]
    seen = set()
    for images, labels in cifar10_input.training_batches(examples, mean, 16, num_steps=8):
        for image, label in zip(images.numpy(), labels.numpy(), strict=True):
            same = [key for key, crop in references[label].items() if np.array_equal(image, crop)]
            assert len(same) == 1
            seen.update(same)
    assert len(seen) > 60, "128 images show many different crops"


def test_padding_is_zero_after_the_mean_is_subtracted():
    # 200 everywhere and a mean of half numbers: inside, no pixel can come out as zero
    examples = ImageSet(np.full([8, 32, 32, 3], 200, np.uint8), np.zeros(8, np.int32))
    for images, _ in cifar10_input.training_batches(examples, NO_MEAN + 99.5, 64, num_steps=4):
        images = images.numpy()
        assert set(np.unique(images)) == {0.0, 100.5}
        empty = (images == 0).all(axis=3)
        np.testing.assert_array_equal(empty, (images == 0).any(axis=3))
        heights, widths = (~empty).any(axis=2).sum(axis=1), (~empty).any(axis=1).sum(axis=1)
        assert heights.min() == widths.min() == 28, "shifts of four pixels, and no more"
        np.testing.assert_array_equal((~empty).sum(axis=(1, 2)), heights * widths)


def drawn_crops(batch_size: int, steps: int) -> np.ndarray:
    """Returns which of the 162 crops each image got, [steps, batch_size]. The pixels show it."""
    image = np.zeros([1, 32, 32, 3], np.uint8)
    image[0, :, :, 0] = np.arange(32)[:, None]  # The value of a pixel is its row.
    image[0, :, :, 1] = np.arange(32)[None, :]  # and its column
    examples = ImageSet(image, np.zeros(1, np.int32))
    crops = []
    for images, _ in cifar10_input.training_batches(examples, NO_MEAN, batch_size, num_steps=steps):
        row = images[:, 16, 16, 0].numpy().astype(int)
        column, next_column = (images[:, 16, x, 1].numpy().astype(int) for x in (16, 17))
        flip = next_column < column
        dy, dx = row - 12, column - np.where(flip, 11, 12)
        assert ((dy >= 0) & (dy <= 8) & (dx >= 0) & (dx <= 8)).all()
        crops.append(dy * 18 + dx * 2 + flip)
    return np.array(crops)


def test_crops_and_flips_are_drawn_evenly_and_apart():
    drawn = drawn_crops(512, 64)
    counts = np.bincount(drawn.ravel(), minlength=162)
    assert (counts > 0).all(), "all 162 appear"
    # chi-square with 161 degrees of freedom: a mean of 161, a standard deviation of 18
    expected = drawn.size / 162
    assert 90 < ((counts - expected) ** 2 / expected).sum() < 250
    for other in (drawn[1:] == drawn[:-1], drawn[:, 1:] == drawn[:, :-1]):
        assert 0.5 / 162 < other.mean() < 2 / 162, "neither the last step nor the neighbour matters"


def test_alternating_flips_show_both_sides_alternately_and_begin_evenly():
    image = np.zeros([200, 32, 32, 3], np.uint8)
    image[:, :, :16, 0] = 200  # the left half is red until it is flipped
    image[:, :, :, 1] = np.arange(200)[:, None, None]  # The value of every pixel is its image.
    examples = ImageSet(image, np.arange(200, dtype=np.int32))
    seen = np.full([3, 200], -1)
    batches = cifar10_input.training_batches(
        examples, NO_MEAN, 100, seed=3, num_steps=6, alternate_flips=True
    )
    for step, (images, labels) in enumerate(batches):
        flipped = images[:, 16, 27, 0].numpy() > images[:, 16, 4, 0].numpy()
        seen[step // 2, labels.numpy()] = flipped
    assert 70 < seen[0].sum() < 130
    np.testing.assert_array_equal(seen[1], 1 - seen[0])
    np.testing.assert_array_equal(seen[2], seen[0])


def batches_with(cutout: int, first_step: int = 0) -> list[np.ndarray]:
    examples = ImageSet(*random_images(40, seed=8))
    batches = cifar10_input.training_batches(
        examples, np.full([32, 32, 3], 0.5, np.float32), 200, 5, first_step, 3 - first_step,
        cutout=cutout,
    )  # fmt: skip
    return [images.numpy() for images, _ in batches]


@pytest.mark.parametrize("cutout", [1, 8, 9])
def test_cutout_blanks_one_square_around_any_pixel_and_nothing_else(cutout):
    whole, cut = np.concatenate(batches_with(0)), np.concatenate(batches_with(cutout))
    centres = []
    for before, after in zip(whole, cut, strict=True):
        changed = (before != after).any(axis=2)
        np.testing.assert_array_equal(after[~changed], before[~changed])
        rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
        if not len(rows):
            continue  # the square fell on padding, which is blank anyhow
        square = after[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (square == 0).all()
        assert max(square.shape[:2]) <= cutout
        if {*rows, *columns} <= {*range(5, 27)}:  # clear of padding and edges
            assert square.shape[:2] == (cutout, cutout)
            centres.append((rows[0] + cutout // 2, columns[0] + cutout // 2))
    rows, columns = np.array(centres).T
    assert len(set(rows)) > 12 < len(set(columns))
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2
    np.testing.assert_array_equal(batches_with(cutout, first_step=2)[0], cut[400:])


def test_a_cutout_larger_than_the_image_blanks_all_of_it():
    assert not np.concatenate(batches_with(100)).any()


@pytest.mark.parametrize("count", [2, 4])
def test_the_shares_of_a_batch_are_together_the_batch(count):
    examples = ImageSet(*random_images(30, seed=8))

    def batches(share: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = cifar10_input.training_batches(
            examples, NO_MEAN, 16, 5, 1, 3, alternate_flips=True, cutout=9, share=share
        )
        return [(images.numpy(), labels.numpy()) for images, labels in found]

    whole = batches((0, 1))
    shares = [batches((i, count)) for i in range(count)]
    assert len(whole) == 3
    for step, batch in enumerate(whole):
        for kind in (0, 1):
            together = np.concatenate([share[step][kind] for share in shares])
            np.testing.assert_array_equal(together, batch[kind])


# --- On a device ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"cutout": 7}, {"alternate_flips": True, "cutout": 32}, {"share": (1, 3)}]
)
def test_a_device_makes_the_same_batches_bit_for_bit_from_what_was_drawn(settings):
    examples = numbered(50)
    mean = cifar10_input.mean_image(examples.images)
    arguments = {"batch_size": 48, "seed": 5, "first_step": 3, "num_steps": 6, **settings}
    batches = cifar10_input.training_batches(examples, mean, **arguments)
    draws = cifar10_input.training_batches(examples, mean, **arguments, drawn_only=True)
    make = cifar10_input.DeviceAugmentation(examples, mean, settings.get("cutout", 0))
    made = [make(drawn) for drawn in draws]
    assert_same_batches([[part.numpy() for part in batch] for batch in made], list(batches))
    assert {part.dtype for batch in made for part in batch} == {tf.float32, tf.int32}
