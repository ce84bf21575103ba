"""From a folder of photos to a data folder: which records, which splits, and what is refused."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import contents
from PIL import Image

from cifar10_resnet import terminal
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.data import photo_folder
from cifar10_resnet.data.photos import read_photo_file
from cifar10_resnet.errors import UserError

COUNTS = {"ant": 9, "bee": 5, "cat": 20}


def save(file: Path, seed: int, size: tuple[int, int] = (32, 32)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(image).save(file)


@pytest.fixture
def image_dir(tmp_path) -> Path:
    """Three classes of noise, some photos larger, some JPEG or BMP, one in a deeper folder."""
    folder = tmp_path / "photos"
    seed = 0
    for name, count in COUNTS.items():
        for i in range(count):
            kind, size = [("png", (32, 32)), ("jpg", (50, 41)), ("bmp", (33, 70))][i % 3]
            deeper = "2024/may" if i == 4 else ""
            save(folder / name / deeper / f"{i:02}.{kind}", seed, size)
            seed += 1
    return folder


@pytest.fixture
def run(image_dir, tmp_path, capsys) -> Callable[..., str]:
    """Imports the photos and returns what is said on the way."""

    def run(to: str = "bin", source: Path = image_dir, **options: float) -> str:
        capsys.readouterr()
        photo_folder.import_photos(str(source), str(tmp_path / to), **options)
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def refusal(run) -> Callable[..., str]:
    """The sentence in which an import is refused."""

    def refusal(**arguments: object) -> str:
        with pytest.raises(UserError) as refused:
            run(**arguments)
        text = str(refused.value)
        assert text.endswith(".")
        assert "\n" not in text
        return text

    return refusal


def records(folder: Path, split: str) -> np.ndarray:
    data = (folder / f"pictures_{split}.bin").read_bytes()
    return np.frombuffer(data, np.uint8).reshape(-1, 3073)


def expected_records(image_dir: Path) -> list[bytes]:
    """The record of each photo, put together here byte by byte."""
    made = []
    for label, name in enumerate(sorted(COUNTS)):
        for file in (image_dir / name).rglob("*.*"):
            image = read_photo_file(str(file))
            made.append(bytes([label]) + b"".join(image[:, :, c].tobytes() for c in range(3)))
    return made


# --- What is written ------------------------------------------------------------------------------


def test_every_photo_becomes_one_record_in_one_of_the_splits(run, image_dir, tmp_path):
    out = run()
    folder = tmp_path / "bin"
    assert sorted(os.listdir(folder)) == [
        *("class_names.txt", "pictures_test.bin", "pictures_train.bin")
    ]
    assert (folder / "class_names.txt").read_text() == "ant\nbee\ncat\n"
    written = [r.tobytes() for split in ("train", "test") for r in records(folder, split)]
    assert sorted(written) == sorted(expected_records(image_dir))
    assert "34 of 34 files" in out
    assert sorted(os.listdir(tmp_path)) == ["bin", "photos"]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.2, {"ant": 2, "bee": 1, "cat": 4}),
        (0.5, {"ant": 4, "bee": 2, "cat": 10}),
        (0.01, {"ant": 1, "bee": 1, "cat": 1}),  # never none to test
        (0.99, {"ant": 8, "bee": 4, "cat": 19}),  # and never none to train
    ],
)
def test_the_share_of_test_images_is_taken_from_each_class(run, tmp_path, share, expected):
    out = run(test_share=share)
    tested = np.bincount(records(tmp_path / "bin", "test")[:, 0], minlength=3)
    trained = np.bincount(records(tmp_path / "bin", "train")[:, 0], minlength=3)
    assert tested.tolist() == list(expected.values())
    assert (tested + trained).tolist() == list(COUNTS.values())
    for name, count in expected.items():
        assert re.search(rf"^{name} +{COUNTS[name] - count} +{count}$", out, re.M)


def test_classes_are_mixed_so_that_a_holdout_of_the_last_images_has_all(run, tmp_path):
    run()
    labels = records(tmp_path / "bin", "train")[:, 0]
    assert (np.diff(labels.astype(int)) != 0).sum() > 5, "sorted, there would be two changes"


def test_the_same_photos_and_seed_give_the_same_bytes_and_another_seed_another_split(run, tmp_path):
    for to, seed in (("one", 0), ("two", 0), ("three", 1)):
        run(seed=seed, to=to)
    one, two, three = (contents(tmp_path / to) for to in ("one", "two", "three"))
    assert one == two
    assert one["pictures_test.bin"] != three["pictures_test.bin"]
    assert one["class_names.txt"] == three["class_names.txt"]


def test_the_order_in_which_threads_finish_changes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(photo_folder, "THREADS", 1)
    run(to="alone")
    monkeypatch.setattr(photo_folder, "THREADS", 2)
    third_is_read = threading.Event()

    def read(file: str) -> np.ndarray:
        if file.endswith("ant/00.png"):
            assert third_is_read.wait(30), "the second thread reads on meanwhile"
        if file.endswith("ant/02.bmp"):
            third_is_read.set()
        return read_photo_file(file)

    monkeypatch.setattr(photo_folder, "read_photo_file", read)
    run(to="together")
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_few_photos_are_under_way_at_a_time(image_dir, monkeypatch):
    monkeypatch.setattr(photo_folder, "AHEAD", 4)
    started = []

    def read(file: str) -> np.ndarray:
        started.append(file)
        return read_photo_file(file)

    monkeypatch.setattr(photo_folder, "read_photo_file", read)
    files = sorted(str(path) for path in (image_dir / "cat").rglob("*.*"))
    for taken, _ in enumerate(photo_folder.read_all(files), 1):
        assert len(started) < taken + 4
    assert sorted(started) == files


def test_a_terminal_gets_one_live_line_and_a_file_gets_plain_ones(run, monkeypatch):
    plain = run(to="one")
    assert "\r" not in plain
    assert re.search(r"^ \d0%  read \d+ of 34 files$", plain, re.M)
    assert plain.count("read ") == 10
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(terminal.LiveLine, "SECONDS", 0)
    live = run(to="two")
    assert "\r" in live
    assert re.search(r" #+\.* read \d+ of 34 files", live)
    assert "\n 50%" not in live


# --- What is skipped ------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_reported_and_change_nothing_else(run, image_dir, tmp_path):
    run(to="before")
    whole = (image_dir / "cat/01.jpg").read_bytes()
    spoilt = {
        "ant/cut off.jpg": (whole[:500], "damaged"),
        "ant/notes.txt": (b"not a photo", "is not a JPEG, PNG or BMP photo"),
        "bee/empty.png": (b"", "is empty"),
        "cat/2024/line\nbreak\x1b[31m.png": (b"x", "cat/2024/line?break?[31m.png is not"),
        "loose.png": (whole, "is not in a class folder"),
    }
    for name, (data, _) in spoilt.items():
        (image_dir / name).parent.mkdir(exist_ok=True)
        (image_dir / name).write_bytes(data)
    not_text = os.fsencode(image_dir / "cat") + b"/\xff.png"
    with open(not_text, "wb") as file:
        file.write(b"x")
    os.mkfifo(image_dir / "ant" / "pipe.png")
    (image_dir / "ant" / "dangling.png").symlink_to("nowhere")
    (image_dir / "ant" / "round").symlink_to(image_dir)
    # hidden ones are not even mentioned
    (image_dir / "ant" / ".DS_Store").write_bytes(b"x")
    (image_dir / ".git").mkdir()
    (image_dir / "bee" / ".thumbnails").mkdir()
    (image_dir / "bee" / ".thumbnails" / "00.png").write_bytes(whole)

    out = run(to="after")
    assert contents(tmp_path / "before") == contents(tmp_path / "after")
    skipped = re.findall("^skipped: (.*)$", out, re.M)
    assert len(skipped) == len(spoilt) + 4
    for name, (_, reason) in spoilt.items():
        assert any(reason in line and name[:8] in line for line in skipped)
    assert any("cat/?.png" in line for line in skipped)
    for name in ("pipe.png", "dangling.png", "round"):
        assert any(f"ant/{name} is not a file" in line for line in skipped)
    assert "\x1b" not in out
    assert "34 of 42 files" in out


# --- What is refused ------------------------------------------------------------------------------


def make_classes(folder: Path, *names: str, photos: int = 2) -> Path:
    for name in names:
        for i in range(photos):
            save(folder / name / f"{i}.png", i)
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder, "source cannot be read: No such file"),
        (lambda folder: folder.touch() or folder, "source cannot be read: Not a directory"),
        (lambda folder: folder.mkdir() or folder, "has fewer than two sub-folders"),
        (lambda folder: save(folder / "a.png", 0) or folder, "has fewer than two sub-folders"),
        (lambda folder: make_classes(folder, "cat"), "has fewer than two sub-folders"),
        (lambda folder: make_classes(folder, "cat", ".hidden"), "has fewer than two sub-folders"),
        (
            lambda folder: make_classes(folder, *(f"c{i}" for i in range(257)), photos=0),
            "has 257 sub-folders. Use up to 256",
        ),
        (lambda folder: make_classes(folder, "a", "b", photos=0), r"Too few files in a \(0\), b"),
        (lambda folder: make_classes(folder, "a", "b", photos=1), r"Too few files in a \(1\), b"),
        (lambda folder: make_classes(folder, "Train", "test"), "is already split into"),
        (lambda folder: make_classes(folder, "a", "b\nc"), r"/b\\nc' .*Rename"),
        (lambda folder: make_classes(folder, "a", " b"), "/ b' .*Rename"),
    ],
    ids=[
        *("missing", "a file", "empty", "photos without classes", "one class", "one and hidden"),
        *("too many classes", "empty classes", "one photo each", "splits", "line break", "space"),
    ],
)
def test_folders_that_make_no_data_set_are_refused_and_nothing_is_written(
    refusal, tmp_path, make, reason
):
    source = make(tmp_path / "source")
    err = refusal(source=source)
    assert re.search(reason, err)
    assert not (tmp_path / "bin").exists()
    assert not (tmp_path / "bin.part").exists()


def test_a_class_of_which_one_photo_can_be_read_is_refused_by_name(refusal, tmp_path):
    source = make_classes(tmp_path / "source", "a", "b", "c", photos=3)
    for name, damaged in (("a", 1), ("b", 2), ("c", 3)):
        for i in range(damaged):
            (source / name / f"{i}.png").write_bytes(b"x")
    err = refusal(source=source)
    assert "Too few readable photos" in err
    assert "b (1), c (0)." in err
    assert sorted(os.listdir(tmp_path)) == ["photos", "source"]


def test_as_many_classes_as_a_label_has_values_are_accepted(run, tmp_path):
    source = make_classes(tmp_path / "source", *(f"c{i:03}" for i in range(256)))
    run(source=source)
    for split in ("train", "test"):
        assert sorted(records(tmp_path / "bin", split)[:, 0]) == list(range(256))


def test_a_place_that_is_taken_is_left_unchanged(run, refusal, tmp_path):
    run(to="own")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    (tmp_path / "file").touch()
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    for to in ("own", "other", "file", "file/bin"):
        assert str(tmp_path / to) in refusal(to=to)
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    (tmp_path / "free").mkdir()
    run(to="free")
    assert len(os.listdir(tmp_path / "free")) == 3


def test_a_place_among_the_photos_is_refused_also_behind_a_link(refusal, image_dir, tmp_path):
    (tmp_path / "link").symlink_to(image_dir)
    before = sorted(image_dir.rglob("*"))
    for to in ("photos", "photos/bin", "link/bin", "photos/cat/bin"):
        assert "it is inside --image_dir" in refusal(to=to)
    assert sorted(image_dir.rglob("*")) == before


def test_a_folder_that_may_not_be_read_is_named(image_dir, monkeypatch, as_nobody):
    (image_dir / "bee" / "closed").mkdir(mode=0)
    monkeypatch.chdir(image_dir)
    with (
        as_nobody(),
        pytest.raises(UserError, match="bee/closed cannot be read: Perm"),
    ):
        photo_folder.find_classes(Path())


# --- Interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_while_photos_are_read_finds_nothing_left(run, tmp_path, monkeypatch, number):
    def read(file: str) -> np.ndarray:
        if file.endswith("bee/01.jpg"):
            os.kill(os.getpid(), number)
        return read_photo_file(file)

    with monkeypatch.context() as patch:
        patch.setattr(photo_folder, "read_photo_file", read)
        assert exits_with_a_sentence(run)() == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert os.listdir(tmp_path) == ["photos"]
    run()
