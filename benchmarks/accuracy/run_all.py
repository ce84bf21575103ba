"""Trains every network of the README's table of results, or goes on where that was left off.

    python benchmarks/accuracy/run_all.py --path=cifar-10-batches-bin

Each run leaves `benchmarks/accuracy/NAME.csv`, its curves with the command that made them, and, of
several seeds the one in the middle, its weights in `files/pretrained/`. What is there already is
left as it is, unless `--again` is given; Ctrl-C saves, and the same command goes on from there.
`--table` prints the table.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent
TOP = RESULTS.parents[1]
PRETRAINED = TOP / "files" / "pretrained"
sys.path[:0] = [str(TOP), str(RESULTS)]

import run_csv  # noqa: E402
from cifar10_resnet import storage  # noqa: E402
from cifar10_resnet.cli.guard import exits_with_a_sentence  # noqa: E402
from cifar10_resnet.config import RunConfig  # noqa: E402
from cifar10_resnet.device import stderr_held_back  # noqa: E402

# what some of a CSV's columns are called in a run's event files
IN_EVENTS = {
    "epoch": "train_epoch",
    "test_accuracy": "eval_accuracy",
    "learning_rate": "train_learning_rate",
}


class Run(NamedTuple):
    """One row's training: what it is called, and the trainer's flags."""

    name: str
    num_layers: int
    shortcut_connections: bool = True
    recipe: str = "fast"
    seed: int = 0
    train_epochs: int | None = None  # where it is not the recipe's length
    epochs_between_evals: int = 1
    more: tuple[str, ...] = ()

    @property
    def network(self) -> str:
        return ("resnet" if self.shortcut_connections else "plain") + str(self.num_layers)

    def flags(self) -> list[str]:
        plain = [] if self.shortcut_connections else ["--shortcut_connections=False"]
        return [
            *(f"--num_layers={self.num_layers}", *plain, f"--recipe={self.recipe}"),
            *(f"--seed={self.seed}", "--dtype=bf16"),
            f"--epochs_between_evals={self.epochs_between_evals}",
            "--log_per_iterations=391",  # an epoch
            *([f"--train_epochs={self.train_epochs}"] if self.train_epochs else []),
            *self.more,
        ]

    @property
    def is_shipped(self) -> bool:
        """Whether its weights go to `files/pretrained/`: one of the fast recipe's full length."""
        return self.recipe == "fast" and self.train_epochs is None

    @property
    def seeds(self) -> list["Run"]:
        """The runs that differ from this one in their seed alone."""
        return [
            run for run in RUNS if run._replace(name="", seed=0) == self._replace(name="", seed=0)
        ]


# The most useful first: some take minutes, some hours.
RUNS = (
    Run("resnet20-fast-seed0", 20),
    Run("resnet20-fast-seed1", 20, seed=1),
    Run("resnet20-fast-seed2", 20, seed=2),
    # to the paper's accuracy, against the clock
    Run("resnet20-fast-28-epochs", 20, train_epochs=28, epochs_between_evals=7),
    Run("plain20-fast", 20, False),
    Run("resnet56-fast", 56),
    Run("plain56-fast", 56, False),
    Run("resnet110-fast", 110),
    Run("plain110-fast", 110, False),
    Run("resnet20-paper", 20, recipe="paper"),
    Run("resnet32-fast", 32),
    Run("resnet44-fast", 44),
)
# Test accuracy in percent, from the first paper's table 6; the best of five runs at 110 layers.
PAPER_ACCURACY = {20: 91.25, 32: 92.49, 44: 92.83, 56: 93.03, 110: 93.57}


class Result(NamedTuple):
    """What a finished run's CSV says."""

    run: Run
    csv: run_csv.RunCsv


def read_result(run: Run) -> Result | None:
    """The result of a run, or None where it is not finished."""
    file = RESULTS / f"{run.name}.csv"
    return Result(run, run_csv.read(file)) if file.exists() else None


def table(results: Sequence[Result]) -> str:
    """Returns the table of results in Markdown: a row for each network and recipe that is finished.

    The residual networks stand first, then the plain ones, each by their depth.
    """
    rows = [
        "| network | parameters | accuracy | seeds | recipe | epochs | minutes | paper "
        "| checkpoint |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    of_run = {result.run: result for result in results}
    for run in sorted(of_run, key=lambda run: (not run.shortcut_connections, run.num_layers)):
        if run == run.seeds[0]:
            rows.append(_row(run, [of_run[seed] for seed in run.seeds if seed in of_run]))
    return "\n".join(rows)


def _row(run: Run, group: Sequence[Result]) -> str:
    """Returns the row of a network and recipe: the mean of its seeds, then each of them."""
    accuracies = [100 * result.csv.accuracy for result in group]
    seeds = ", ".join(f"{accuracy:.2f}%" for accuracy in accuracies) if len(group) > 1 else "one"
    shipped = _middle(group).csv
    cells = (
        run.network,
        f"{int(shipped.comments['parameters']):,}",
        f"**{statistics.fmean(accuracies):.2f}%**",
        seeds,
        f"`{run.recipe}`",
        f"{shipped.columns['epoch'][-1]:.0f}",
        f"{min(result.csv.minutes[-1] for result in group):.0f}",
        f"{PAPER_ACCURACY[run.num_layers]:.2f}%" if run.shortcut_connections else "",
        f"`files/pretrained/{run.network}`" if run.is_shipped else "",
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _middle(group: Sequence[Result]) -> Result:
    """The result whose accuracy is the median (of an even number, the lower of the two)."""
    return sorted(group, key=lambda result: result.csv.accuracy)[(len(group) - 1) // 2]


def train(run: Run, path: str, runs_dir: str) -> None:
    """Trains a run to its end, from wherever it stands, and writes its CSV."""
    folder = os.path.abspath(os.path.join(runs_dir, run.name))
    where = (f"--path={os.path.abspath(path)}", f"--ckpt_path={folder}")
    scores = os.path.join(folder, "scores.json")
    _run_program("run_trainer.py", *where, *run.flags())
    _run_program("run_evaluator.py", *where, f"--output_json={scores}")
    with open(scores) as file:
        score = json.load(file)
    _write_csv(run, folder, score)


def _run_program(*words: str) -> None:
    """Runs one of the project's programs to its end, and ends with it where it fails."""
    # Ctrl-C reaches that program too, which may take a while to save: this one waits for it.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    status = subprocess.call([sys.executable, *words], cwd=TOP)
    signal.signal(signal.SIGINT, before)
    if status:
        raise SystemExit(status)


@stderr_held_back()  # TensorFlow's start
def _write_csv(run: Run, folder: str, score: dict[str, Any]) -> None:
    import tensorflow as tf

    from cifar10_resnet.training.history import read_history
    from resnet_model import ResNet

    description = RunConfig.from_json(json.dumps(score["description"]))
    network = ResNet(**description.model.arguments())
    parameters = sum(v.shape.num_elements() for v in network.trainable_variables)
    rows, seconds, step = read_history(os.path.join(folder, "log")), 0.0, 0
    for row in rows:
        if "train_images_per_second" in row:
            # from the rates, so that the time between two starts of a run does not count
            images = (row["step"] - step) * description.training.batch_size
            seconds += images / row["train_images_per_second"]
            step = row["step"]
        row["seconds"] = seconds
    comments = {
        "command": shlex.join(["python", "run_trainer.py", *run.flags()]),
        "versions": f"Python {platform.python_version()}, TensorFlow {tf.__version__}",
        "processor": f"{_processor()}, {os.cpu_count()} threads",
        "parameters": parameters,
        "test_accuracy": score["accuracy"],
    }
    content = io.StringIO()
    content.writelines(f"# {name}: {value}\n" for name, value in comments.items())
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(run_csv.COLUMNS)
    writer.writerows(
        [_rounded(row.get(IN_EVENTS.get(name, name))) for name in run_csv.COLUMNS] for row in rows
    )
    storage.new_file(str(RESULTS / f"{run.name}.csv"), content.getvalue().encode())


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:  # Linux alone has it
        for line in lines:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def ship(runs: Sequence[Run], runs_dir: str) -> None:
    """Puts the weights of a network's middle seed into `files/pretrained/`, once all are done."""
    from cifar10_resnet import checkpoints

    results = [read_result(run) for run in runs]
    if None in results:
        return
    middle = _middle(results).run
    trained = os.path.join(runs_dir, middle.name)
    if not os.path.isdir(trained):  # its CSV came with the project
        return
    saved = checkpoints.find(trained)
    folder = PRETRAINED / middle.network
    for _, old in checkpoints.list_checkpoints(str(folder)):
        checkpoints.delete(old)
    checkpoints.save_network(saved, str(folder))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--path", default="cifar-10-batches-bin", help="folder of CIFAR-10")
    parser.add_argument("--runs_dir", default="runs/results", help="folder for the checkpoints")
    parser.add_argument(
        "--only", action="append", choices=[run.name for run in RUNS], help="only this; repeatable"
    )
    parser.add_argument("--again", action="store_true", help="those too whose results are there")
    parser.add_argument("--table", action="store_true", help="train nothing: print the table")
    return parser.parse_args()


@exits_with_a_sentence
def main() -> int:
    flags = parse_flags()
    if flags.table:
        print(table([result for run in RUNS if (result := read_result(run))]))
        return 0
    for run in RUNS:
        if flags.only and run.name not in flags.only:
            continue
        if read_result(run) and not flags.again:
            print(f"== {run.name} is there", flush=True)
        else:
            print(f"== {run.name}", flush=True)
            train(run, flags.path, flags.runs_dir)
            if run.is_shipped:
                ship(run.seeds, flags.runs_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
