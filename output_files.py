"""Files that the programs write: refused early where they cannot be; whole or not at all."""

import contextlib
import os

from errors import UserError


def refuse_unwritable(file: str) -> None:
    """Refuses, before long work begins, a file that `write` could not write at its end."""
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
    new = file + ".new"
    try:
        with open(new, "wb") as opened:
            opened.write(content)
        os.replace(new, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise UserError(f"cannot write {file}: {error.strerror}.") from error
