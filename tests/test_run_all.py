"""The command that trains the table of results, on runs of a few steps."""

import importlib.util
import sys
from pathlib import Path

import commands
import pytest

import checkpoints


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """The script as a module, with three tiny runs, writing to a folder of its own."""
    script = commands.PROJECT / "files" / "results" / "run_all.py"
    spec = importlib.util.spec_from_file_location("run_all", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_all", module)
    spec.loader.exec_module(module)
    few = ("--num_iterations=6", "--batch_size=4", "--log_per_iterations=3")
    runs = [module.Run(f"tiny{seed}", 8, seed=seed, more=few) for seed in range(3)]
    monkeypatch.setattr(module, "RUNS", runs)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr(module, "PAPER_ERROR", {8: 12.345})
    monkeypatch.setattr(module, "REPRODUCTION_ERROR", {8: 11.0})
    return module


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
    assert columns["step"].tolist() == [3, 4, 6]  # an epoch is 3.75 steps
    assert columns["test_accuracy"][-1] == float(f"{result.csv.accuracy:.6g}")
    assert columns["epoch"][-1] == pytest.approx(1.6)
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
    assert checkpoints.read_run(shipped) == checkpoints.read_run(trained)
    for ours, theirs in zip(
        checkpoints.load_model(shipped).variables,
        checkpoints.load_model(trained).variables,
        strict=True,
    ):
        assert (ours.numpy() == theirs.numpy()).all()
    sizes = [Path(p + ".data-00000-of-00001").stat().st_size for p in (shipped, trained)]
    assert sizes[0] < 0.6 * sizes[1]


def test_the_table_gives_the_mean_of_the_seeds_and_each_of_them(run_all):
    assert run_all.table([]).count("\n") == 1
    for run, accuracy in zip(run_all.RUNS, (0.9, 0.92, 0.915), strict=True):
        fake_csv(run_all, run, accuracy)
    table = run_all.table([run_all.read_result(run) for run in run_all.RUNS])
    assert table.splitlines()[2:] == [
        "| resnet8 | 75,290 | 12.35 % | 11.00 % | **8.83 %** (10.00, 8.00, 8.50) | `fast` | 41 | "
        "10 | `files/pretrained/resnet8` |"
    ]


def test_the_readme_shows_the_table_that_the_results_give():
    table = commands.run("files/results/run_all.py", "--table").stdout
    if table.count("\n") > 2:
        assert table in (commands.PROJECT / "README.md").read_text()
