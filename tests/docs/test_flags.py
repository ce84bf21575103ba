"""docs/flags.md lists every flag of every program, as the program defines it."""

import importlib
import re

import pytest
from pages import PAGES
from programs import PROGRAMS, run_code

from cifar10_resnet.cli.flags import items_of
from cifar10_resnet.config import RECIPE_NOTES, RECIPES, TrainingConfig


def section(heading: str) -> str:
    """Returns the part of the page below a heading."""
    parts = re.split(r"^## (.*)\n", PAGES["docs/flags.md"], flags=re.M)
    return parts[parts.index(heading) + 1]


def listed(heading: str) -> list[str]:
    """Returns the names of the flags below a heading."""
    rows = re.findall(r"^\| (`--.*?) \|", section(heading), re.M)
    return [name for names in rows for name in re.findall(r"--(?:\[no\])?(\w+)", names)]


def test_the_page_is_what_its_script_writes():
    code = "import sys; sys.path.insert(0, 'docs'); "
    code += "import make_flags; print(make_flags.page(), end='')"
    written = run_code(code).stdout
    assert written == PAGES["docs/flags.md"], "write it again: python docs/make_flags.py"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_of_a_program_is_listed_once(program):
    started = program if program.endswith(".py") else f"-m cifar10_resnet {program}"
    items = items_of(importlib.import_module(PROGRAMS[program]).Settings)
    defined = [name for item in items for name in (item.name, *item.metadata["also"])]
    assert sorted(listed(f"python {started}")) == sorted(defined)


def test_the_values_of_the_papers_recipe_are_listed():
    told = dict(
        re.findall(
            r"^\| `--(?:\[no\])?(\w+)` \| .*\(default: the recipe's; paper: ([^;)]+)[;)]",
            section("python run_trainer.py"),
            re.M,
        )
    )
    assert len(told) == 8
    for name, value in told.items():
        actual = getattr(TrainingConfig(), name)
        assert value == str(actual).lower() or float(value) == actual, name


def test_the_accuracies_in_the_recipes_help_are_those_of_the_results_page():
    row = r"^\| resnet20 \|[^|]*\| \*\*(\S+%)\*\* \|[^|]*\| `(\w+)` \| (\d+) \|"
    results = re.findall(row, PAGES["docs/results.md"], re.M)
    for recipe, note in RECIPE_NOTES.items():
        if "reaches" in note:
            accuracy, epochs = re.search(r"reaches (\S+%) in (\d+) epochs", note).groups()
            assert (accuracy, recipe, epochs) in results
    assert RECIPE_NOTES.keys() == RECIPES.keys()


def test_no_page_has_a_table_of_flags_except_this_one():
    others = {name: page for name, page in PAGES.items() if name != "docs/flags.md"}
    for name, page in others.items():
        assert len(re.findall(r"^\| `--\w+`", page, re.M)) < 8, name
