"""Writes files and folders, refuses unusable paths early, and never leaves a half-written file.

When a function here returns, the data that it wrote survives a power cut.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator

from cifar10_resnet.errors import UserError, unwritable
from cifar10_resnet.terminal import command

CHUNK_BYTES = 1 << 20
LOCK = ".lock"
UNFINISHED = ".unfinished-"  # A new folder has this in its name while it is filled.

StrPath = str | os.PathLike[str]


# --- Early refusals -------------------------------------------------------------------------------


def refuse_remote(path: StrPath) -> None:
    """Refuses a path such as gs://bucket, because locks and renames need a file system."""
    if re.match(r"[a-zA-Z][\w+.-]*:/", os.fspath(path)):
        raise UserError(f"{path} is not a path of this machine. Use a local one.")


def refuse_patterns(path: str) -> None:
    """Refuses a path that TensorFlow would read as a pattern or as another file system's."""
    refuse_remote(path)
    if any("\ud800" <= char <= "\udfff" for char in path):  # bytes that Python could not decode
        raise UserError(
            f"{path} is invalid: TensorFlow needs a path in UTF-8. Use another folder, or set "
            "PYTHONUTF8=1."
        )
    if re.search(r"[*?\[\]\\]", path):
        raise UserError(
            f"{path} is invalid: TensorFlow cannot use paths with * ? [ ] or \\. "
            "Use another folder."
        )


def refuse_without_saved_model(folder: StrPath) -> None:
    """Refuses a folder that contains no SavedModel."""
    if os.path.isfile(os.path.join(folder, "saved_model.pb")):
        return
    # TensorFlow Serving expects each version in a numbered folder, and uses the greatest number.
    files = glob.glob(os.path.join(glob.escape(os.fspath(folder)), "*", "saved_model.pb"))
    names = [os.path.basename(os.path.dirname(file)) for file in files]
    versions = [name for name in names if name.isdecimal()]
    advice = f"Run `{command('export')}` first."
    if versions:
        advice = f"Use the folder inside it: {os.path.join(folder, max(versions, key=int))}."
    raise UserError(f"contains no SavedModel. {advice}", "saved_model", folder)


def refuse_unwritable_folder(path: StrPath) -> None:
    """Refuses a folder that `new_folder` could not write. Call it before long work begins."""
    refuse_remote(path)
    try:
        with _unfinished(path):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


def refuse_unwritable_file(path: StrPath) -> None:
    """Refuses a file that `new_file` could not write. Call it before long work begins."""
    refuse_remote(path)
    path = _place(path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(
            f"{path} cannot be written: its folder does not exist. Run `mkdir -p {folder}`."
        )
    if os.path.isdir(path):
        raise UserError(f"{path} cannot be written: it is a folder. Use a file in it.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written: its folder is read-only. Use another folder.")


# --- Files ----------------------------------------------------------------------------------------


def new_file(path: StrPath, content: bytes) -> None:
    """Writes a whole file, or leaves it unchanged if that fails."""
    place = _place(path)
    try:
        if os.path.exists(place) and not os.path.isfile(place):
            # This writes straight to a device or a pipe. Replacing it would make it a plain file.
            with open(place, "wb") as file:
                file.write(content)
        else:
            _replace(place, content)
    except OSError as error:
        raise unwritable(path, error) from error


def _replace(place: str, content: bytes) -> None:
    beside = place + ".new"
    try:
        with open(beside, "wb") as file:
            file.write(content)
        move(beside, place)
    finally:
        with contextlib.suppress(OSError):
            os.remove(beside)  # It still exists if one of these lines failed.


def move(source: StrPath, target: StrPath) -> None:
    """Moves a file within a file system. `target` never exists without its content."""
    sync(source)
    os.replace(source, target)
    sync(os.path.dirname(target) or ".")


def _place(path: StrPath) -> str:
    """Returns the path to write to. It follows a link, so the link stays a link."""
    place = os.path.realpath(path)
    # A link such as /dev/stdout may lead to an open pipe, which has no path.
    return place if os.path.lexists(place) or not os.path.exists(path) else os.fspath(path)


def remove(path: StrPath) -> None:
    """Removes a file, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def digest(path: StrPath, algorithm: str = "sha256") -> str:
    """Returns the digest of a file, in hexadecimal digits."""
    # The digests find damage, and some systems allow MD5 for nothing else.
    found = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def size(path: StrPath) -> int:
    """Returns the size of a file, or 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def sync(path: StrPath) -> None:
    """Waits until a file, or the list of a folder's entries, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some network file systems cannot sync a folder.
            raise
    finally:
        os.close(handle)


def sync_folder(folder: StrPath) -> None:
    """Waits until everything in a folder is on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            sync(os.path.join(place, name))
        sync(place)


# --- Folders --------------------------------------------------------------------------------------


def make_folders(path: StrPath) -> None:
    """Creates a folder and the folders above it, if they are missing."""
    folder, missing = os.path.realpath(path), []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from error
    for each in missing:
        # Without this, a power cut could remove a new folder and everything that was put into it.
        sync(os.path.dirname(each))


def make_folder(path: StrPath) -> None:
    """Creates a folder if it is missing, and refuses one that cannot be written to."""
    refuse_remote(path)
    try:
        make_folders(path)
    except OSError as error:
        raise unwritable(path, error) from error
    refuse_unwritable_file(os.path.join(path, "file"))


@contextlib.contextmanager
def new_folder(path: StrPath) -> Iterator[str]:
    """Yields a folder to write into. It becomes `path` if the block ends without an error."""
    try:
        with _unfinished(path) as folder:
            yield folder
            sync_folder(folder)
            wanted = os.path.realpath(path)
            os.replace(folder, wanted)
            sync(os.path.dirname(wanted))
    except BrokenPipeError:
        raise  # The output was closed. Nothing is wrong with the folder.
    except OSError as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def _unfinished(path: StrPath) -> Iterator[str]:
    """Yields a new locked folder next to `path`, which must be missing or empty.

    Removes the folder at the end. Also removes those of earlier commands that were killed.
    """
    wanted = os.path.realpath(path)
    if os.path.lexists(wanted) and os.listdir(wanted):
        raise UserError(f"{path} already exists and is not empty. Use a new folder.")
    if os.path.ismount(wanted):
        raise UserError(f"{path} is a mount point and cannot be replaced. Use a folder in it.")
    make_folders(os.path.dirname(wanted))
    for remains in glob.glob(f"{glob.escape(wanted + UNFINISHED)}*"):
        if re.fullmatch("[0-9a-f]{8}", remains.removeprefix(wanted + UNFINISHED)):
            _remove_unless_locked(remains)
    with contextlib.ExitStack() as held:
        while not _lock_new_folder(folder := wanted + UNFINISHED + secrets.token_hex(4), held):
            pass
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _lock_new_folder(folder: str, held: contextlib.ExitStack) -> bool:
    """Creates a folder and locks it. Returns false if another command has removed it meanwhile."""
    os.mkdir(folder)
    try:
        held.enter_context(_folder_lock(folder))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True  # This file system cannot lock folders. So no command removes the folder.
    return os.path.lexists(folder)


def _remove_unless_locked(folder: str) -> None:
    # The lock fails if a command is at work, and on file systems that cannot lock folders.
    with contextlib.suppress(OSError), _folder_lock(folder):
        shutil.rmtree(folder)


@contextlib.contextmanager
def _folder_lock(folder: str) -> Iterator[None]:
    """Locks a folder without a file in it, so the lock stays with the folder when it moves."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


class HeldLock:
    """A lock file that this process holds. It moves with its folder."""

    def __init__(self, path: str, handle: int):
        self._path, self._handle = path, handle

    def is_in_place(self) -> bool:
        """Returns whether the lock is still in the folder with the name that was locked."""
        return self._is_at(self._path)

    def is_replaced(self) -> bool:
        """Returns whether the folder with the name that was locked has another lock."""
        return os.path.exists(self._path) and not self.is_in_place()

    def folder(self) -> str | None:
        """Returns the folder that contains the lock now, or None if the lock was deleted."""
        if self.is_in_place():
            return os.path.dirname(self._path)
        with contextlib.suppress(OSError):  # Only Linux has this link.
            path = os.readlink(f"/proc/self/fd/{self._handle}")
            if self._is_at(path):
                return os.path.dirname(path)
        return None

    def _is_at(self, path: str) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._handle))
        except OSError:
            return False


@contextlib.contextmanager
def lock(folder: StrPath, refusal: UserError) -> Iterator[HeldLock]:
    """Locks a folder during the block. Another process that locks it gets the refusal.

    The system drops the lock when its process ends, even if the process is killed.
    """
    path = os.path.join(folder, LOCK)
    try:
        handle = _take(path)
    except BlockingIOError as error:
        raise refusal from error
    except OSError as error:
        raise unwritable(folder, error) from error
    held = HeldLock(path, handle)
    try:
        yield held
    finally:
        with contextlib.suppress(OSError):
            # If the folder was moved, another process may have locked a new one of its name.
            if place := held.folder():
                os.remove(os.path.join(place, LOCK))
        os.close(handle)


def _take(path: str) -> int:
    """Opens or creates a file, locks it and returns its descriptor."""
    while True:
        with contextlib.ExitStack() as opened:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after it was opened here.
            if os.fstat(handle).st_nlink:
                opened.pop_all()
                return handle
