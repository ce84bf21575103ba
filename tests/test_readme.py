"""The README's tables name every flag there is, with its default, and no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

PROGRAMS = (
    ("run_trainer", "### The trainer's flags"),
    ("run_evaluator", "### The evaluator's flags"),
    ("export_saved_model", "### The exporter's flags"),
    ("classify_images", "### The classifier's flags"),
    ("serve", "### The server's flags"),
    ("images_to_binary", "### The importer's flags"),
)

LIST_FLAGS = """
import {program}
from absl import flags
flags.FLAGS.mark_as_parsed()
for flag in flags.FLAGS.get_key_flags_for_module({program}):
    print(flag.name, flag.value, sep="=")
"""


def table_below(heading: str) -> dict[str, str]:
    """The flags of the first table below a heading, each name with its default."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8").split(heading, 1)[1]
    text = re.split(r"^##", text, flags=re.M)[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `--")]
    return {
        name: default.strip() for names, default in rows for name in re.findall(r"--(\w+)", names)
    }


def flags_of(program: str) -> dict[str, str]:
    listed = subprocess.run(
        [sys.executable, "-c", LIST_FLAGS.format(program=program)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(line.split("=", 1) for line in listed.stdout.splitlines())


@pytest.mark.parametrize(("program", "heading"), PROGRAMS)
def test_the_tables_list_every_flag_and_no_other(program, heading):
    assert sorted(table_below(heading)) == sorted(flags_of(program))


@pytest.mark.parametrize(("program", "heading"), PROGRAMS)
def test_the_tables_give_the_defaults_that_the_programs_have(program, heading):
    actual = flags_of(program)
    for name, shown in table_below(heading).items():
        default = re.fullmatch(r"`([^`<…]*)`", shown)
        if default and actual[name] != "None":
            value = actual[name].lower().removesuffix(".0")
            assert default[1] == value, f"--{name}"


def test_the_recipes_defaults_are_those_of_the_table():
    from run_config import TrainingConfig

    paper = TrainingConfig()
    for name, shown in table_below("### The trainer's flags").items():
        if match := re.fullmatch(r"recipe \(`(.*)`\)", shown):
            assert match[1] == str(getattr(paper, name)).lower()


def test_the_download_scripts_table_lists_every_flag():
    shown = subprocess.run(
        [sys.executable, "cifar10_download_and_extract.py", "--help"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    flags = set(re.findall(r"--(\w+)", shown.split("options:")[1])) - {"help"}
    assert set(table_below("### The download script's flags")) == flags
