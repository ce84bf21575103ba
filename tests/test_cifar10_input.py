"""The input pipeline: what is read, what is refused, and what a batch is made of."""

import gzip
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    TRAIN_FILES,
    random_cifar100,
    random_images,
    write_cifar100,
    write_pictures,
    write_records,
)

import cifar10_input
from cifar10_input import ImageSet, describe_data
from cifar10_resnet import formats
from cifar10_resnet.config import DataConfig
from cifar10_resnet.data import synthetic
from cifar10_resnet.errors import UserError

NO_MEAN = np.zeros([32, 32, 3], np.float32)


# --- Reading --------------------------------------------------------------------------------------


def test_hand_written_records_come_back_as_nhwc_pixels_and_labels_in_file_order(tmp_path):
    # every byte of these records is worked out from the format's description, none by our reader
    for number, name in enumerate(TRAIN_FILES):
        records = []
        for record in range(2):
            place = 2 * number + record
            red, green, blue = (bytes([place, 10 * c] * 512) for c in (1, 2, 3))
            records.append(bytes([place]) + red + green + blue)
        (tmp_path / name).write_bytes(b"".join(records))
    (tmp_path / "test_batch.bin").write_bytes(bytes([7]) + bytes(range(32)) * 96)

    train = cifar10_input.read_images(str(tmp_path), "train")
    assert train.images.shape == (10, 32, 32, 3)
    assert train.images.dtype == np.uint8
    assert np.issubdtype(train.labels.dtype, np.integer)
    assert train.labels.tolist() == list(range(10))
    for place, image in enumerate(train.images):
        assert (image[:, 0::2] == place).all()
        assert (image[:, 1::2] == [10, 20, 30]).all()

    test = cifar10_input.read_images(str(tmp_path), "test")
    assert test.labels.tolist() == [7]
    assert (test.images[0] == np.arange(32)[None, :, None]).all(), "a row of a plane is a row"


def test_random_pictures_come_back_as_they_were_written(write_cifar10):
    images, labels = random_images(23)
    folder = write_cifar10(train=(images, labels))
    read = cifar10_input.read_images(str(folder), "train")
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)


def test_path_may_be_the_folder_or_the_one_above_it(write_cifar10):
    folder = write_cifar10()
    for split in ("train", "test"):
        inside, above = (cifar10_input.read_images(str(p), split) for p in (folder, folder.parent))
        np.testing.assert_array_equal(inside.images, above.images)
        np.testing.assert_array_equal(inside.labels, above.labels)


@pytest.mark.parametrize(("coarse", "column"), [(False, 1), (True, 0)])
def test_cifar100_has_a_coarse_and_a_fine_label(tmp_path, coarse, column):
    images, labels = random_cifar100(30)
    folder = str(write_cifar100(tmp_path, train=(images, labels)))
    read = cifar10_input.read_images(folder, "train", coarse_labels=coarse)
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels[:, column])
    assert read.labels.dtype == np.int32
    # byte by byte, as its description has it: coarse, fine, 1024 red, 1024 green, 1024 blue
    record = (tmp_path / "train.bin").read_bytes()[7 * 3074 : 8 * 3074]
    assert tuple(record[:2]) == tuple(labels[7])
    assert record[2 + 2 * 1024 + 33] == images[7, 1, 1, 2]


def test_imported_pictures_have_as_many_classes_as_names(tmp_path):
    folder = str(write_pictures(tmp_path, num_classes=3))
    read = cifar10_input.read_images(folder, "train")
    np.testing.assert_array_equal(read.images, random_images(15, seed=1)[0])
    np.testing.assert_array_equal(read.labels, np.arange(15) % 3)


def test_data_is_described_by_the_files_that_are_there(write_cifar10, tmp_path):
    names = tuple(f"class {c}" for c in "abcdefghij")
    folder = write_cifar10(names="\n".join(names) + "\n\n")
    assert describe_data(str(folder)) == describe_data(str(folder.parent))
    assert describe_data(str(folder)) == DataConfig("cifar10", names)
    fine, coarse = (tuple(f"{k} {i}" for i in range(n)) for k, n in (("fine", 100), ("coarse", 20)))
    folder = str(write_cifar100(tmp_path / "100"))
    assert (
        describe_data(folder) == describe_data(folder, "cifar100") == DataConfig("cifar100", fine)
    )
    assert describe_data(folder, coarse_labels=True) == DataConfig(
        "cifar100", coarse, coarse_labels=True
    )
    folder = str(write_pictures(tmp_path / "pictures", 2))
    assert describe_data(folder) == DataConfig("pictures", ("class 0", "class 1"))
    assert describe_data(None, "synthetic") == DataConfig("synthetic", synthetic.CLASS_NAMES)


def test_images_are_counted_from_the_sizes_of_the_files(write_cifar10):
    folder = str(write_cifar10())
    assert cifar10_input.count_training_images(DataConfig(), folder) == 15
    assert cifar10_input.count_training_images(DataConfig(holdout=14), folder) == 1
    counts = cifar10_input.check_files(*formats.find(folder), "train")
    assert counts == [(os.path.join(folder, name), 3) for name in TRAIN_FILES]


# --- Files that are refused -----------------------------------------------------------------------


def refusal(path: Path | str, split: str = "train", dataset: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        cifar10_input.read_images(str(path), split, dataset)
    assert str(refused.value).endswith(".")
    return str(refused.value)


@pytest.mark.parametrize("name", ["data_batch_1.bin", "data_batch_5.bin", "test_batch.bin"])
def test_a_missing_batch_is_named(write_cifar10, name):
    folder = write_cifar10()
    (folder / name).unlink()
    text = refusal(folder, "test" if name == "test_batch.bin" else "train")
    assert f"{folder / name} is missing" in text


def test_a_folder_in_place_of_a_batch_is_told_so(write_cifar10):
    file = write_cifar10() / "data_batch_2.bin"
    file.unlink()
    file.mkdir()
    text = refusal(file.parent)
    assert f"{file} is a folder" in text
    assert "3073-byte records" in text


@pytest.mark.parametrize("name", ["train.bin", "fine_label_names.txt", "pictures_train.bin"])
def test_a_missing_file_of_the_other_data_sets_is_named(tmp_path, name):
    write_pictures(tmp_path, 3) if "pictures" in name else write_cifar100(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        cifar10_input.load_split(describe_data(str(tmp_path)), str(tmp_path), "train")


def _as_gzip(batch: bytes) -> bytes:
    packed = gzip.compress(batch, mtime=0)
    assert len(packed) % 3073, "this one would pass for whole records"
    assert len(packed) % 3074
    return packed


@pytest.fixture
def write_data(write_cifar10, tmp_path) -> Callable[[str], Path]:
    """Writes three training images, or for CIFAR-10 three in each file, of any data set."""

    def write(dataset: str) -> Path:
        if dataset == "cifar10":
            return write_cifar10()
        if dataset == "cifar100":
            return write_cifar100(tmp_path / "100", train=random_cifar100(3))
        return write_pictures(tmp_path / "pictures", 12, train=3)

    return write


@pytest.mark.parametrize(
    ("dataset", "name", "record_bytes"),
    [
        ("cifar10", "data_batch_4.bin", 3073),
        ("cifar100", "train.bin", 3074),
        ("pictures", "pictures_train.bin", 3073),
    ],
)
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda batch: b"", "empty"),
        (lambda batch: batch[:-1], "at byte {two:,}, is cut off after {all_but_one:,}"),
        (lambda batch: batch[:100], "has 100 bytes, .* at byte 0, is cut off after 100"),
        (lambda batch: batch + b"x", "at byte {three:,}, is cut off after 1"),
        (_as_gzip, "packed with gzip"),
    ],
    ids=["empty", "a byte short", "cut off early", "a byte too long", "gzip"],
)
def test_a_size_that_is_not_whole_records_is_refused_with_the_place(
    write_data, dataset, name, record_bytes, damage, found
):
    file = write_data(dataset) / name
    file.write_bytes(damage(file.read_bytes()))
    text = refusal(file.parent)
    assert str(file) in text
    places = {"two": 2, "three": 3}
    places = {word: count * record_bytes for word, count in places.items()}
    assert re.search(found.format(all_but_one=record_bytes - 1, **places), text)
    assert f"{record_bytes}-byte records" in text


@pytest.mark.parametrize(
    ("dataset", "split", "name", "record", "column", "label", "told"),
    [
        ("cifar10", "train", "data_batch_1.bin", 0, 0, 10, "the label 10 in record 0 (byte 0)"),
        ("cifar10", "train", "data_batch_3.bin", 2, 0, 255, "255 in record 2 (byte 6,146)"),
        ("cifar10", "test", "test_batch.bin", 3, 0, 99, "99 in record 3 (byte 9,219)"),
        ("cifar100", "train", "train.bin", 1, 0, 20, "coarse label 20 in record 1 (byte 3,074)"),
        ("cifar100", "train", "train.bin", 2, 1, 100, "fine label 100 in record 2 (byte 6,149)"),
        ("cifar100", "test", "test.bin", 0, 1, 255, "fine label 255 in record 0 (byte 1)"),
        ("pictures", "test", "pictures_test.bin", 3, 0, 12, "12 in record 3 (byte 9,219)"),
    ],
)
def test_a_label_out_of_range_is_told_by_file_record_byte_and_value(
    write_data, dataset, split, name, record, column, label, told
):
    file = write_data(dataset) / name
    data = bytearray(file.read_bytes())
    data[record * (3074 if dataset == "cifar100" else 3073) + column] = label
    file.write_bytes(data)
    text = refusal(file.parent, split)
    assert str(file) in text
    assert told in text
    most = {"cifar10": 9, "cifar100": 99 if column else 19, "pictures": 11}[dataset]
    assert f"0 to {most} are expected" in text


@pytest.mark.parametrize("records", [0, 1.5, 2])
def test_a_file_that_shrinks_while_it_is_read_is_named_with_the_place(
    write_cifar10, monkeypatch, records
):
    file = write_cifar10() / "data_batch_3.bin"
    unwatched = cifar10_input._aligned

    def shrinking(shape: list[int]) -> np.ndarray:  # between the check and the reading
        os.truncate(file, int(records * 3073))
        return unwatched(shape)

    monkeypatch.setattr(cifar10_input, "_aligned", shrinking)
    text = refusal(file.parent)
    assert f"{file} changed while it was read: it had 9,219 bytes and now ends at byte " in text
    assert f"byte {int(records * 3073):,};" in text


def test_a_file_that_vanishes_while_it_is_read_is_named(write_cifar10, monkeypatch):
    file = write_cifar10() / "data_batch_3.bin"
    unwatched = cifar10_input._aligned
    monkeypatch.setattr(
        cifar10_input, "_aligned", lambda shape: (os.remove(file), unwatched(shape))[1]
    )
    assert f"cannot read {file} from byte 0 on: No such file" in refusal(file.parent)


def test_one_data_set_is_not_read_as_another(write_data, tmp_path):
    folder = write_data("cifar100")
    assert "holds CIFAR-100, not CIFAR-10" in refusal(folder, dataset="cifar10")
    # nor under another's names: records of one size are no whole number of the other's
    disguised = tmp_path / "disguised"
    disguised.mkdir()
    (disguised / "test_batch.bin").write_bytes((folder / "test.bin").read_bytes())
    assert "3073-byte records (CIFAR-10)" in refusal(disguised, "test")


def test_the_first_of_several_wrong_labels_is_the_one_told(write_cifar10):
    folder = write_cifar10()
    for name, label in (("data_batch_2.bin", 44), ("data_batch_4.bin", 55)):
        file = folder / name
        file.write_bytes(bytes([label]) + file.read_bytes()[1:])
    text = refusal(folder)
    assert "data_batch_2.bin" in text
    assert "label 44 " in text


def test_a_batch_that_may_not_be_read_is_named_with_the_reason(
    write_cifar10, monkeypatch, as_nobody
):
    file = write_cifar10() / "data_batch_3.bin"
    file.chmod(0)
    # from within, as the folders above pytest's are closed to anybody else
    monkeypatch.chdir(file.parent)
    with as_nobody(), pytest.raises(UserError) as refused:
        cifar10_input.count_training_images(DataConfig(), ".")
    assert "data_batch_3.bin" in str(refused.value)
    assert "Permission denied" in str(refused.value)


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
    # two readers in turn, one of them ahead of the other
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
    """Which of the 162 crops each image got, [steps, batch_size], from an image that tells."""
    image = np.zeros([1, 32, 32, 3], np.uint8)
    image[0, :, :, 0] = np.arange(32)[:, None]  # a pixel knows its row
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


def test_alternating_flips_show_an_image_in_turns_and_begin_evenly():
    image = np.zeros([200, 32, 32, 3], np.uint8)
    image[:, :, :16, 0] = 200  # the left half is red until it is flipped
    image[:, :, :, 1] = np.arange(200)[:, None, None]  # and every pixel knows its image
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


def test_a_cutout_larger_than_the_picture_blanks_all_of_it():
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


# --- Splits ---------------------------------------------------------------------------------------


def test_holdout_takes_the_last_training_images_and_leaves_the_test_images_alone(write_cifar10):
    train, test = random_images(15, seed=5), random_images(6, seed=6)
    folder = str(write_cifar10(train=train, test=test))
    data = DataConfig(holdout=4)
    kept, held_out = cifar10_input.load_training(data, folder)
    np.testing.assert_array_equal(kept.images, train[0][:11])
    np.testing.assert_array_equal(kept.labels, train[1][:11])
    np.testing.assert_array_equal(held_out.images, train[0][11:])
    np.testing.assert_array_equal(held_out.labels, train[1][11:])
    expected = {"train": kept, "holdout": held_out, "test": ImageSet(*test)}
    for split, examples in expected.items():
        loaded = cifar10_input.load_split(data, folder, split)
        np.testing.assert_array_equal(loaded.images, examples.images)
        np.testing.assert_array_equal(loaded.labels, examples.labels)


def test_without_a_holdout_every_training_image_is_trained_on(write_cifar10):
    folder = str(write_cifar10())
    kept, held_out = cifar10_input.load_training(DataConfig(), folder)
    assert (len(kept.labels), len(held_out.labels)) == (15, 0)
    assert len(cifar10_input.load_split(DataConfig(), folder, "train").labels) == 15


@pytest.mark.parametrize("holdout", [15, 16, 5000])
def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(write_cifar10, holdout):
    with pytest.raises(UserError) as refused:
        cifar10_input.load_training(DataConfig(holdout=holdout), str(write_cifar10()))
    assert f"--holdout={holdout}" in str(refused.value)
    assert "15" in str(refused.value)


def test_scoring_a_holdout_that_the_run_does_not_have_is_refused(write_cifar10):
    with pytest.raises(UserError, match="no holdout"):
        cifar10_input.load_split(DataConfig(), str(write_cifar10()), "holdout")


def test_the_generated_data_set_is_made_in_memory(monkeypatch):
    counts = {"train": 60, "test": 30}
    for split, count in counts.items():
        monkeypatch.setitem(cifar10_input.SYNTHETIC_IMAGES, split, count)
    data = DataConfig("synthetic", synthetic.CLASS_NAMES, holdout=20)
    train_images, train_labels = synthetic.make_split("train", 60)
    test_images, test_labels = synthetic.make_split("test", 30)
    expected = {
        "train": (train_images[:40], train_labels[:40]),
        "holdout": (train_images[40:], train_labels[40:]),
        "test": (test_images, test_labels),
    }
    for split, (images, labels) in expected.items():
        loaded = cifar10_input.load_split(data, "", split)
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, labels)
    assert cifar10_input.count_training_images(data, "") == 40


def test_a_written_copy_of_the_generated_data_reads_as_the_generated_data(tmp_path):
    images, labels = synthetic.make_split("test", 20)
    write_records(tmp_path / "test_batch.bin", images, labels)
    read = cifar10_input.read_images(str(tmp_path), "test")
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)
