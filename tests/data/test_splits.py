"""Train, holdout and test: which images are in each, and which cannot be had."""

import numpy as np
import pytest
from conftest import random_images, write_records

from cifar10_input import ImageSet, mean_image
from cifar10_resnet.config import DataConfig
from cifar10_resnet.data import splits, synthetic
from cifar10_resnet.data.dataset import SYNTHETIC_IMAGES, find
from cifar10_resnet.errors import UserError

# --- Splits ---------------------------------------------------------------------------------------


def test_holdout_takes_the_last_training_images_and_leaves_the_test_images_unchanged(write_cifar10):
    train, test = random_images(15, seed=5), random_images(6, seed=6)
    data, config = find(str(write_cifar10(train=train, test=test))), DataConfig(holdout=4)
    kept, held_out = splits.load_training(data, config)
    np.testing.assert_array_equal(kept.images, train[0][:11])
    np.testing.assert_array_equal(kept.labels, train[1][:11])
    np.testing.assert_array_equal(held_out.images, train[0][11:])
    np.testing.assert_array_equal(held_out.labels, train[1][11:])
    expected = {"train": kept, "holdout": held_out, "test": ImageSet(*test)}
    for split, examples in expected.items():
        loaded = splits.load_split(data, config, split)
        np.testing.assert_array_equal(loaded.images, examples.images)
        np.testing.assert_array_equal(loaded.labels, examples.labels)


def test_without_a_holdout_every_training_image_is_trained_on(write_cifar10):
    data = find(str(write_cifar10()))
    kept, held_out = splits.load_training(data, DataConfig())
    assert (len(kept.labels), len(held_out.labels)) == (20, 0)
    assert len(splits.load_split(data, DataConfig(), "train").labels) == 20


@pytest.mark.parametrize("holdout", [20, 21, 5000])
def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(write_cifar10, holdout):
    with pytest.raises(UserError) as refused:
        splits.load_training(find(str(write_cifar10())), DataConfig(holdout=holdout))
    assert f"holdout={holdout}" in str(refused.value)
    assert "only 20 training images" in str(refused.value)


def test_scoring_a_holdout_that_the_run_does_not_have_is_refused(write_cifar10):
    with pytest.raises(UserError, match="no holdout"):
        splits.load_split(find(str(write_cifar10())), DataConfig(), "holdout")


def test_the_generated_data_set_is_made_in_memory(monkeypatch):
    counts = {"train": 60, "test": 30}
    for split, count in counts.items():
        monkeypatch.setitem(SYNTHETIC_IMAGES, split, count)
    data = find(name="synthetic")
    config = DataConfig("synthetic", synthetic.CLASS_NAMES, holdout=20)
    train_images, train_labels = synthetic.make_split("train", 60)
    test_images, test_labels = synthetic.make_split("test", 30)
    expected = {
        "train": (train_images[:40], train_labels[:40]),
        "holdout": (train_images[40:], train_labels[40:]),
        "test": (test_images, test_labels),
    }
    for split, (images, labels) in expected.items():
        loaded = splits.load_split(data, config, split)
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, labels)
    assert data.count_without_holdout(20) == 40


def test_a_written_copy_of_the_generated_data_reads_as_the_generated_data(tmp_path):
    images, labels = synthetic.make_split("test", 20)
    write_records(tmp_path / "test_batch.bin", images, labels)
    read = splits.load(find(str(tmp_path)), "test")
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)


@pytest.mark.parametrize(
    ("holdout", "evaluates", "scored"),
    [(0, False, None), (0, True, "test"), (4, False, "holdout"), (4, True, "holdout")],
)
def test_a_run_evaluates_on_its_holdout_or_on_the_test_images(
    write_cifar10, holdout, evaluates, scored
):
    train, test = random_images(15, seed=5), random_images(6, seed=6)
    data = find(str(write_cifar10(train=train, test=test)))
    images = splits.load_run(data, DataConfig(holdout=holdout), evaluates)
    kept = 15 - holdout
    np.testing.assert_array_equal(images.train.images, train[0][:kept])
    np.testing.assert_array_equal(images.mean, mean_image(train[0][:kept]))
    assert images.scored_split == ("holdout" if holdout else "test")
    expected = {"test": test[0], "holdout": train[0][11:], None: None}[scored]
    np.testing.assert_array_equal(images.scored and images.scored.images, expected)
