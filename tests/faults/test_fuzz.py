"""Hypothesis looks for bytes, flags and descriptions that end in anything but a sentence.

In the suite, the same few examples each time; `make fuzz` tries new ones for some ten minutes.
"""

import contextlib
import gzip
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing import fuzzed, result_or_sentence
from hypothesis import example, given
from hypothesis import strategies as st
from programs import run

from cifar10_resnet.config import RunConfig
from cifar10_resnet.data import archive, splits
from cifar10_resnet.data.dataset import find
from cifar10_resnet.formats import FORMATS
from cifar10_resnet.training.optimizers import learning_rates

# --- The description in a checkpoint --------------------------------------------------------------

ORDINARY = json.loads(RunConfig().to_json())
FIELDS = [(part, name) for part, fields in ORDINARY.items() for name in fields]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 10**12)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, -1, 0, 1e308, "paper", "momentum", "cifar100", "\ud800", "a\nb"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def descriptions(draw: Any) -> str:
    parts = json.loads(json.dumps(ORDINARY))
    for part, name in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        parts[part][name] = draw(JSON)
    if draw(st.booleans()):
        return json.dumps(parts)
    return json.dumps(draw(st.dictionaries(st.sampled_from([*parts, "more"]), JSON)))


def edited(part: str, **fields: Any) -> str:
    return json.dumps({**ORDINARY, part: {**ORDINARY[part], **fields}})


@fuzzed
@given(descriptions() | st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
@example(edited("training", num_iterations=10**18))
@example(edited("training", momentum=float("inf")))
@example(edited("training", seed=-1))
@example(edited("training", init_lr=10**400))
@example(edited("data", class_names=[1, None]))
@example(edited("data", class_names=["\x1b[31m", "dog"]))
@example(edited("data", holdout=-5))
@example(edited("model", num_classes=-1))
@example(edited("model", num_classes=10**6))
@example(edited("model", num_layers=6_000_002))
@example(edited("model", batch_norm_epsilon=1e300))
@example(edited("training", batch_size=10**8))
@example(edited("training", cutout=10**12))
@example(edited("data", class_names=["three", "class", "names"]))
@example(edited("data", class_names=["x"] * 10**6))
@example("[" * 100_000)
@example("1" * 10_000)
def test_a_description_is_a_run_or_a_one_line_error(text):
    run = result_or_sentence(RunConfig.from_json, text)
    if isinstance(run, str):
        return
    assert RunConfig.from_json(run.to_json()) == run
    assert run.model.name.isprintable()
    assert all(name.isprintable() for name in run.data.class_names)
    assert len(run.data.class_names) == run.model.num_classes <= 256
    assert run.model.num_layers <= 2_000
    assert run.training.batch_size <= 65_536
    if run.training.num_iterations < 10_000:
        assert len(learning_rates(run.training)) == run.training.num_iterations


# --- The flags ------------------------------------------------------------------------------------


def test_flags_are_refused_by_name_or_make_a_run(write_cifar10):
    folder = write_cifar10().parent
    run("tests/faults/fuzz_flags.py", cwd=folder)


# --- Records --------------------------------------------------------------------------------------


@st.composite
def batches(draw: Any) -> bytes:
    """Whole records more often than not, with labels in and out of range, cut and lengthened."""
    labels = draw(st.lists(st.integers(0, 9) | st.integers(0, 255), max_size=6))
    data = b"".join(bytes([label]) + bytes([label]) * 3072 for label in labels)
    data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
    data += draw(st.binary(max_size=3))
    return gzip.compress(data) if draw(st.integers(0, 9)) == 0 else data


@fuzzed
@given(batches(), st.binary(max_size=80) | st.none())
def test_a_file_of_records_is_read_exactly_or_refused_by_name_and_place(data, names):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "test_batch.bin"
        file.write_bytes(data)
        if names is not None:
            (Path(folder) / "batches.meta.txt").write_bytes(names)
        found = find(folder)
        read = result_or_sentence(splits.load, found, "test")
        config = result_or_sentence(found.describe)
    if isinstance(read, str):
        assert folder in read
        return
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    assert isinstance(config, str) or len(config.class_names) == 10
    np.testing.assert_array_equal(read.labels, records[:, 0])
    planes = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(read.images, planes)


# --- Archives -------------------------------------------------------------------------------------

LAYOUT = FORMATS["cifar10"]
PLACES = [f"{LAYOUT.folder}/{name}" for name in LAYOUT.files]


@st.composite
def members(draw: Any) -> bytes:
    name = draw(
        st.sampled_from([*PLACES, LAYOUT.folder, "/tmp/evil", "../evil", f"{PLACES[0]}/../../x"])
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    )
    info = tarfile.TarInfo(name)
    data = draw(st.sampled_from([b"", b"x", bytes(3073), bytes(2 * 3073)]))
    info.size = draw(st.just(len(data)) | st.integers(-5, 2**40))
    info.type = bytes([draw(st.sampled_from(b"0000000\x001234567xgLKSDV"))])
    info.linkname = draw(st.sampled_from(["", "/etc/passwd", "../x"]))
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@st.composite
def archives(draw: Any) -> bytes:
    tar = b"".join(draw(st.lists(members(), max_size=9)))
    tar = draw(st.just(tar + bytes(1024)) | st.just(tar) | st.binary().map(lambda b: tar + b))
    for _ in range(draw(st.integers(0, 3))):  # a few bytes changed
        if tar:
            place = draw(st.integers(0, len(tar) - 1))
            tar = tar[:place] + draw(st.binary(min_size=1, max_size=4)) + tar[place + 1 :]
    packed = gzip.compress(tar, 1, mtime=0)
    cut = draw(st.integers(0, 20))
    return packed[: len(packed) // 2] if cut == 0 else packed + draw(st.binary(max_size=2))


@fuzzed
@given(archives() | st.binary())
def test_an_archive_is_refused_or_unpacked_only_into_its_own_files(packed):
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "in" / "data"
        folder.mkdir(parents=True)
        (Path(top) / "a.tar.gz").write_bytes(packed)
        # BadData becomes a sentence in the program
        with contextlib.suppress(archive.BadData):
            archive.unpack(Path(top) / "a.tar.gz", LAYOUT, folder)
            assert {*LAYOUT.files} <= {*os.listdir(folder)}
        assert {*os.listdir(folder)} <= {*LAYOUT.files, archive.README_FILE}
        assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
        assert sorted(os.listdir(top)) == ["a.tar.gz", "in"]
        assert os.listdir(folder.parent) == ["data"]
    assert not os.path.exists("/tmp/evil")
