"""The formats of the data sets: files, records and class names."""

import re
from pathlib import Path

import pytest
from programs import run_code

from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import CIFAR10_NAMES, FORMATS, Digest


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
def test_class_names_come_from_the_file_next_to_the_records(tmp_path, dataset, file, count, coarse):
    names = write_names(tmp_path, file, count)
    assert FORMATS[dataset].class_names(str(tmp_path), coarse) == names


def test_class_names_are_cifar10s_without_a_file_of_names(tmp_path):
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
        assert re.search(rf"contains {count} class names\. Use .* with {expected} names\.", text)


def test_class_names_that_are_missing_or_no_text_are_refused(tmp_path):
    text = names_refusal("cifar100", tmp_path)
    assert f"{tmp_path / 'fine_label_names.txt'} cannot be read: No such file" in text
    (tmp_path / "coarse_label_names.txt").write_bytes(b"\xff\xfe\x00cat")
    text = names_refusal("cifar100", tmp_path, coarse=True)
    assert "coarse_label_names.txt is not UTF-8 text" in text


@pytest.mark.parametrize("name", ["cat\x1b[31m", "cat\tdog", "\u202edog"])
def test_class_names_that_would_mar_a_terminal_are_refused(tmp_path, name):
    (tmp_path / "class_names.txt").write_text(f"bird\n{name}\n", encoding="utf-8")
    text = names_refusal("pictures", tmp_path)
    assert "cannot be printed" in text
    assert text.isprintable()


@pytest.mark.parametrize("dataset", ["cifar10", "pictures"])
def test_coarse_labels_are_refused_where_there_is_one_label(tmp_path, dataset):
    assert "coarse_labels=True is for CIFAR-100" in names_refusal(dataset, tmp_path, coarse=True)
