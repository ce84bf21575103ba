"""How the commands answer before any work: --help, and flags that are wrong."""

import json
import os
import re

import pytest
from programs import PROGRAMS, in_terminal, run, run_code

DESCRIBE = """
import importlib, json, sys
from absl import flags
from cifar10_resnet.cli.app import help_text
module = importlib.import_module(sys.argv[1])
flags.FLAGS.mark_as_parsed()
key_flags = flags.FLAGS.get_key_flags_for_module(module)
print(json.dumps({
    "flags": [flag.name for flag in key_flags if not flag.help.startswith("Alias for ")],
    "aliases": [flag.name for flag in key_flags if flag.help.startswith("Alias for ")],
    "groups": module.FLAG_GROUPS,
    "help": {width: help_text(module.__doc__, module.FLAG_GROUPS, width) for width in (60, 100)},
}))
"""


def answer(program: str, *flags: str, status: int = 1, **environment: str) -> str:
    """What a command says on stderr, or where that is not a failure on stdout."""
    done = run(program, *flags, status=status, env=os.environ | environment)
    said, silent = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
    assert silent == ""
    return said


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_each_flag_in_one_group_and_each_group_on_a_screen(program):
    described = json.loads(run_code(DESCRIBE, PROGRAMS[program]).stdout)
    grouped = [name for names in described["groups"].values() for name in names]
    assert sorted(grouped) == sorted(described["flags"])
    for width, shown in described["help"].items():
        flags = shown[shown.index(next(iter(described["groups"]))) :]
        assert max(map(len, flags.splitlines())) <= int(width)
        blocks = [block.splitlines() for block in shown.split("\n\n")]
        titles = [block[0] for block in blocks if block[0] in described["groups"]]
        assert titles == list(described["groups"])
        assert max(map(len, blocks)) <= (24 if width == "100" else 50)
        for name in grouped + described["aliases"]:
            assert len(re.findall(rf"^  (?:\S+, )?--(?:\[no\])?{name}\b", shown, re.M)) == 1, name


def test_help_gives_defaults_and_choices_and_asking_for_it_is_no_failure():
    shown = answer("run_trainer.py", "--help", status=0, COLUMNS="100")
    assert shown.startswith("Trains a ResNet")
    flat = " ".join(shown.split())
    assert "--batch_size Images in a step (default: 128)" in flat
    assert "(default: the recipe's; paper: 0.1)" in flat
    assert "--[no]clean Delete the run in --ckpt_path and start over (default: false)" in flat
    assert "--recipe <paper | one_cycle | fast>: Schedule" in flat


def test_absls_own_full_help_stays():
    shown = run("run_trainer.py", "--helpfull", status=1).stdout
    assert "absl.logging" in shown
    assert "--recipe" in shown


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_layer=20"], "there is no flag --num_layer: did you mean --num_layers?"),
        (["--shortcut_conections"], "--shortcut_conections: did you mean --shortcut_connections?"),
        (["--nobotleneck"], "there is no flag --nobotleneck: did you mean --nobottleneck?"),
        (["--lr=1"], "there is no flag --lr: --help lists those there are."),
        (["--recipe=fats"], "--recipe=fats will not do: it must be paper or one_cycle or fast."),
        (["--batch_size=x"], "--batch_size=x will not do: it must be a positive integer."),
        (["--batch_size=0"], "--batch_size=0 will not do: it must be a positive integer."),
        (["--momentum=2"], "--momentum=2 will not do: it must be a number in the range [0, 1]."),
        (["--clean=perhaps"], "--clean=perhaps will not do: it must be true or false."),
        (["--profile_steps=9,3"], "it must be a first and a last step, as in 100,110."),
        (["--seed"], "Missing value for flag --seed."),
        (["--quiet", "--verbose"], "give --quiet or --verbose, not both."),
        (["--stop_threshold=1"], "--stop_threshold needs evaluations: give --epochs_between"),
        (["resnet20"], "'resnet20' is not a flag. Write --flag=value, for example"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line_that_helps(flags, sentence):
    said = answer("run_trainer.py", *flags)
    assert said.startswith("run_trainer.py: error: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_a_flag_that_must_be_given_is_explained():
    said = answer("run_evaluator.py")
    assert said.startswith("run_evaluator.py: error: --ckpt_path is missing: a checkpoint's prefix")


def test_colour_is_for_terminals_and_not_where_it_is_unwanted():
    unset = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    for flag, marked in (("--help", "\x1b[1mRecipe\x1b[0m"), ("--bad", "\x1b[1;31merror:\x1b[0m")):
        _, shown = in_terminal("run_trainer.py", flag, env=unset)
        assert marked in shown
        for switch in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
            _, shown = in_terminal("run_trainer.py", flag, env=unset | switch)
            assert "\x1b" not in shown
    assert "\x1b" not in answer("run_trainer.py", "--help", status=0)


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_help_fits_the_terminal(columns):
    unset = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    status, shown = in_terminal("serve", "--help", columns=columns, env=unset)
    assert status == 0
    longest = max(map(len, shown[shown.index("The network") :].splitlines()))
    assert longest <= columns
    assert longest > 50
