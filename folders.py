"""Folders that the programs write: refused early where they cannot be; whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence

from errors import UserError


def refuse_patterns(path: str) -> None:
    """TensorFlow takes a path of what it saved for a pattern, and so would not find some again."""
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
