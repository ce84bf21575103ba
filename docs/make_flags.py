"""Writes docs/flags.md: every flag of every program, as the programs define them.

python docs/make_flags.py
"""

import importlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cifar10_resnet import storage
from cifar10_resnet.__main__ import COMMANDS, first_line
from cifar10_resnet.cli.flags import explanation, groups_of, names_of
from cifar10_resnet.terminal import PROJECT

HEAD = """\
# Flags

Which flags does each program have?

<!-- `python docs/make_flags.py` writes this page. A test compares it with the programs. -->

`--help` of each program lists its flags too. Some flags have two names. A `~` at the start of a
value is your home folder. Write a boolean flag as `--clean`, `--noclean` or `--clean=False`.
"""
TABLE = "| flag | meaning |\n| --- | --- |\n"


def page() -> str:
    """Returns the page, with a section for each program."""
    return HEAD + "".join(section(name, module) for name, module in COMMANDS.items())


def section(name: str, module: str) -> str:
    """Returns what a program does, how to start it, and its flags."""
    started = f"-m cifar10_resnet {name}" if "." in module else f"{module}.py"
    return f"\n## python {started}\n\n{first_line(module)}\n{tables(module)}"


def tables(module: str) -> str:
    """Returns a table for each group of flags."""
    groups = groups_of(importlib.import_module(module).Settings)
    return "".join(
        f"\n**{title}**\n\n{TABLE}"
        + "".join(row(names_of(item), explanation(item)) for item in items)
        for title, items in groups.items()
    )


def row(names: list[str], meaning: str) -> str:
    """Returns a flag's row of the table. Choices in <…> become code: HTML would hide them."""
    meaning = re.sub(r"^<(.*?)>", lambda found: f"`{found[1].replace(' | ', '`, `')}`", meaning)
    meaning = re.sub(r"\n(\w+):", r"<br>`\1`:", meaning).replace("\N{NO-BREAK SPACE}", " ")
    return f"| {', '.join(f'`{name}`' for name in names)} | {meaning} |\n"


if __name__ == "__main__":
    storage.new_file(str(PROJECT / "docs" / "flags.md"), page().encode())
