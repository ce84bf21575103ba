"""The command that trains the table of results, on runs of a few steps."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest

from cifar10_resnet import checkpoints


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    file = programs.PROJECT / "benchmarks" / "accuracy" / "run_all.py"
    spec = importlib.util.spec_from_file_location("run_all", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_all", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_all(script, tmp_path, monkeypatch):
    """Returns the script with three tiny runs that writes to its own folder."""
    few = ("--num_iterations=6", "--batch_size=4", "--log_per_iterations=3")
    runs = [script.Run(f"tiny{seed}", 8, seed=seed, more=few) for seed in range(3)]
    monkeypatch.setattr(script, "RUNS", runs)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr(script, "PAPER_ACCURACY", {8: 87.655})
    return script


def fake_csv(run_all, run, accuracy: float) -> None:
    (run_all.RESULTS / f"{run.name}.csv").write_text(
        f"# command: python\n# parameters: 75290\n# test_accuracy: {accuracy}\n"
        "step,epoch,train_loss,train_accuracy,test_accuracy,learning_rate,seconds\n"
        f"6,41.0,1.5,0.5,{accuracy},0.1,600\n"
    )


def test_a_run_leaves_its_curve_its_command_and_its_score(run_all, write_cifar10, tmp_path):
    run = run_all.RUNS[1]
    assert run_all.read_result(run) is None
    run_all.train(run, str(write_cifar10()), str(tmp_path / "runs"))
    result = run_all.read_result(run)
    comments, columns = result.csv
    assert "--num_layers=8 --recipe=fast --seed=1 --dtype=bf16" in comments["command"]
    assert "TensorFlow" in comments["versions"]
    assert comments["parameters"] == "75290"
    assert columns["step"].tolist() == [3, 5, 6]  # an epoch is 5 steps
    assert columns["test_accuracy"][-1] == float(f"{result.csv.accuracy:.6g}")
    assert columns["epoch"][-1] == pytest.approx(1.2)
    seconds = columns["seconds"].tolist()
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_the_median_seed_is_shipped_once_all_are_done_and_without_its_momentum(
    run_all, write_cifar10, tmp_path
):
    run_all.train(run_all.RUNS[2], str(write_cifar10()), str(tmp_path / "runs"))
    (tmp_path / "tiny2.csv").unlink()
    for run, accuracy in zip(run_all.RUNS[:2], (0.5, 0.7), strict=True):
        fake_csv(run_all, run, accuracy)
    run_all.ship(run_all.RUNS, str(tmp_path / "runs"))
    assert not run_all.PRETRAINED.exists()
    fake_csv(run_all, run_all.RUNS[2], 0.6)
    for _ in range(2):  # shipping again replaces it
        run_all.ship(run_all.RUNS, str(tmp_path / "runs"))
    shipped = checkpoints.find(str(run_all.PRETRAINED / "resnet8"))
    trained = checkpoints.find(str(tmp_path / "runs" / "tiny2"))
    assert (shipped.run, shipped.step) == (trained.run, trained.step)
    for ours, theirs in zip(
        checkpoints.load(shipped).variables,
        checkpoints.load(trained).variables,
        strict=True,
    ):
        assert (ours.numpy() == theirs.numpy()).all()
    sizes = [
        Path(saved.prefix + ".data-00000-of-00001").stat().st_size for saved in (shipped, trained)
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_table_gives_the_mean_of_the_seeds_and_each_of_them(run_all):
    assert run_all.table([]).count("\n") == 1
    for run, accuracy in zip(run_all.RUNS, (0.9, 0.92, 0.915), strict=True):
        fake_csv(run_all, run, accuracy)
    table = run_all.table([run_all.read_result(run) for run in run_all.RUNS])
    assert table.splitlines()[2:] == [
        "| resnet8 | 75,290 | **91.17%** | 90.00%, 92.00%, 91.50% | `fast` | 41 | 10 | 87.66% | "
        "`files/pretrained/resnet8` |"
    ]


def test_the_table_has_cifar10_then_residual_networks_then_shallower_ones_first(
    script, tmp_path, monkeypatch
):
    runs = [script.Run(f"run{i}", *shape) for i, shape in enumerate([(20, False), (56,), (20,)])]
    runs.insert(0, script.Run("run3", 20, dataset="cifar100"))
    monkeypatch.setattr(script, "RUNS", runs)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    for run in runs:
        fake_csv(script, run, 0.9)
    rows = script.table([script.read_result(run) for run in runs]).splitlines()[2:]
    names = [row.split()[1] for row in rows]
    assert names == ["resnet20", "resnet56", "plain20", "resnet20-cifar100"]
    assert ["91.25%" in row for row in rows] == [True, False, False, False]  # the paper's


def test_a_network_of_cifar100_has_its_own_data_folder_and_command(run_all, monkeypatch):
    run = run_all.Run("hundred", 20, dataset="cifar100")
    assert run.command[:3] == ["python", "run_trainer.py", "--path=cifar-100-binary"]
    assert run_all.RUNS[0].command[2] == "--num_layers=8"  # --path has its default
    trained = []
    monkeypatch.setattr(run_all, "RUNS", [run_all.RUNS[0], run])
    monkeypatch.setattr(run_all, "train", lambda run, path, *where: trained.append(path))
    monkeypatch.setattr(run_all, "ship", lambda *where: None)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--path=ten", "--cifar100_path=hundred"])
    run_all.main()
    assert trained == ["ten", "hundred"]


def test_the_recipe_best_takes_the_place_of_fast_once_all_its_seeds_are_finished(
    run_all, monkeypatch
):
    fast, *best = (run_all.Run(f"run{i}", 8, seed=i) for i in range(3))
    best = [run._replace(recipe="best") for run in best]
    other = run_all.Run("hundred", 8, dataset="cifar100")
    monkeypatch.setattr(run_all, "RUNS", [fast, *best, other])
    runs = (fast, *best, other)
    for finished, shipped in (
        (None, [1, 0, 0, 1]),
        (best[0], [1, 0, 0, 1]),
        (best[1], [0, 1, 1, 1]),
    ):
        if finished:
            fake_csv(run_all, finished, 0.9)
        assert [run.is_shipped for run in runs] == shipped
    assert not run_all.Run("short", 8, recipe="best", train_epochs=28).is_shipped
    assert not run_all.Run("left out", 8, ships=False).is_shipped


# A trainer that takes its time to save.
SLOW_TRAINER = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)
    open(sys.argv[1], "w").close()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
signal.pause()
"""


# As a terminal sends Ctrl-C, and as a system asks a program to stop.
@pytest.mark.parametrize(
    ("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_a_signal_waits_for_the_trainer_to_save(tmp_path, send, number):
    (tmp_path / "trainer.py").write_text(SLOW_TRAINER)
    code = "import sys; sys.path.insert(0, 'benchmarks/accuracy'); import run_all; "
    code += "run_all._run_program(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "trainer.py", tmp_path / "saved"],
        **{"cwd": programs.PROJECT, "stdout": subprocess.PIPE, "start_new_session": True},
    )
    assert process.stdout.readline() == b"training\n"
    send(process.pid, number)
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "saved").exists()


def test_what_is_there_is_left_as_it_is_unless_it_is_asked_for_again(run_all, monkeypatch):
    trained = []
    monkeypatch.setattr(run_all, "train", lambda run, *where: trained.append(run.name))
    monkeypatch.setattr(run_all, "ship", lambda *where: None)
    fake_csv(run_all, run_all.RUNS[1], 0.5)
    for flags, expected in (
        ([], ["tiny0", "tiny2"]),
        (["--again"], ["tiny0", "tiny1", "tiny2"]),
        (["--only=tiny1"], []),
        (["--only=tiny1", "--again"], ["tiny1"]),
    ):
        trained.clear()
        monkeypatch.setattr(sys, "argv", ["run_all.py", *flags])
        assert run_all.main() == 0
        assert trained == expected


def test_the_shipped_networks_are_whole_and_those_of_the_table(script):
    shipped = sorted(path for path in script.PRETRAINED.iterdir() if path.is_dir())
    assert shipped
    for folder in shipped:
        saved = checkpoints.find(str(folder))  # by its digests
        run, step = saved.run, saved.step
        runs = [run for run in script.RUNS if run.network == folder.name and run.is_shipped]
        middle = script._middle([script.read_result(seed) for seed in runs])
        assert (run.model.name, run.data.dataset) == (
            folder.name.removesuffix("-cifar100"),
            middle.run.dataset,
        )
        assert (run.training.recipe, run.training.seed) == (middle.run.recipe, middle.run.seed)
        assert step == run.training.num_iterations == middle.csv.columns["step"][-1]
        assert not saved.is_whole
    assert sum(f.stat().st_size for f in script.PRETRAINED.rglob("*")) < 40 * 10**6


def test_one_table_compares_recipes_and_another_the_networks_of_a_recipe(
    script, tmp_path, monkeypatch
):
    runs = [script.Run("r20", 20), script.Run("r56", 56), script.Run("short", 20, train_epochs=28)]
    runs.append(script.Run("paper", 20, recipe="paper"))
    monkeypatch.setattr(script, "RUNS", runs)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    for run in runs:
        fake_csv(script, run, 0.9)
    recipes, networks = script.tables([script.read_result(run) for run in runs])
    assert re.findall("`(fast|paper)`", recipes) == ["fast", "fast", "paper"]
    assert re.findall(r"\| (resnet\d+) ", networks) == ["resnet20", "resnet56"]


def test_the_page_of_results_has_the_tables_that_the_runs_give():
    tables = programs.run("benchmarks/accuracy/run_all.py", "--table").stdout.split("\n\n")
    assert len(tables) > 1
    page = (programs.PROJECT / "docs" / "results.md").read_text("utf-8")
    for table in tables:
        assert table.count("\n") > 2
        assert table.strip() in page
