"""Files and folders that the programs write: never half-written, on the disk, refused early."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from PIL import Image
from programs import PROJECT, error_of, run, run_code

from cifar10_resnet import storage
from cifar10_resnet.errors import UserError


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """Records what is synced to the disk and what is moved, in this order."""
    found = []
    fsync, replace = os.fsync, os.replace

    def record_sync(handle: int) -> None:
        found.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def record_replace(source: str, target: str) -> None:
        found.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    return found


# --- Early refusals -------------------------------------------------------------------------------


def test_the_advice_for_numbered_saved_models_is_the_greatest_number(tmp_path):
    for name in ("9", "10", "2", "99-old", "backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved_model.pb").touch()
    (tmp_path / "11").mkdir()
    with pytest.raises(UserError) as refused:
        storage.refuse_without_saved_model(tmp_path)
    assert f"Use the folder inside it: {tmp_path / '10'}." in str(refused.value)
    storage.refuse_without_saved_model(tmp_path / "10")


# --- Folders --------------------------------------------------------------------------------------


def write_to(path) -> None:
    with storage.new_folder(str(path)) as folder:
        with open(os.path.join(folder, "part"), "w") as file:
            file.write("whole")
        assert not os.path.exists(path) or not os.listdir(path)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a link to an empty folder"])
def test_a_new_folder_is_there_once_it_is_whole(tmp_path, before):
    path = tmp_path / "above" / "new"
    if before == "an empty folder":
        path.mkdir(parents=True)
    elif before == "a link to an empty folder":
        (tmp_path / "above").mkdir()
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    storage.refuse_unwritable_folder(str(path))
    write_to(path)
    assert (path / "part").read_text() == "whole"
    assert os.listdir(tmp_path / "above") == ["new"]


def test_a_new_folder_is_as_open_to_others_as_any(tmp_path):
    (tmp_path / "any").mkdir()
    write_to(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_new_folder_is_on_the_disk_before_it_takes_its_place_and_after(tmp_path, events):
    with storage.new_folder(tmp_path / "new") as folder:
        os.mkdir(os.path.join(folder, "deeper"))
        for name in ("one", "deeper/two"):
            open(os.path.join(folder, name), "w").close()
    parts = {os.path.join(folder, name) for name in ("", "one", "deeper", "deeper/two")}
    assert {("sync", part.rstrip("/")) for part in parts} == {*events[:4]}
    assert events[4:] == [("replace", str(tmp_path / "new")), ("sync", str(tmp_path))]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path, error):
    def fail(folder: str) -> None:
        (tmp_path / folder / "part").write_text("half")
        raise error

    with pytest.raises(error), storage.new_folder(str(tmp_path / "new")) as folder:
        fail(folder)
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_a_one_line_error(tmp_path):
    with (
        pytest.raises(UserError, match=r"/new cannot be written: No space left on device\."),
        storage.new_folder(str(tmp_path / "new")),
        open("/dev/full", "w") as file,
    ):
        file.write("more than there is room for")
    assert not os.listdir(tmp_path)


def test_what_came_into_the_folder_meanwhile_stays(tmp_path):
    path = tmp_path / "new"
    with pytest.raises(UserError, match="not empty"), storage.new_folder(str(path)):
        (path / "mine").mkdir(parents=True)
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(path) == ["mine"]


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("full folder", "not empty"),
        ("file", "Not a directory"),
        ("below a file", "Not a directory"),
        ("mount point", "mount point"),
        ("long name", "File name too long"),
    ],
)
def test_what_cannot_be_written_is_refused_early(tmp_path, monkeypatch, kind, sentence):
    (tmp_path / "file").write_text("mine")
    path = {
        "full folder": tmp_path,
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "new",
        "mount point": tmp_path / "mounted",
        "long name": tmp_path / ("n" * 250),
    }[kind]
    if kind == "mount point":
        path.mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda p: p == str(path))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=sentence):
        storage.refuse_unwritable_folder(str(path))
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission_is_refused_early(tmp_path, monkeypatch, as_nobody):
    (tmp_path / "closed").mkdir(mode=0o555)
    # from within, as the folders above pytest's are closed to anybody else
    monkeypatch.chdir(tmp_path / "closed")
    with as_nobody(), pytest.raises(UserError, match="Permission denied"):
        storage.refuse_unwritable_folder("new")


WRITER = """
import os, sys, time
from cifar10_resnet import storage
with storage.new_folder(sys.argv[1]) as folder:
    open(os.path.join(folder, "half"), "w").close()
    print("writes", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def writer(path) -> Iterator[subprocess.Popen]:
    """Starts a process that is filling a new folder, and kills it at the end."""
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writes\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def write_photos(folder) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32)).save(folder / name / f"{i}.png")


def test_the_next_command_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    write_photos(tmp_path / "photos")
    new, mine = tmp_path / "new", ("new.unfinished-mine", "new.unfinished-", "newer")
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / "new.unfinished-00000000").write_text("a file")
    (tmp_path / "new.unfinished-11111111").symlink_to("photos")
    with writer(tmp_path / "newer-one"), writer(new):
        pass
    with writer(new) as at_work:
        left = sorted(tmp_path.glob("new.unfinished-????????"))
        assert len(left) == 3, "the link, the file and the folder of the writer at work"
        run("import", f"--image_dir={tmp_path / 'photos'}", f"--data_dir={new}")
        assert at_work.poll() is None
        assert sorted(tmp_path.glob("new.unfinished-????????")) == left
    assert (tmp_path / "photos" / "cat" / "0.png").exists()
    assert len(list(tmp_path.glob("newer-one.unfinished-????????"))) == 1
    # A command that is refused tidies up too, but not in a folder that exists.
    assert "not empty" in error_of(
        "import", f"--image_dir={tmp_path / 'photos'}", f"--data_dir={new}"
    )
    shutil.rmtree(new)
    storage.refuse_unwritable_folder(new)
    expected = {*mine, "photos", "new.unfinished-00000000", "new.unfinished-11111111"}
    assert {p.name for p in tmp_path.iterdir()} - expected == {
        p.name for p in tmp_path.glob("newer-one.*")
    }


def test_a_file_system_that_cannot_lock_folders_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with writer(tmp_path / "new"):
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_to(tmp_path / "new")
    assert len(os.listdir(tmp_path)) == 2, "nobody can know whether that command is at work"


def test_a_new_folder_that_another_command_removes_is_made_again(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def remove_first(handle: int, operation: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        if len(calls) == 1:
            os.rmdir(calls[0])  # as a command that took it for the remains of another
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    write_to(tmp_path / "new")
    assert len(calls) == 2
    assert os.listdir(tmp_path) == ["new"]


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_nothing_is_left_next_to_it(tmp_path):
    file = tmp_path / "scores.json"
    for content in (b"first", b"second"):
        storage.refuse_unwritable_file(str(file))
        storage.new_file(str(file), content)
        assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_after(tmp_path, events):
    file = tmp_path / "scores.json"
    storage.new_file(file, b"scores")
    assert events == [("sync", f"{file}.new"), ("replace", str(file)), ("sync", str(tmp_path))]


@pytest.mark.parametrize(
    ("problem", "end"),
    [(OSError(errno.ENOSPC, "full"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, monkeypatch, problem, end):
    def fail(handle: int) -> None:
        raise problem

    file = tmp_path / "scores.json"
    file.write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(end):
        storage.new_file(file, b"scores")
    assert file.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_file_system_that_cannot_sync_folders_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(handle: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    storage.new_file(tmp_path / "scores.json", b"scores")
    assert (tmp_path / "scores.json").read_bytes() == b"scores"


def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "latest.html").symlink_to("there/report.html")
    for content in (b"first", b"second"):
        storage.refuse_unwritable_file(str(tmp_path / "latest.html"))
        storage.new_file(str(tmp_path / "latest.html"), content)
        assert (tmp_path / "latest.html").is_symlink()
        assert (tmp_path / "there" / "report.html").read_bytes() == content
    assert os.listdir(tmp_path / "there") == ["report.html"]


def test_a_link_into_a_folder_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "latest.html").symlink_to("nowhere/report.html")
    with pytest.raises(UserError, match="nowhere"):
        storage.refuse_unwritable_file(str(tmp_path / "latest.html"))


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    storage.refuse_unwritable_file(str(pipe))
    storage.new_file(str(pipe), b"scores")
    reader.join()
    assert read == [b"scores"]
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_standard_output_can_be_named_as_a_file(tmp_path):
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = "import sys; from cifar10_resnet import storage; "
    code += "storage.refuse_unwritable_file(sys.argv[1]); storage.new_file(sys.argv[1], b'scores')"
    assert run_code(code, tmp_path / "stdout").stdout == "scores"
    assert (tmp_path / "stdout").is_symlink()


def test_a_digest_is_that_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 3)
    (tmp_path / "file").write_bytes(b"more than one chunk")
    for algorithm in ("sha256", "md5"):
        expected = hashlib.new(algorithm, b"more than one chunk").hexdigest()
        assert storage.digest(tmp_path / "file", algorithm) == expected
    assert storage.digest(tmp_path / "file") == storage.digest(tmp_path / "file", "sha256")


def test_removing_what_is_not_there_is_no_mistake(tmp_path):
    (tmp_path / "file").touch()
    for _ in range(2):
        storage.remove(tmp_path / "file")
    assert os.listdir(tmp_path) == []


# --- Locks ----------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from cifar10_resnet import storage
from cifar10_resnet.errors import UserError
with storage.lock(sys.argv[1], UserError("taken")):
    print("held", flush=True)
    time.sleep(60)
"""


def is_locked(folder) -> bool:
    try:
        with storage.lock(folder, UserError("taken")):
            return False
    except UserError as error:
        return str(error) == "taken"


def test_a_locked_folder_is_refused_until_its_holder_leaves_and_nothing_stays(tmp_path):
    with storage.lock(tmp_path, UserError("the first")):
        assert is_locked(tmp_path)
    with pytest.raises(ZeroDivisionError), storage.lock(tmp_path, UserError("the second")):
        raise ZeroDivisionError
    assert not is_locked(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(tmp_path)
        holder.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == [storage.LOCK]
    assert not is_locked(tmp_path)


def test_a_lock_that_its_holder_removes_while_another_opens_it_is_no_lock(tmp_path, monkeypatch):
    flock = fcntl.flock

    def remove_then_lock(handle: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        os.remove(tmp_path / storage.LOCK)  # as the last holder does
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    with storage.lock(tmp_path, UserError("taken")):
        assert is_locked(tmp_path)


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    with (
        pytest.raises(UserError, match=r"/missing cannot be written: No such file"),
        storage.lock(tmp_path / "missing", "taken"),
    ):
        pass
