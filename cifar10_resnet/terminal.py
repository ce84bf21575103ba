"""What text for people looks like: tables, commands to type, emphasis where a terminal shows it."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

PROJECT = Path(__file__).resolve().parent.parent

BOLD, RED = "1", "1;31"


def emphasised(text: str, stream: TextIO, style: str = BOLD) -> str:
    """The text as it should be written to the stream: plain in files, pipes and under NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def table(rows: Mapping[str, object]) -> str:
    """Names and values, a line for each."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:<{width}}{value}" for name, value in rows.items())


def command(program: str, *arguments: str) -> str:
    """Returns the line that starts one of the project's programs from the user's folder.

    A program at the front is named by its file, another by its name: "run_trainer.py", "export".
    """
    python = sys.executable
    for name in ("python3", "python"):
        if shutil.which(name) == sys.executable:
            python = name
    if program.endswith(".py"):
        words = [python, in_project(program)]
    elif in_project() == ".":
        words = [python, "-m", "cifar10_resnet", program]
    else:
        words = [python, in_project("cifar10_resnet"), program]
    return shlex.join([*words, *arguments])


def in_project(*parts: str) -> str:
    """Returns the path of one of the project's files, as short as it can be typed here."""
    path = PROJECT.joinpath(*parts)
    return min(os.path.relpath(path), str(path), key=len)
