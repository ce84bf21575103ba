"""The plain way of the download script, its flags and its messages."""

import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable

import numpy as np
import pytest
from conftest import contents
from downloads import (
    ARCHIVE,
    FOLDER,
    GOOD,
    SCRIPT,
    assert_complete,
    good_members,
    make_official,
    member,
    run_script,
    sha256,
    tar_of,
    tree,
    zipped,
)

from cifar10_resnet import terminal
from cifar10_resnet.formats import FORMATS, Archive, Digest

SMALL = ("--synthetic", "--synthetic_train_images=20", "--synthetic_test_images", "7")


# --- The plain way --------------------------------------------------------------------------------


def test_download_unpacks_every_file_and_names_the_next_command(get, data_dir):
    out = get()
    assert_complete(data_dir)
    assert f"python run_trainer.py --path={data_dir / FOLDER}" in out.splitlines()[-1]


def test_no_flags_fill_the_folder_in_the_current_directory(site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_official(monkeypatch, "cifar10", Archive(site.url, Digest("sha256", sha256(GOOD))))
    assert run_script() == 0
    assert_complete(tmp_path)
    assert f"--path={FOLDER}\n" in capsys.readouterr().out


def test_without_a_digest_a_mirror_must_have_the_official_archive(run, site, data_dir):
    err = run(f"--url={site.url}", status=1)
    assert sha256(GOOD) in err
    assert FORMATS["cifar10"].archive.digest.value in err
    assert "--sha256" in err
    assert os.listdir(data_dir) == []


def test_keep_archive_keeps_it_next_to_the_data(get, data_dir):
    get("--keep_archive")
    assert_complete(data_dir, ARCHIVE)
    assert (data_dir / ARCHIVE).read_bytes() == GOOD


def test_archive_that_exists_is_used_and_left_unchanged(get, site, data_dir):
    (data_dir / ARCHIVE).write_bytes(GOOD)
    get()
    assert_complete(data_dir, ARCHIVE)
    assert site.requests == []


def test_other_archive_with_its_name_is_refused_and_left_unchanged(get, data_dir):
    (data_dir / ARCHIVE).write_bytes(b"mine")
    err = get(status=1)
    assert sha256(b"mine") in err
    assert sha256(GOOD) in err
    assert (data_dir / ARCHIVE).read_bytes() == b"mine"


def test_file_url_works_like_any_mirror(run, tmp_path, data_dir):
    (tmp_path / "my archive.tgz").write_bytes(GOOD)
    run(f"--url={(tmp_path / 'my archive.tgz').as_uri()}", "--sha256", sha256(GOOD).upper())
    assert_complete(data_dir)


def test_extra_files_in_the_archive_are_left_in_it(run, tmp_path, data_dir):
    extras = [member(f"{FOLDER}/more.bin", b"x"), member("elsewhere/test_batch.bin", b"x" * 600)]
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(zipped(tar_of(extras + good_members())))
    run(f"--url={archive.as_uri()}", f"--sha256={sha256(archive.read_bytes())}")
    assert_complete(data_dir)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_common_kind_of_tar_is_read(run, tmp_path, data_dir, tar_format):
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w:gz", format=tar_format, pax_headers={"a": "b"}
    ) as tar:
        for info, data in good_members():
            info.name, info.mtime = f"./{info.name}", 0.5  # a half second needs a pax header
            if tar_format != tarfile.PAX_FORMAT:
                info.mtime = 0
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar.gz").write_bytes(buffer.getvalue())
    run(f"--url={(tmp_path / 'a.tar.gz').as_uri()}", f"--sha256={sha256(buffer.getvalue())}")
    assert_complete(data_dir)


# --- CIFAR-100 ------------------------------------------------------------------------------------


def cifar100_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for name in ("train.bin", "test.bin"):
        records = rng.integers(0, 256, (5, 3074), np.uint8)
        records[:, 0], records[:, 1] = rng.integers(0, 20, 5), rng.integers(0, 100, 5)
        files[name] = records.tobytes()
    for kind, count in (("coarse", 20), ("fine", 100)):
        files[f"{kind}_label_names.txt"] = "".join(f"{kind}{i}\n" for i in range(count)).encode()
    return files


def cifar100_archive(**changed: bytes) -> bytes:
    files = {**cifar100_files(), **{name.replace("_bin", ".bin"): d for name, d in changed.items()}}
    members = [member(f"cifar-100-binary/{name}", data) for name, data in files.items()]
    return zipped(tar_of([member("cifar-100-binary/", type=tarfile.DIRTYPE), *members]))


@pytest.fixture
def get_100(run, site, monkeypatch) -> Callable[..., str]:
    """Downloads CIFAR-100 from its official address, for which only an MD5 is known."""
    site.archive = cifar100_archive()
    url = site.url.replace(ARCHIVE, "cifar-100-binary.tar.gz")
    digest = Digest("md5", hashlib.md5(site.archive).hexdigest())
    make_official(monkeypatch, "cifar100", Archive(url, digest))
    return lambda *flags, **kw: run("--dataset=cifar100", *flags, **kw)


def test_cifar100_has_a_folder_of_its_own_and_an_archive_verified_by_its_md5(
    get_100, site, data_dir
):
    out = get_100("--keep_archive")
    folder = data_dir / "cifar-100-binary"
    assert f"python run_trainer.py --path={folder}\n" in out
    assert sorted(os.listdir(data_dir)) == [folder.name, "cifar-100-binary.tar.gz"]
    found = contents(folder)
    manifest = found.pop(".sha256").decode()
    assert found == cifar100_files()
    assert f"archive with the MD5 {hashlib.md5(site.archive).hexdigest()}" in manifest
    assert f"{sha256(found['train.bin'])}  train.bin" in manifest
    before = tree(data_dir)
    assert "nothing to do" in get_100()
    assert tree(data_dir) == before


def test_cifar10_and_cifar100_lie_side_by_side(get, get_100, site, data_dir):
    get_100()
    site.archive = GOOD
    get()
    assert_complete(data_dir, "cifar-100-binary")


def test_another_archive_of_cifar100_is_refused_by_its_md5_unless_its_sha256_is_given(
    get_100, site, data_dir
):
    site.archive = cifar100_archive(test_bin=cifar100_files()["train.bin"])
    err = get_100(status=1)
    for digest in (hashlib.md5(site.archive).hexdigest(), f"--sha256={sha256(site.archive)}"):
        assert digest in err
    assert os.listdir(data_dir) == []
    get_100(f"--sha256={sha256(site.archive)}")
    assert contents(data_dir / "cifar-100-binary")["test.bin"] == cifar100_files()["train.bin"]


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (GOOD, "contains no cifar-100-binary/train.bin"),
        (cifar100_archive(test_bin=bytes(3073)), "not a multiple of 3074"),
        (cifar100_archive(test_bin=bytes([20]) + bytes(3073)), "coarse label 20 in record 0"),
        (cifar100_archive(test_bin=bytes([19, 100]) + bytes(3072)), "fine label 100 in record 0"),
    ],
    ids=["CIFAR-10", "cut off", "coarse label", "fine label"],
)
def test_an_archive_of_something_else_is_not_unpacked_as_cifar100(
    run, tmp_path, data_dir, archive, reason
):
    (tmp_path / "a.tar.gz").write_bytes(archive)
    flags = (f"--url={(tmp_path / 'a.tar.gz').as_uri()}", f"--sha256={sha256(archive)}")
    assert reason in run("--dataset=cifar100", *flags, status=1)
    assert os.listdir(data_dir) == []


# --- Flags and messages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--url=ftp://example.org/a"],
        ["--url=/a/path"],
        ["--url=http://"],
        ["--url=http://[::1/a"],
        ["--url=http://example.org/a b"],
        ["--url=file://far.example.org/a"],
        ["--sha256=abc"],
        ["--timeout=0"],
        ["--timeout=nan"],
        ["--timeout=soon"],
        ["--synthetic_train_images=12"],
        ["--synthetic_train_images=0"],
        ["--synthetic_test_images=many"],
        ["--synthetic_test_images=21839"],
        ["--seed=-1"],
        ["--seed=3"],
        ["--synthetic_train_images=20"],
        ["--synthetic", "--keep_archive"],
        ["--synthetic", "--dataset=cifar100"],
        ["--dataset=pictures"],
        ["--synth"],
        ["somewhere"],
    ],
    ids=" ".join,
)
def test_wrong_flag_ends_in_one_line_that_names_it(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(*flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert flags[0].partition("=")[0] in error
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made_ends_with_a_one_line_error(run, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in run(f"--data_dir={tmp_path / 'file' / 'data'}", status=1)


def test_help_needs_neither_tensorflow_nor_numpy(tmp_path):
    for name in ("tensorflow", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, SCRIPT, "--help"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert result.stderr == ""
    for flag in ("data_dir", "url", "sha256", "keep_archive", "synthetic", "seed"):
        assert flag in result.stdout


def test_error_of_the_real_program_is_one_line_and_status_1(tmp_path):
    command = [sys.executable, SCRIPT, f"--data_dir={tmp_path}", "--url=file:///nowhere/a.tar.gz"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("cifar10_download_and_extract.py: error: ")


def test_a_run_whose_output_nobody_reads_ends_quietly(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, SCRIPT, f"--data_dir={tmp_path}", *SMALL]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_terminal_gets_one_live_line_and_a_pipe_gets_plain_ones(get, monkeypatch, data_dir):
    plain = get("--keep_archive")
    assert "\r" not in plain
    assert "100%" in plain
    for path in (data_dir / FOLDER).iterdir():
        path.unlink()
    (data_dir / ARCHIVE).unlink()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(terminal.LiveLine, "SECONDS", 0)
    live = get()
    assert re.search(r"100% #+ .* MB/s, 0:00:00 left\r +\r", live)
