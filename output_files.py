"""Files that the programs write: refused early where they cannot be; whole or not at all."""

import contextlib
import os

from errors import UserError


def refuse_unwritable(file: str) -> None:
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
    refuse_unwritable(os.path.join(folder, "picture"))


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
