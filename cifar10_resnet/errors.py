"""What goes wrong and the user can mend, and how its reason is put in one line."""

import re


class UserError(Exception):
    """Something the user can mend. Its text says what is wrong, where, and what to do next."""


def reason_of(error: Exception) -> str:
    """Why something failed, in one line; of TensorFlow's errors without the names of its parts."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.sub(r"^\{\{.*?\}\} |\s*\[Op:\w+\].*$", "", str(error).strip(), flags=re.DOTALL)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def printable(text: str) -> str:
    """The text in one line without control characters, whatever a file or its name put into it."""
    return "".join(char if char.isprintable() else "?" for char in text)
