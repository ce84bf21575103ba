"""How the commands answer before any work: --help, and flags that are wrong."""

import importlib
import os
import re

import pytest
from programs import PROGRAMS, in_terminal, run

from cifar10_resnet.cli.app import help_text
from cifar10_resnet.cli.flags import groups_of, names_of
from cifar10_resnet.config import RECIPE_NOTES


def answer(program: str, *flags: str, status: int = 1, **environment: str) -> str:
    """Returns what a command prints: on stderr if it fails, on stdout otherwise."""
    done = run(program, *flags, status=status, env=os.environ | environment)
    said, silent = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
    assert silent == ""
    return said


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_each_flag_in_one_group_and_each_group_on_a_screen(program):
    module = importlib.import_module(PROGRAMS[program])
    groups = groups_of(module.Settings)
    for width in (60, 100):
        shown = help_text(module.__doc__, module.Settings, width)
        flags = shown[shown.index(next(iter(groups))) :]
        assert max(map(len, flags.splitlines())) <= width
        blocks = [block.splitlines() for block in shown.split("\n\n")]
        assert [block[0] for block in blocks if block[0] in groups] == list(groups)
        assert max(map(len, blocks)) <= (24 if width == 100 else 50)
        for name in [name for items in groups.values() for i in items for name in names_of(i)]:
            line = rf"^  (?:\S+, )*{re.escape(name)}(?![^ ,\n])"
            assert len(re.findall(line, shown, re.M)) == 1, name


def test_help_gives_defaults_and_choices_and_asking_for_it_is_no_failure():
    shown = answer("run_trainer.py", "--help", status=0, COLUMNS="100")
    assert shown.startswith("Trains a ResNet")
    flat = " ".join(shown.split())
    assert "--batch_size Images per step, over all replicas (default: 128)" in flat
    assert "(default: the recipe's; paper: 0.1)" in flat
    assert "--[no]clean Delete the run in --ckpt_path and start again (default: false)" in flat
    assert (
        "--optimizer <momentum | muon>: Optimizer (default: the recipe's; paper: momentum)" in flat
    )
    for recipe, note in RECIPE_NOTES.items():
        assert re.search(rf"^ +{recipe}: {note}$", shown, re.M)


def test_absls_own_full_help_stays():
    shown = run("run_trainer.py", "--helpfull", status=1).stdout
    assert "absl.logging" in shown
    assert "--recipe" in shown


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_layer=20"], "--num_layer is not a flag. Did you mean --num_layers?"),
        (["--shortcut_conections"], "Did you mean --shortcut_connections?"),
        (["--nobotleneck"], "--nobotleneck is not a flag. Did you mean --nobottleneck?"),
        (["--worker_hosts=a:1,b:1"], "--worker_hosts is not a flag. Set TF_CONFIG to the list of"),
        (["--task_index=1"], "--task_index is not a flag. Set TF_CONFIG to the list of workers"),
        (["--lr=1"], "--lr is not a flag. Did you mean --init_lr?"),
        (["--xyz=1"], "--xyz is not a flag. --help lists the flags."),
        (["--shortcut_connection", "False"], "for example --shortcut_connection=False."),
        (["--recipe=fats"], "--recipe=fats is invalid: it must be paper, one_cycle, fast or best."),
        (["--batch_size=x"], "--batch_size=x is invalid: it must be a whole number, 1 to 65,536."),
        (["--batch_size=0"], "--batch_size=0 is invalid: it must be a whole number, 1 to 65,536."),
        (["--resnet_size=x"], "--resnet_size=x is invalid: it must be a whole number, 1 to 2,000."),
        (["--momentum=2"], "it must be a number, 0 to 1."),
        (["--momentum=nan"], "it must be a number, 0 to 1."),
        (["--clean=perhaps"], "--clean=perhaps is invalid: it must be true or false."),
        (["--profile_steps=9,3"], "it must be a first and a last step, as in 100,110."),
        (["--profile_steps=9"], "it must be a first and a last step, as in 100,110."),
        (["--profile_steps=0,3"], "it must be a first and a last step, as in 100,110."),
        (["--resnet_size=21"], "--resnet_size=21 is invalid: it must be 6n + 2. The nearest are"),
        (["--seed"], "--seed needs a value. Write --seed=value."),
        (["--quiet", "--verbose"], "--quiet and --verbose contradict. Use one of them."),
        (["--ckpt_path="], "--ckpt_path= is invalid: it must be not empty."),
        (["--stop_threshold=0"], "it must be a number, above 0 up to 1."),
        (["--stop_threshold=1"], "needs evaluations. Add --epochs_between_evals=1."),
        (["--num_iterations=5", "--train_epochs=1"], "both set the length. Use one of them."),
        (["--use_synthetic_data", "--dataset=cifar10"], "does not work with --dataset or"),
        (["--clean", "--eval_only"], "--clean would delete the checkpoint that --eval_only"),
        (["--export_dir=x", "--eval_only"], "--export_dir does not work with --eval_only."),
        (["--device=gpu", "--num_gpus=0"], "--num_gpus does not fit --device."),
        (["--device=cpu", "--num_gpus=1"], "--num_gpus does not fit --device."),
        (["resnet20"], "'resnet20' is not a flag. Write --flag=value, for example"),
    ],
)
def test_a_wrong_flag_is_a_one_line_error_that_helps(flags, sentence):
    said = answer("run_trainer.py", *flags)
    assert said.startswith("run_trainer.py: error: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_a_flag_that_must_be_given_is_explained():
    said = answer("run_evaluator.py")
    assert "error: --ckpt_path is missing. Pass a checkpoint, or a folder (its newest" in said


def test_colour_is_for_terminals_and_not_where_it_is_unwanted():
    unset = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    for flag, marked in (("--help", "\x1b[1mNetwork\x1b[0m"), ("--bad", "\x1b[1;31merror:\x1b[0m")):
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
    longest = max(map(len, shown[shown.index("Network") :].splitlines()))
    assert longest <= columns
    assert longest > 50
