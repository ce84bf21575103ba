"""Files and folders that the programs write: refused early, and whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence

from cifar10_resnet.errors import UserError


def refuse_patterns(path: str) -> None:
    """Refuses a path that TensorFlow would take for a pattern, or for another file system's."""
    if re.match(r"[a-zA-Z][\w+.-]*:/", path):
        raise UserError(f"{path} is not a folder of this machine. Use a local one.")
    if re.search(r"[*?\[\]\\]", path):
        raise UserError(
            f"{path} has one of * ? [ ] \\ in it, which TensorFlow cannot have in the path of what "
            "it saves or loads: name another folder."
        )


def refuse_unwritable(path: str, apart_from: Sequence[str] = ()) -> None:
    """Refuses, before long work begins, a folder that `new` could not write at its end."""
    wanted = os.path.realpath(path)
    for other in apart_from:
        if os.path.commonpath([wanted, os.path.realpath(other)]) == wanted:
            raise UserError(f"{path} will hold {other}, so name another folder to export to.")
    os.rmdir(_beside(path))


@contextlib.contextmanager
def new(path: str) -> Iterator[str]:
    """A folder to write into, which becomes `path` once the block has ended well."""
    folder = _beside(path)
    try:
        with _ended_by_sigterm():
            yield folder
        os.replace(folder, os.path.realpath(path))
    except BrokenPipeError:
        raise  # of who read the output, not of the folder
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While entered, SIGTERM ends the program by an exception, as Ctrl-C does: it tidies up."""
    if threading.current_thread() is not threading.main_thread():  # where there are no signals
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _beside(path: str) -> str:
    """Creates a folder beside `path`, where there must be nothing or an empty folder."""
    wanted = os.path.realpath(path)
    try:
        if os.path.lexists(wanted) and os.listdir(wanted):
            raise UserError(f"{path} is there and not empty: name a new folder.")
        if os.path.ismount(wanted):
            raise UserError(f"{path} is a mount point and cannot be replaced: name a folder in it.")
        beside = f"{wanted}.unfinished-{secrets.token_hex(4)}"
        os.makedirs(beside)
        return beside
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


# --- Files ----------------------------------------------------------------------------------------


def refuse_unwritable_file(file: str) -> None:
    """Refuses, before long work begins, a file that `write` could not write at its end."""
    file = _place(file)
    folder = os.path.dirname(file) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{file} is in a folder that does not exist: create {folder} first.")
    if os.path.isdir(file):
        raise UserError(f"{file} is a folder: name a file in it.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {file}: its folder may not be written to.")


def make_folder(folder: str) -> None:
    """Makes sure that there is a folder to write files into."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}.") from error
    refuse_unwritable_file(os.path.join(folder, "picture"))


def write(file: str, content: bytes) -> None:
    """Writes a file, which appears whole or stays as it was."""
    place = _place(file)
    # a device or a pipe is written to: it is not to become a file
    special = os.path.exists(place) and not os.path.isfile(place)
    new = place if special else place + ".new"
    try:
        with open(new, "wb") as opened:
            opened.write(content)
        if not special:
            os.replace(new, place)
    except OSError as error:
        if not special:
            with contextlib.suppress(OSError):
                os.remove(new)
        raise UserError(f"cannot write {file}: {error.strerror}.") from error


def _place(file: str) -> str:
    """Where a file is to be: what a link leads to, so that the link stays one."""
    place = os.path.realpath(file)
    # the target of a link such as /dev/stdout may be an open pipe, which has no path
    return place if os.path.lexists(place) or not os.path.exists(file) else file
