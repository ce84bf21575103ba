"""What a folder holds, told by its files; and what is known of each data set's form."""

import re
from pathlib import Path

import pytest
from programs import run_code

from cifar10_resnet import formats
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import CIFAR10_NAMES, FORMATS, Digest

FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
FIRST_FILES = {
    "cifar10": "data_batch_1.bin",
    "cifar100": "train.bin",
    "pictures": "pictures_train.bin",
}


def test_formats_are_known_before_anything_slow_is_imported():
    slow = "{'tensorflow', 'numpy'} & set(sys.modules)"
    run_code(f"import cifar10_resnet.formats, sys; sys.exit(bool({slow}))")


def test_the_official_archives_are_those_of_the_data_sets_own_page():
    site = "https://www.cs.toronto.edu/~kriz/"
    assert FORMATS["cifar10"].archive == (
        f"{site}cifar-10-binary.tar.gz",
        Digest("sha256", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    )
    assert FORMATS["cifar100"].archive == (
        f"{site}cifar-100-binary.tar.gz",
        Digest("md5", "03b5dce01913d631647c71ecec9e9cb8"),
    )
    assert FORMATS["pictures"].archive is None


def test_no_two_data_sets_share_a_files_name():
    files = [name for file_format in FORMATS.values() for name in file_format.files]
    assert len(files) == len(set(files)) == 7 + 4 + 3


def test_records_are_the_label_bytes_and_3072_pixels():
    sizes = {name: file_format.record_bytes for name, file_format in FORMATS.items()}
    assert sizes == {"cifar10": 3073, "cifar100": 3074, "pictures": 3073}


# --- Finding --------------------------------------------------------------------------------------


def refusal(path: Path | str | None, dataset: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        formats.find(None if path is None else str(path), dataset)
    assert str(refused.value).endswith(".")
    return str(refused.value)


def found(path: Path | str | None, dataset: str | None = None) -> tuple[str, str]:
    folder, file_format = formats.find(None if path is None else str(path), dataset)
    return folder, file_format.dataset


@pytest.mark.parametrize("dataset", FIRST_FILES)
def test_a_folder_tells_by_any_of_its_files_what_it_holds(tmp_path, dataset):
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
    assert f"{tmp_path} holds CIFAR-100, not CIFAR-10" in text
    assert "--dataset" in text


@pytest.mark.parametrize("dataset", [None, *FIRST_FILES])
def test_a_folder_of_other_things_is_told_how_to_get_a_data_set(tmp_path, dataset):
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
    assert "no data at cifar-100-binary" in refusal(None, "cifar100")
    assert "no data at cifar-10-batches-bin" in refusal(None)


def test_imported_pictures_have_no_place_of_their_own():
    assert "--path" in refusal(None, "pictures")


def test_a_path_that_is_a_file_is_told_so(tmp_path):
    file = tmp_path / "cifar-10-binary.tar.gz"
    file.write_bytes(b"x")
    text = refusal(file)
    assert f"{file} is a file" in text
    assert "folder" in text


def test_a_folder_that_may_not_be_read_is_named_with_the_reason(tmp_path, monkeypatch, as_nobody):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    monkeypatch.chdir(tmp_path)
    with as_nobody():
        assert "closed: Permission denied" in refusal("closed")


# --- Class names ----------------------------------------------------------------------------------


def write_names(folder: Path, file: str, count: int) -> tuple[str, ...]:
    names = tuple(f"class {i}" for i in range(count))
    (folder / file).write_text("".join(f"{name}\n" for name in names) + "\n")
    return names


@pytest.mark.parametrize(
    ("dataset", "file", "count", "coarse"),
    [
        ("cifar10", "batches.meta.txt", 10, False),
        ("cifar100", "fine_label_names.txt", 100, False),
        ("cifar100", "coarse_label_names.txt", 20, True),
        ("pictures", "class_names.txt", 2, False),
        ("pictures", "class_names.txt", 256, False),
    ],
)
def test_class_names_come_from_the_file_beside_the_records(tmp_path, dataset, file, count, coarse):
    names = write_names(tmp_path, file, count)
    assert FORMATS[dataset].class_names(str(tmp_path), coarse) == names


def test_class_names_are_cifar10s_where_no_file_tells(tmp_path):
    assert FORMATS["cifar10"].class_names(str(tmp_path)) == CIFAR10_NAMES


def names_refusal(dataset: str, folder: Path, coarse: bool = False) -> str:
    with pytest.raises(UserError) as refused:
        FORMATS[dataset].class_names(str(folder), coarse)
    return str(refused.value)


@pytest.mark.parametrize(
    ("dataset", "file", "counts", "expected"),
    [
        ("cifar10", "batches.meta.txt", [0, 9, 11, 100], "10"),
        ("cifar100", "fine_label_names.txt", [0, 10, 20, 99], "100"),
        ("pictures", "class_names.txt", [0, 1, 257], "2 to 256"),
    ],
)
def test_another_number_of_class_names_is_refused(tmp_path, dataset, file, counts, expected):
    for count in counts:
        write_names(tmp_path, file, count)
        text = names_refusal(dataset, tmp_path)
        assert str(tmp_path / file) in text
        assert re.search(rf"names {count} classes where .* has {expected}:", text)


def test_class_names_that_are_missing_or_no_text_are_refused(tmp_path):
    text = names_refusal("cifar100", tmp_path)
    assert f"{tmp_path / 'fine_label_names.txt'}: No such file" in text
    (tmp_path / "coarse_label_names.txt").write_bytes(b"\xff\xfe\x00cat")
    text = names_refusal("cifar100", tmp_path, coarse=True)
    assert "coarse_label_names.txt: it is not UTF-8 text" in text


@pytest.mark.parametrize("name", ["cat\x1b[31m", "cat\tdog", "\u202edog"])
def test_class_names_that_would_mar_a_terminal_are_refused(tmp_path, name):
    (tmp_path / "class_names.txt").write_text(f"bird\n{name}\n", encoding="utf-8")
    text = names_refusal("pictures", tmp_path)
    assert "cannot be printed" in text
    assert text.isprintable()


@pytest.mark.parametrize("dataset", ["cifar10", "pictures"])
def test_coarse_labels_are_refused_where_there_is_one_label(tmp_path, dataset):
    assert "--coarse_labels is for CIFAR-100" in names_refusal(dataset, tmp_path, coarse=True)
