"""A data folder that already exists, is damaged, is in use, or is left from an interrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from downloads import (
    FOLDER,
    GOOD,
    HALF,
    PART,
    SCRIPT,
    Site,
    assert_complete,
    good_files,
    sha256,
    spoil,
    tree,
)

from cifar10_resnet import storage
from cifar10_resnet.data.data_folder import DataFolder

# --- A second run ---------------------------------------------------------------------------------


def test_second_run_verifies_and_touches_nothing(get, site, data_dir):
    get()
    before, asked = tree(data_dir), len(site.requests)
    assert "nothing to do" in get()
    assert tree(data_dir) == before
    assert len(site.requests) == asked


def test_manifest_is_what_sha256sum_writes(get, data_dir):
    get()
    lines = (data_dir / FOLDER / ".sha256").read_text().splitlines()
    assert lines[0].startswith("# ")
    files = {name: data for name, data in good_files().items() if name != "readme.html"}
    assert lines[1:] == [f"{sha256(data)}  {name}" for name, data in files.items()]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: spoil(folder / "data_batch_3.bin", 100, 7),
        lambda folder: spoil(folder / "data_batch_3.bin", 3073, 10),
        lambda folder: os.truncate(folder / "test_batch.bin", 3072),
        lambda folder: (folder / "batches.meta.txt").unlink(),
        lambda folder: (folder / ".sha256").write_text("nonsense"),
    ],
    ids=["pixel", "label", "length", "missing", "manifest"],
)
def test_damage_is_noticed_and_mended(get, data_dir, damage):
    get()
    folder = data_dir / FOLDER
    (folder / "data_batch_3.bin").write_bytes(good_files()["data_batch_3.bin"])
    damage(folder)
    assert "will be replaced" in get()
    assert_complete(data_dir)


def test_damaged_data_stays_until_the_new_is_whole(get, site, data_dir):
    get()
    spoil(data_dir / FOLDER / "data_batch_3.bin", 100, 7)
    before = tree(data_dir)
    site.answer(404)
    get(status=1)
    assert tree(data_dir) == before


def test_data_the_user_unpacked_himself_is_accepted(get, site, data_dir):
    get()
    (data_dir / FOLDER / ".sha256").unlink()
    (data_dir / FOLDER / "notes.txt").write_text("mine")
    before, asked = tree(data_dir), len(site.requests)
    assert "its structure was verified" in get()
    assert tree(data_dir) == before
    assert len(site.requests) == asked


@pytest.mark.parametrize("name", ["notes.txt", "test_batch.bin"])
def test_a_folder_with_things_of_the_users_is_never_replaced(get, site, data_dir, name):
    folder = data_dir / FOLDER
    (folder / name).mkdir(parents=True)
    (folder / "data_batch_1.bin").write_bytes(b"mine")
    before = tree(data_dir)
    assert name in get(status=1)
    assert tree(data_dir) == before
    assert site.requests == []


def test_a_file_or_a_dangling_link_in_the_folders_place_is_refused(get, data_dir):
    place = data_dir / FOLDER
    for make in (place.touch, lambda: place.symlink_to("nowhere")):
        make()
        assert "cannot be replaced" in get(status=1)
        assert os.listdir(data_dir) == [FOLDER]
        place.unlink()


def test_a_linked_folder_is_used_but_never_replaced(get, data_dir, tmp_path):
    get()
    folder, place = tmp_path / "big disk", data_dir / FOLDER
    place.rename(folder)
    place.symlink_to(folder)
    assert "nothing to do" in get()
    spoil(folder / "test_batch.bin", 0, 10)
    before = tree(tmp_path)
    assert "not a plain folder" in get(status=1)
    assert tree(tmp_path) == before


def test_an_explicit_digest_is_not_answered_with_other_data(get, run, data_dir):
    get()
    assert "other data" in run(f"--sha256={'0' * 64}", status=1)
    assert_complete(data_dir)


def test_two_runs_at_once_do_not_write_into_the_same_files(get, data_dir):
    with storage.lock(data_dir, ""):
        assert "another run" in get(status=1)
    get()
    assert_complete(data_dir)


# --- Interruptions --------------------------------------------------------------------------------


def start(data_dir: Path, site: Site) -> subprocess.Popen:
    """The real program, at the moment when half of the archive is on the disk."""
    command = [sys.executable, SCRIPT, f"--data_dir={data_dir}", "--url", site.url]
    command += ["--sha256", sha256(GOOD)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while storage.size(data_dir / PART) < HALF:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_killed_download_resumes_where_it_stopped(get, site, data_dir):
    site.stall_after(HALF)
    with start(data_dir, site) as process:
        process.kill()
    assert sorted(os.listdir(data_dir)) == [storage.LOCK, PART]
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_download_ends_with_a_one_line_error_and_can_resume(
    get, site, data_dir, signum, status
):
    site.stall_after(HALF)
    with start(data_dir, site) as process:
        process.send_signal(signum)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == status
    assert err.count("\n") == 1
    assert "Run the same command again" in err
    assert os.listdir(data_dir) == [PART]
    get()
    assert_complete(data_dir)


def test_stopped_unpacking_leaves_nothing_that_looks_finished(get, data_dir, monkeypatch):
    with monkeypatch.context() as patch:

        def stop(*arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(DataFolder, "_check", stop)
        get(status=130)
    assert os.listdir(data_dir) == [PART]
    get()
    assert_complete(data_dir)


def test_leftovers_of_a_killed_unpacking_are_cleared(get, data_dir):
    (data_dir / f"{FOLDER}.part").mkdir()
    (data_dir / f"{FOLDER}.part" / "test_batch.bin").write_bytes(b"half")
    get()
    assert_complete(data_dir)
