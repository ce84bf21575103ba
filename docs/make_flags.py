"""Writes docs/flags.md: every flag of every program, as the programs define them.

python docs/make_flags.py
"""

import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cifar10_resnet import storage
from cifar10_resnet.__main__ import COMMANDS, first_line
from cifar10_resnet.terminal import PROJECT

HEAD = """\
# Flags

<!-- `python docs/make_flags.py` writes this page. A test compares it with the programs. -->

`--help` of each program lists its flags too. Some flags have two names. A `~` at the start of a
value is your home folder. Write a boolean flag as `--clean`, `--noclean` or `--clean=False`.
"""
TABLE = "| flag | meaning |\n| --- | --- |\n"

# Two programs may define the same flag, so each is imported in a process of its own.
PRINT_FLAGS = """
import importlib, sys
from absl import flags
from cifar10_resnet.cli import app
module = importlib.import_module(sys.argv[1])
flags.FLAGS.mark_as_parsed()
for title, names in module.FLAG_GROUPS.items():
    print(title)
    for name in names:
        print(", ".join(app.names_of(name)), app.explanation(name), sep="\\t")
"""


def page() -> str:
    """Returns the page, with a section for each program."""
    return HEAD + "".join(section(name, module) for name, module in COMMANDS.items())


def section(name: str, module: str) -> str:
    """Returns what a program does, how to start it, and its flags."""
    started = f"-m cifar10_resnet {name}" if "." in module else f"{module}.py"
    return f"\n## python {started}\n\n{first_line(module)}\n{tables(module)}"


def tables(module: str) -> str:
    """Returns a table for each group of flags."""
    lines = ""
    for line in output_of("-c", PRINT_FLAGS, module).splitlines():
        names, tab, meaning = line.partition("\t")
        lines += row(names, meaning) if tab else f"\n**{names}**\n\n{TABLE}"
    return lines


def row(names: str, meaning: str) -> str:
    """Returns a flag's line in a table, its choices without the brackets of HTML."""
    meaning = re.sub(r"^<(.*?)>", lambda found: found[1].replace(" | ", ", "), meaning)
    return f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {meaning} |\n"


def output_of(*words: str) -> str:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    storage.new_file(str(PROJECT / "docs" / "flags.md"), page().encode())
