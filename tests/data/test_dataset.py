"""Data sets: where they are found, what their files contain, and which files are refused."""

import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    TRAIN_FILES,
    random_cifar100,
    random_images,
    write_cifar100,
    write_photos,
)

import cifar10_input
from cifar10_resnet.config import DataConfig
from cifar10_resnet.data import splits, synthetic
from cifar10_resnet.data.dataset import Dataset, find, find_asked
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import FORMATS

FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
FIRST_FILES = {
    "cifar10": "data_batch_1.bin",
    "cifar100": "train.bin",
    "pictures": "pictures_train.bin",
}

# --- Finding --------------------------------------------------------------------------------------


def refusal(path: Path | str | None, name: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        find(None if path is None else str(path), name)
    assert str(refused.value).endswith(".")
    return str(refused.value)


def found(path: Path | str | None, name: str | None = None) -> tuple[str, str]:
    data = find(None if path is None else str(path), name)
    assert data.file_format is FORMATS[data.name]
    return data.folder, data.name


@pytest.mark.parametrize("dataset", FIRST_FILES)
def test_any_file_of_a_folder_identifies_its_data_set(tmp_path, dataset):
    file_format = FORMATS[dataset]
    for name in (*file_format.train_files, *file_format.test_files):
        file = tmp_path / name
        file.touch()
        assert found(tmp_path) == found(tmp_path, dataset) == (str(tmp_path), dataset)
        file.unlink()


@pytest.mark.parametrize("dataset", FOLDERS)
def test_the_folder_above_will_do_and_so_will_no_path_at_all(tmp_path, monkeypatch, dataset):
    folder = tmp_path / FOLDERS[dataset]
    folder.mkdir()
    (folder / FIRST_FILES[dataset]).touch()
    assert found(tmp_path) == found(folder) == (str(folder), dataset)
    monkeypatch.chdir(tmp_path)
    assert found(None, dataset) == (FOLDERS[dataset], dataset)
    if dataset == "cifar10":
        assert found(None) == (FOLDERS[dataset], dataset)


@pytest.mark.parametrize("apart", [True, False], ids=["two folders", "one folder"])
def test_where_two_data_sets_lie_together_the_flag_chooses(tmp_path, apart):
    places = {}
    for dataset in FOLDERS:
        places[dataset] = tmp_path / FOLDERS[dataset] if apart else tmp_path
        places[dataset].mkdir(exist_ok=True)
        (places[dataset] / FIRST_FILES[dataset]).touch()
    text = refusal(tmp_path)
    for told in ("CIFAR-10 and CIFAR-100", "--dataset"):
        assert told in text
    for dataset, place in places.items():
        assert found(tmp_path, dataset) == (str(place), dataset)


def test_another_data_set_than_the_one_asked_for_is_refused_by_both_names(tmp_path):
    (tmp_path / "train.bin").touch()
    text = refusal(tmp_path, "cifar10")
    assert f"path={tmp_path} is invalid: the folder contains CIFAR-100, not CIFAR-10." in text
    assert "--dataset" in text


@pytest.mark.parametrize("dataset", [None, *FIRST_FILES])
def test_a_folder_of_other_things_is_an_error_that_says_how_to_get_a_data_set(tmp_path, dataset):
    (tmp_path / "cats").mkdir()
    (tmp_path / "train.txt").touch()
    text = refusal(tmp_path, dataset)
    for told in (str(tmp_path), "cifar10_download_and_extract.py", "cifar10_resnet import"):
        assert told in text


def test_a_path_that_is_missing_is_named_with_the_command_that_gets_the_data(tmp_path, monkeypatch):
    text = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text
    assert re.search(r"`\S*python3? cifar10_download_and_extract\.py`", text)
    monkeypatch.chdir(tmp_path)
    assert "/cifar10_download_and_extract.py --dataset=cifar100`" in refusal(None, "cifar100")
    for name, folder in FOLDERS.items():
        text = refusal(None, name)
        assert f"path={folder} is invalid: the folder does not exist." in text
    assert refusal(None) == refusal(None, "cifar10")


def test_imported_photos_have_no_place_of_their_own():
    assert "--path" in refusal(None, "pictures")


def test_a_path_that_is_a_file_is_reported(tmp_path):
    file = tmp_path / "cifar-10-binary.tar.gz"
    file.write_bytes(b"x")
    text = refusal(file)
    assert f"path={file} is invalid: it is a file." in text
    assert "folder" in text


def test_a_folder_that_may_not_be_read_is_named_with_the_reason(tmp_path, monkeypatch, as_nobody):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    monkeypatch.chdir(tmp_path)
    with as_nobody():
        assert "closed cannot be read: Permission denied" in refusal("closed")


def test_synthetic_images_lie_nowhere_and_need_no_path(tmp_path):
    assert find(None, "synthetic") == find(str(tmp_path), "synthetic") == Dataset("synthetic")


def test_a_run_keeps_its_own_data_set_if_nobody_asks_for_another(write_cifar10):
    assert find_asked(None, None) is None
    folder = str(write_cifar10())
    assert find_asked(folder, None) == find_asked(folder, "cifar10") == Dataset("cifar10", folder)


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

    train = splits.load(find(str(tmp_path)), "train")
    assert train.images.shape == (10, 32, 32, 3)
    assert train.images.dtype == np.uint8
    assert np.issubdtype(train.labels.dtype, np.integer)
    assert train.labels.tolist() == list(range(10))
    for place, image in enumerate(train.images):
        assert (image[:, 0::2] == place).all()
        assert (image[:, 1::2] == [10, 20, 30]).all()

    test = splits.load(find(str(tmp_path)), "test")
    assert test.labels.tolist() == [7]
    assert (test.images[0] == np.arange(32)[None, :, None]).all(), "a row of a plane is a row"


def test_random_images_come_back_as_they_were_written(write_cifar10):
    images, labels = random_images(23)
    folder = write_cifar10(train=(images, labels))
    read = splits.load(find(str(folder)), "train")
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)


def test_path_may_be_the_folder_or_the_one_above_it(write_cifar10):
    folder = write_cifar10()
    for split in ("train", "test"):
        inside, above = (splits.load(find(str(p)), split) for p in (folder, folder.parent))
        np.testing.assert_array_equal(inside.images, above.images)
        np.testing.assert_array_equal(inside.labels, above.labels)


@pytest.mark.parametrize(("coarse", "column"), [(False, 1), (True, 0)])
def test_cifar100_has_a_coarse_and_a_fine_label(tmp_path, coarse, column):
    images, labels = random_cifar100(30)
    folder = str(write_cifar100(tmp_path, train=(images, labels)))
    read = splits.load(find(folder), "train", coarse_labels=coarse)
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels[:, column])
    assert read.labels.dtype == np.int32
    # byte by byte, as its description has it: coarse, fine, 1024 red, 1024 green, 1024 blue
    record = (tmp_path / "train.bin").read_bytes()[7 * 3074 : 8 * 3074]
    assert tuple(record[:2]) == tuple(labels[7])
    assert record[2 + 2 * 1024 + 33] == images[7, 1, 1, 2]


def test_imported_photos_have_as_many_classes_as_names(tmp_path):
    folder = str(write_photos(tmp_path, num_classes=3))
    read = splits.load(find(folder), "train")
    np.testing.assert_array_equal(read.images, random_images(15, seed=1)[0])
    np.testing.assert_array_equal(read.labels, np.arange(15) % 3)


def test_data_is_described_by_the_files_that_are_there(write_cifar10, tmp_path):
    names = tuple(f"class {c}" for c in "abcdefghij")
    folder = write_cifar10(names="\n".join(names) + "\n\n")
    assert find(str(folder)) == find(str(folder.parent))
    assert find(str(folder)).describe() == DataConfig("cifar10", names)
    fine, coarse = (tuple(f"{k} {i}" for i in range(n)) for k, n in (("fine", 100), ("coarse", 20)))
    folder = str(write_cifar100(tmp_path / "100"))
    assert find(folder) == find(folder, "cifar100")
    assert find(folder).describe() == DataConfig("cifar100", fine)
    expected = DataConfig("cifar100", coarse, coarse_labels=True)
    assert find(folder).describe(coarse_labels=True) == expected
    folder = str(write_photos(tmp_path / "pictures", 2))
    assert find(folder).describe() == DataConfig("pictures", ("class 0", "class 1"))
    assert find(None, "synthetic").describe() == DataConfig("synthetic", synthetic.CLASS_NAMES)


def test_images_are_counted_from_the_sizes_of_the_files(write_cifar10):
    folder = str(write_cifar10(train=random_images(15)))
    data = find(folder)
    assert (data.count("train"), data.count("test")) == (15, 4)
    assert data.count_without_holdout(0) == 15
    assert data.count_without_holdout(14) == 1
    assert data.files("train") == {os.path.join(folder, name): 3 for name in TRAIN_FILES}


def test_a_split_is_checked_when_it_is_asked_for_and_no_other_is(write_cifar10):
    folder = write_cifar10()
    for name in TRAIN_FILES:
        (folder / name).unlink()
    data = find(str(folder))
    assert data.count("test") == 4
    with pytest.raises(UserError, match="data_batch_1"):
        data.count("train")


# --- Files that are refused -----------------------------------------------------------------------


def reading_refusal(path: Path | str, split: str = "train", name: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        splits.load(find(str(path), name), split)
    assert str(refused.value).endswith(".")
    return str(refused.value)


@pytest.mark.parametrize("name", ["data_batch_1.bin", "data_batch_5.bin", "test_batch.bin"])
def test_a_missing_batch_is_named(write_cifar10, name):
    folder = write_cifar10()
    (folder / name).unlink()
    text = reading_refusal(folder, "test" if name == "test_batch.bin" else "train")
    assert f"{folder / name} is missing" in text


def test_a_folder_in_place_of_a_batch_is_reported(write_cifar10):
    file = write_cifar10() / "data_batch_2.bin"
    file.unlink()
    file.mkdir()
    text = reading_refusal(file.parent)
    assert f"{file} is a folder" in text
    assert "3073-byte records" in text


@pytest.mark.parametrize("name", ["train.bin", "fine_label_names.txt", "pictures_train.bin"])
def test_a_missing_file_of_the_other_data_sets_is_named(tmp_path, name):
    write_photos(tmp_path, 3) if "pictures" in name else write_cifar100(tmp_path)
    (tmp_path / name).unlink()
    data = find(str(tmp_path))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        splits.load_split(data, data.describe(), "train")


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
            return write_cifar10(train=random_images(15))
        if dataset == "cifar100":
            return write_cifar100(tmp_path / "100", train=random_cifar100(3))
        return write_photos(tmp_path / "pictures", 12, train=3)

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
    text = reading_refusal(file.parent)
    assert str(file) in text
    places = {"two": 2, "three": 3}
    places = {word: count * record_bytes for word, count in places.items()}
    assert re.search(found.format(all_but_one=record_bytes - 1, **places), text)
    assert str(record_bytes) in text


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
def test_a_label_out_of_range_is_reported_by_file_record_byte_and_value(
    write_data, dataset, split, name, record, column, label, told
):
    file = write_data(dataset) / name
    data = bytearray(file.read_bytes())
    data[record * (3074 if dataset == "cifar100" else 3073) + column] = label
    file.write_bytes(data)
    text = reading_refusal(file.parent, split)
    assert str(file) in text
    assert told in text
    most = {"cifar10": 9, "cifar100": 99 if column else 19, "pictures": 11}[dataset]
    assert f"0 to {most} are expected" in text


@pytest.mark.parametrize("records", [0, 1.5, 2])
def test_a_file_that_shrinks_while_it_is_read_is_named_with_the_place(
    write_cifar10, monkeypatch, records
):
    file = write_cifar10(train=random_images(15)) / "data_batch_3.bin"
    unwatched = cifar10_input._aligned

    def shrinking(shape: list[int]) -> np.ndarray:  # between the check and the reading
        os.truncate(file, int(records * 3073))
        return unwatched(shape)

    monkeypatch.setattr(cifar10_input, "_aligned", shrinking)
    text = reading_refusal(file.parent)
    assert f"{file} changed while it was read: it had 9,219 bytes and now ends at byte " in text
    assert f"byte {int(records * 3073):,}. Start again" in text


def test_a_file_that_vanishes_while_it_is_read_is_named(write_cifar10, monkeypatch):
    file = write_cifar10(train=random_images(15)) / "data_batch_3.bin"
    unwatched = cifar10_input._aligned
    monkeypatch.setattr(
        cifar10_input, "_aligned", lambda shape: (os.remove(file), unwatched(shape))[1]
    )
    assert f"cannot read {file} from byte 0 on: No such file" in reading_refusal(file.parent)


def test_one_data_set_is_not_read_as_another(write_data, tmp_path):
    folder = write_data("cifar100")
    assert "contains CIFAR-100, not CIFAR-10" in reading_refusal(folder, name="cifar10")
    # Nor under another's names, because the sizes of the records differ.
    disguised = tmp_path / "disguised"
    disguised.mkdir()
    (disguised / "test_batch.bin").write_bytes((folder / "test.bin").read_bytes())
    assert "3073 (CIFAR-10)" in reading_refusal(disguised, "test")


def test_the_first_of_several_wrong_labels_is_reported(write_cifar10):
    folder = write_cifar10()
    for name, label in (("data_batch_2.bin", 44), ("data_batch_4.bin", 55)):
        file = folder / name
        file.write_bytes(bytes([label]) + file.read_bytes()[1:])
    text = reading_refusal(folder)
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
        find(".").count("train")
    assert "data_batch_3.bin" in str(refused.value)
    assert "Permission denied" in str(refused.value)


def test_a_data_set_that_grows_between_its_check_and_the_reading_is_refused(
    write_cifar10, monkeypatch
):
    folder = write_cifar10()
    unwatched = splits.read_records

    def growing(*args: object) -> object:
        with open(folder / "test_batch.bin", "ab") as file:
            file.write(bytes(3073))
        return unwatched(*args)

    monkeypatch.setattr(splits, "read_records", growing)
    assert f"{folder} changed while it was read" in reading_refusal(folder, "test")
