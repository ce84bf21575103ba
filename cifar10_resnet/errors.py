"""What goes wrong and the user can mend, and how its reason is put in one line."""

import re
from typing import Any


class UserError(Exception):
    """Something the user can mend. Its text says what is wrong, where, and what to do next.

    If an argument is wrong, the text goes on after its name and value: "is invalid: it must be 1."
    """

    def __init__(self, why: str, argument: str | None = None, value: Any = None):
        super().__init__(why, argument, value)
        self.why, self.argument, self.value = why, argument, value

    def __str__(self) -> str:
        return f"{self.argument}={self.value} {self.why}" if self.argument else self.why


def reason_of(error: Exception) -> str:
    """Why something failed, in one line; of TensorFlow's errors without the names of its parts."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.sub(r"^\{\{.*?\}\} |\s*\[Op:\w+\].*$", "", str(error).strip(), flags=re.DOTALL)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def printable(text: str) -> str:
    """The text in one line without control characters, whatever a file or its name put into it."""
    return "".join(char if char.isprintable() else "?" for char in text)
