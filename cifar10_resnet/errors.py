"""Defines the error that a user can fix, and puts the reasons of errors in one line."""

import re
from typing import Any


class UserError(Exception):
    """An error that the user can fix. Its text states what is wrong, where, and what to do next.

    If an argument is wrong, its name and value come before the text: "is invalid: it must be 1."
    """

    def __init__(self, why: str, argument: str | None = None, value: Any = None):
        super().__init__(why, argument, value)
        self.why, self.argument, self.value = why, argument, value

    def __str__(self) -> str:
        return f"{self.argument}={self.value} {self.why}" if self.argument else self.why


def unreadable(path: object, error: Exception) -> UserError:
    """Returns the error for a file or folder that cannot be read."""
    return UserError(f"{path} cannot be read: {reason_of(error)}. Check its path and permissions.")


def unwritable(path: object, error: Exception) -> UserError:
    """Returns the error for a file or folder that cannot be written."""
    return UserError(
        f"{path} cannot be written: {reason_of(error)}. Check the free space and the permissions, "
        "or use another path."
    )


def reason_of(error: Exception) -> str:
    """Returns why something failed, in one line without TensorFlow's names of nodes and ops."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.sub(r"^\{\{.*?\}\} |\s*\[Op:\w+\].*$", "", str(error).strip(), flags=re.DOTALL)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def printable(text: str) -> str:
    """Returns the text in one line, with "?" for every character that cannot be printed."""
    return "".join(char if char.isprintable() else "?" for char in text)
