"""The README is true: its tables name every flag with its default, its commands and code run."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from programs import PROGRAMS, PROJECT, run, run_code

from cifar10_resnet.config import TrainingConfig

HEADINGS = {
    "run_trainer": "### The trainer's flags",
    "run_evaluator": "### The evaluator's flags",
    "export_saved_model": "### The exporter's flags",
    "classify_images": "### The classifier's flags",
    "serve": "### The server's flags",
    "images_to_binary": "### The importer's flags",
    "plot_runs": "### The curves' flags",
    "launch_local": "### The launcher's flags",
}

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
    listed = run_code(LIST_FLAGS.format(program=program)).stdout
    return dict(line.split("=", 1) for line in listed.splitlines())


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_tables_list_every_flag_and_no_other(program):
    assert sorted(table_below(HEADINGS[program])) == sorted(flags_of(program))


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_tables_give_the_defaults_that_the_programs_have(program):
    actual = flags_of(program)
    for name, shown in table_below(HEADINGS[program]).items():
        value = actual[name].lower().removesuffix(".0")
        if name == "momentum":  # the same in all recipes
            value = str(TrainingConfig().momentum)
        if value != "none":
            assert shown.replace("`", "") == value.strip("[]").replace("'", ""), f"--{name}"
        else:  # there is none, or it is told in words
            assert not re.fullmatch(r"`[^`<…]*`", shown), f"--{name}"


def test_the_recipes_defaults_are_those_of_the_table():
    shown = table_below("### The trainer's flags")
    told = {name: re.fullmatch(r"recipe \(`(.*)`\)", text) for name, text in shown.items()}
    told = {name: match[1] for name, match in told.items() if match}
    assert len(told) == 7
    for name, default in told.items():
        assert default == str(getattr(TrainingConfig(), name)).lower()


def test_the_download_scripts_table_lists_every_flag_with_its_default():
    shown = run("cifar10_download_and_extract.py", "--help").stdout.split("options:")[1]
    flags = dict(re.findall(r"^  --(\w+)((?:.*\n)(?:    .*\n)*)", shown, re.M))
    table = table_below("### The download script's flags")
    assert table.keys() == flags.keys()
    for name in flags.keys() - {"url", "sha256"}:  # the official ones
        default = re.search(r"\(default:\s+(\S+)\)", flags[name])
        assert table[name].strip("`") == (default[1] if default else "")


# --- What is between fences -----------------------------------------------------------------------


def blocks(language: str, marked: bool = False) -> list[str]:
    """The README's blocks in a language; those alone that are marked to be run, if so asked."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    mark = "<!-- run -->\n" if marked else ""
    return re.findall(rf"^{mark}```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands() -> list[list[str]]:
    """The commands that start one of the project's programs: program and arguments of each."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").replace(" -- ", "\npython ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["python"] and line[1] != "-m"]


@functools.cache
def flags_in_help(program: str) -> set[str]:
    shown = run(program, "--help").stdout
    return set(re.findall(r"--(?:\[no\])?(\w+)", shown))


@pytest.mark.parametrize("program", sorted({command[0] for command in commands()}))
def test_the_commands_have_flags_that_there_are(program):
    given = [word for command in commands() if command[0] == program for word in command[1:]]
    flags = {re.match(r"--(\w+)", word)[1] for word in given if word.startswith("--")}
    assert flags <= flags_in_help(program)


def test_the_makefile_has_what_is_to_be_made_and_its_commands_have_flags_that_there_are():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split())
    asked_for = {line.split()[1] for line in "".join(blocks("sh")).splitlines() if "make " in line}
    assert {"demo", "test"} <= asked_for <= targets
    for program, words in re.findall(r"^\t\$\(RUN\) (run_\w+\.py)(.*)$", makefile, re.M):
        assert set(re.findall(r"--(\w+)", words)) <= flags_in_help(program)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the project's files in it, where what runs leaves its traces."""
    for path in PROJECT.iterdir():
        if path.suffix == ".py" or path.name in ("cifar10_resnet", "files", "examples"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_marked_commands_run(checkout):
    script = "\n".join(blocks("sh", marked=True))
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=checkout,
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("runs/look/model.ckpt-157", "wrote report.html", "drew curves.png"):
        assert told in done.stdout
    assert (checkout / "report.html").stat().st_size > 100_000


def test_the_marked_code_runs(checkout, write_cifar10):
    from cifar10_resnet import checkpoints
    from cifar10_resnet.config import ModelConfig, RunConfig
    from cifar10_resnet.serving import export
    from cifar10_resnet.training.trainer import Trainer

    write_cifar10()
    checkpoint = Trainer(RunConfig(ModelConfig(num_layers=20))).checkpoint
    saved = checkpoints.save(checkpoint, str(checkout / "runs" / "resnet20"), 7)
    export.export_saved_model(saved, str(checkout / "savedmodels" / "resnet20"))
    Image.new("RGB", (40, 60), "orange").save(checkout / "cat.jpg")
    (checkout / "readme.py").write_text("\n".join(blocks("python", marked=True)))
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=checkout, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"\[b'\w+'\] \[\d\.\d*\]\n\(1, 10\)\n", done.stdout), done.stdout
    assert re.search(r"^loss \d\.\d{3}, accuracy [01]\.\d{3}$", done.stdout, flags=re.M)
    _, step = checkpoints.read_run(checkpoints.find(str(checkout / "runs" / "ten-steps")))
    assert step == 10
