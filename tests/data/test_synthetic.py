"""The synthetic images: what they show, and the files that the download script writes of them."""

import numpy as np
import pytest
from conftest import contents
from downloads import FOLDER, batch, run_script, spoil, tree

from cifar10_resnet.data.synthetic import BLOCK_SIZE, CLASS_NAMES, make_split
from cifar10_resnet.formats import FORMATS

NUM_TRAIN, NUM_TEST = 6000, 1000


@pytest.fixture(scope="module")
def train() -> tuple[np.ndarray, np.ndarray]:
    return make_split("train", NUM_TRAIN)


@pytest.fixture(scope="module")
def test() -> tuple[np.ndarray, np.ndarray]:
    return make_split("test", NUM_TEST)


def linear_accuracy(train_inputs, train_labels, test_inputs, test_labels) -> float:
    """Test accuracy of a ridge regression from standardised inputs to one-hot labels."""
    mean, deviation = train_inputs.mean(axis=0), train_inputs.std(axis=0)
    train_inputs = (train_inputs - mean) / deviation
    targets = np.eye(len(CLASS_NAMES), dtype=np.float32)[train_labels] - 1 / len(CLASS_NAMES)
    gram = train_inputs.T @ train_inputs
    # As strong a penalty as this gives the linear model its best test accuracy.
    gram[np.diag_indices_from(gram)] += len(train_inputs)
    weights = np.linalg.solve(gram, train_inputs.T @ targets)
    scores = (test_inputs - mean) / deviation @ weights
    return float(np.mean(scores.argmax(axis=1) == test_labels))


def test_there_are_ten_classes_with_names_of_their_own():
    assert len(set(CLASS_NAMES)) == 10


def test_shapes_and_types(train):
    images, labels = train
    assert images.shape == (NUM_TRAIN, 32, 32, 3)
    assert labels.shape == (NUM_TRAIN,)
    assert images.dtype == labels.dtype == np.uint8


def test_every_photo_shows_something(train):
    images, _ = train
    assert images.std(axis=(1, 2)).max(axis=1).min() > 3


@pytest.mark.parametrize("num_images", [0, 1, 9, 20, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 7])
def test_classes_are_as_balanced_as_the_number_allows(num_images):
    images, labels = make_split("train", num_images)
    counts = np.bincount(labels, minlength=10)
    assert len(images) == len(labels) == counts.sum() == num_images
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 1


def test_labels_come_in_a_shuffled_order(train):
    tens = train[1].reshape(-1, 10)
    assert len(np.unique(tens, axis=0)) > 0.9 * len(tens)
    # Every class turns up at every place in the tens.
    assert all(len(np.unique(column)) == 10 for column in tens.T)


def test_the_same_arguments_give_the_same_images(test):
    for first, second in zip(test, make_split("test", NUM_TEST), strict=True):
        np.testing.assert_array_equal(first, second)


def test_fewer_images_are_the_beginning_of_more(train):
    few = BLOCK_SIZE + 13
    images, labels = make_split("train", few)
    np.testing.assert_array_equal(images, train[0][:few])
    np.testing.assert_array_equal(labels, train[1][:few])


def test_splits_and_seeds_share_no_image(train, test):
    sets = [train[0], test[0], make_split("train", 500, seed=1)[0]]
    distinct = {image.tobytes() for images in sets for image in images}
    assert len(distinct) == sum(len(images) for images in sets)


def test_a_linear_model_on_the_pixels_does_not_suffice(train, test):
    train_pixels, test_pixels = (
        images.reshape(len(images), -1).astype(np.float32) for images, _ in (train, test)
    )
    accuracy = linear_accuracy(train_pixels, train[1], test_pixels, test[1])
    assert 0.05 < accuracy < 0.6


def test_the_mean_colour_says_next_to_nothing(train, test):
    train_colours, test_colours = (images.mean(axis=(1, 2)) for images, _ in (train, test))
    assert linear_accuracy(train_colours, train[1], test_colours, test[1]) < 0.2

    # Nor do the images of the most similar mean colour, which would show a curved boundary.
    distances = ((test_colours[:, None] - train_colours[None]) ** 2).sum(axis=-1)
    nearest = np.argsort(distances, axis=1)[:, :25]
    votes = np.eye(10, dtype=int)[train[1][nearest]].sum(axis=1)
    assert np.mean(votes.argmax(axis=1) == test[1]) < 0.2


@pytest.mark.parametrize("split", ["validation", "Train", ""])
def test_an_unknown_split_is_refused(split):
    with pytest.raises(ValueError, match="unknown split"):
        make_split(split, 10)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        make_split("train", -1)


# --- Files ----------------------------------------------------------------------------------------

SMALL = ("--synthetic", "--synthetic_train_images=20", "--synthetic_test_images", "7")


def test_synthetic_files_hold_the_generated_images_as_planes(run, data_dir):
    out = run(*SMALL, "--seed=3")
    assert f"python run_trainer.py --path={data_dir / FOLDER}" in out
    files = contents(data_dir / FOLDER)
    assert sorted(files) == sorted([".sha256", *FORMATS["cifar10"].files])
    train = b"".join(files[f"data_batch_{i}.bin"] for i in range(1, 6))
    for split, count, data in (("train", 20, train), ("test", 7, files["test_batch.bin"])):
        records = np.frombuffer(data, np.uint8).reshape(count, 3073)
        images, labels = make_split(split, count, 3)
        np.testing.assert_array_equal(records[:, 0], labels)
        planes = records[:, 1:].reshape(count, 3, 32, 32)
        np.testing.assert_array_equal(planes.transpose(0, 2, 3, 1), images)
    assert {len(files[f"data_batch_{i}.bin"]) for i in range(1, 6)} == {4 * 3073}
    assert files["batches.meta.txt"].decode().split() == list(CLASS_NAMES)


def test_synthetic_data_depends_on_the_seed_and_on_nothing_else(tmp_path):
    made = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_script(f"--data_dir={tmp_path / place}", *SMALL, f"--seed={seed}") == 0
        made.append(contents(tmp_path / place / FOLDER))
    assert made[0] == made[1]
    assert made[0]["data_batch_1.bin"] != made[2]["data_batch_1.bin"]


def test_same_synthetic_data_is_not_written_again(run, data_dir):
    run(*SMALL)
    before = tree(data_dir)
    assert "nothing to do" in run(*SMALL)
    assert tree(data_dir) == before


def test_damaged_synthetic_data_is_mended(run, data_dir):
    run(*SMALL)
    whole = contents(data_dir / FOLDER)
    spoil(data_dir / FOLDER / "data_batch_1.bin", 5, 1)
    spoil(data_dir / FOLDER / "data_batch_1.bin", 6, 2)
    run(*SMALL)
    assert contents(data_dir / FOLDER) == whole


def test_synthetic_data_never_overwrites_other_data(get, run, data_dir):
    get()
    assert "other data" in run(*SMALL, status=1)
    (data_dir / FOLDER / ".sha256").unlink()
    (data_dir / FOLDER / "test_batch.bin").unlink()
    assert "other data" in run(*SMALL, status=1)
    assert (data_dir / FOLDER / "data_batch_1.bin").read_bytes() == batch(1)


def test_other_synthetic_data_does_not_count_as_the_one_asked_for(run, data_dir):
    run(*SMALL)
    before = tree(data_dir)
    assert "seed 0" in run(*SMALL, "--seed=1", status=1)
    assert tree(data_dir) == before


def test_synthetic_data_never_counts_as_cifar10(run, data_dir):
    run(*SMALL)
    before = tree(data_dir)
    assert "synthetic images" in run("--url=file:///nowhere", status=1)
    assert tree(data_dir) == before
