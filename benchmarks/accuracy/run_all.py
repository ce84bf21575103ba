"""Trains every network in the tables of docs/results.md, and writes the results.

    python benchmarks/accuracy/run_all.py --path=cifar-10-batches-bin \
        --cifar100_path=cifar-100-binary

Each run writes its curves and its command to `benchmarks/accuracy/NAME.csv`. The weights of the
median seed go to `files/pretrained/`. A finished run is skipped unless you pass `--again`. Press
Ctrl-C to save and stop, and run the same command to resume. `--table` prints the tables.
"""

import argparse
import csv
import functools
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
from cifar10_resnet.config import ModelConfig, RunConfig  # noqa: E402
from cifar10_resnet.device import processor, stderr_held_back  # noqa: E402
from cifar10_resnet.formats import FORMATS  # noqa: E402

# Some columns of a CSV file have other names in a run's event files.
IN_EVENTS = {
    "epoch": "train_epoch",
    "test_accuracy": "eval_accuracy",
    "learning_rate": "train_learning_rate",
}


class Run(NamedTuple):
    """A run for the table: its name, and the trainer's flags."""

    name: str
    num_layers: int
    shortcut_connections: bool = True
    recipe: str = "fast"
    seed: int = 0
    train_epochs: int | None = None  # None: the recipe's length
    epochs_between_evals: int = 1
    version: int = 2
    dtype: str = "bf16"
    dataset: str = "cifar10"
    ships: bool = True  # unless another recipe does for its network
    more: tuple[str, ...] = ()

    @property
    def network(self) -> str:
        """Returns the network's name, with its data set's if that is not CIFAR-10."""
        name = ModelConfig(
            num_layers=self.num_layers,
            shortcut_connections=self.shortcut_connections,
            resnet_version=self.version,
        ).name
        return name if self.dataset == "cifar10" else f"{name}-{self.dataset}"

    def flags(self) -> list[str]:
        plain = [] if self.shortcut_connections else ["--shortcut_connections=False"]
        version = [] if self.version == 2 else [f"--resnet_version={self.version}"]
        return [
            *(f"--num_layers={self.num_layers}", *plain, *version, f"--recipe={self.recipe}"),
            *(f"--seed={self.seed}", f"--dtype={self.dtype}"),
            f"--epochs_between_evals={self.epochs_between_evals}",
            "--log_per_iterations=391",  # one epoch
            *([f"--train_epochs={self.train_epochs}"] if self.train_epochs else []),
            *self.more,
        ]

    @property
    def command(self) -> list[str]:
        """Returns the words of the command that trains it, for readers."""
        path = [] if self.dataset == "cifar10" else [f"--path={FORMATS[self.dataset].folder}"]
        return ["python", "run_trainer.py", *path, *self.flags()]

    @property
    def is_full(self) -> bool:
        """Returns whether it has its recipe's length, in bf16."""
        return (self.train_epochs, self.dtype) == (None, "bf16")

    @property
    def is_shipped(self) -> bool:
        """Returns whether its weights go to `files/pretrained/`.

        Only full runs do. The recipe best replaces fast once all its seeds are finished.
        """
        best = [run for run in RUNS if (run.network, run.recipe) == (self.network, "best")]
        recipe = "best" if best and all(map(read_result, best)) else "fast"
        return self.ships and self.is_full and self.recipe == recipe

    @property
    def seeds(self) -> list["Run"]:
        """Returns the runs with the same settings and any seed."""
        return [
            run for run in RUNS if run._replace(name="", seed=0) == self._replace(name="", seed=0)
        ]


_best = functools.partial(Run, recipe="best", epochs_between_evals=5)
# The most useful runs come first, because some take minutes and some take hours.
RUNS = (
    _best("resnet20-best-seed0", 20),
    _best("resnet20-best-seed1", 20, seed=1),
    _best("resnet20-best-seed2", 20, seed=2),
    _best("resnet20-cifar100-best", 20, dataset="cifar100"),
    _best("resnet32-best", 32),
    _best("resnet56-best", 56),
    _best("resnet56-cifar100-best", 56, dataset="cifar100"),
    _best("resnet110-best", 110),
    _best("resnet32-cifar100-best", 32, dataset="cifar100"),
    _best("resnet44-best", 44),
    _best("resnet44-cifar100-best", 44, dataset="cifar100"),
    Run("resnet20-fast-seed0", 20),
    Run("resnet20-fast-seed1", 20, seed=1),
    Run("resnet20-fast-seed2", 20, seed=2),
    # These runs measure the time to the paper's accuracy.
    Run("resnet20-fast-28-epochs", 20, train_epochs=28, epochs_between_evals=7),
    Run("resnet20-fast-28-epochs-seed1", 20, train_epochs=28, epochs_between_evals=7, seed=1),
    Run("resnet20-fast-28-epochs-seed2", 20, train_epochs=28, epochs_between_evals=7, seed=2),
    Run("plain20-fast", 20, False),
    Run("resnet56-fast", 56),
    Run("plain56-fast", 56, False),
    Run("resnet110-fast", 110),
    Run("plain110-fast", 110, False, ships=False),  # It classifies two thirds wrongly.
    Run("resnet20-paper", 20, recipe="paper"),
    Run("resnet32-fast", 32),
    Run("resnet44-fast", 44),
    Run("resnet20-fast-fp32", 20, dtype="fp32"),
    Run("resnet20-v1-fast", 20, version=1),
    Run("resnet56-v1-fast", 56, version=1),
)
# The first paper's table 6 has these percents on CIFAR-10, at 110 layers the best of five runs.
PAPER_ACCURACY = {20: 91.25, 32: 92.49, 44: 92.83, 56: 93.03, 110: 93.57}


class Result(NamedTuple):
    """A finished run, and its CSV file."""

    run: Run
    csv: run_csv.RunCsv


def read_result(run: Run) -> Result | None:
    """Returns the result of a run, or None if it is not finished."""
    file = RESULTS / f"{run.name}.csv"
    return Result(run, run_csv.read(file)) if file.exists() else None


def tables(results: Sequence[Result]) -> list[str]:
    """Returns a table that compares recipes on ResNet-20, then one of each recipe's networks."""
    recipes = [result for result in results if result.run.network == "resnet20"]
    full = [result for result in results if result.run.is_full]
    of_recipes = (
        [result for result in full if result.run.recipe == recipe]
        for recipe in dict.fromkeys(result.run.recipe for result in full)
    )
    networks = [group for group in of_recipes if len({result.run.network for result in group}) > 1]
    return [table(group) for group in (recipes, *networks)]


def table(results: Sequence[Result]) -> str:
    """Returns a table in Markdown: a row for each network and recipe that is finished.

    CIFAR-10 comes first. The residual networks come before the plain networks, version 2 before
    version 1, each by depth.
    """
    rows = [
        "| network | parameters | accuracy | seeds | recipe | epochs | minutes | paper "
        "| checkpoint |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    of_run = {result.run: result for result in results}
    for run in sorted(
        of_run,
        key=lambda run: (
            *(run.dataset != "cifar10", not run.shortcut_connections),
            *(-run.version, run.num_layers),
        ),
    ):
        if run == run.seeds[0]:
            rows.append(_row(run, [of_run[seed] for seed in run.seeds if seed in of_run]))
    return "\n".join(rows)


def _row(run: Run, group: Sequence[Result]) -> str:
    """Returns the row of a network and recipe: the mean of its seeds, then each of them."""
    accuracies = [100 * result.csv.accuracy for result in group]
    seeds = ", ".join(f"{accuracy:.2f}%" for accuracy in accuracies) if len(group) > 1 else "one"
    shipped = _middle(group).csv
    in_paper = run.shortcut_connections and run.dataset == "cifar10"
    cells = (
        run.network,
        f"{int(shipped.comments['parameters']):,}",
        f"**{statistics.fmean(accuracies):.2f}%**",
        seeds,
        f"`{run.recipe}`" + ("" if run.dtype == "bf16" else f", {run.dtype}"),
        f"{shipped.columns['epoch'][-1]:.0f}",
        f"{min(result.csv.minutes[-1] for result in group):.0f}",
        f"{PAPER_ACCURACY[run.num_layers]:.2f}%" if in_paper else "",
        f"`files/pretrained/{run.network}`" if run.is_shipped else "",
    )
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def _middle(group: Sequence[Result]) -> Result:
    """Returns the result with the median accuracy (of an even number, the lower of the two)."""
    return sorted(group, key=lambda result: result.csv.accuracy)[(len(group) - 1) // 2]


def train(run: Run, path: str, runs_dir: str, device: str = "auto") -> None:
    """Trains or resumes a run to its end, evaluates it, and writes its CSV file."""
    folder = os.path.abspath(os.path.join(runs_dir, run.name))
    where = (f"--path={os.path.abspath(path)}", f"--ckpt_path={folder}", f"--device={device}")
    scores = os.path.join(folder, "scores.json")
    _run_program("run_trainer.py", *where, *run.flags())
    _run_program("run_evaluator.py", *where, f"--output_json={scores}")
    with open(scores) as file:
        score = json.load(file)
    _write_csv(run, folder, score, device)


def _run_program(*words: str) -> None:
    """Runs one of the project's programs, and exits with its status if it fails."""
    program = subprocess.Popen([sys.executable, *words], cwd=TOP)
    # Ctrl-C also reaches that program, but SIGTERM does not. This one waits while it saves.
    waiting = {
        signal.SIGINT: lambda number, frame: None,
        signal.SIGTERM: lambda number, frame: program.terminate(),
    }
    before = {number: signal.signal(number, handler) for number, handler in waiting.items()}
    status = program.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if status:
        raise SystemExit(status)


@stderr_held_back()  # TensorFlow's start-up messages
def _write_csv(run: Run, folder: str, score: dict[str, Any], device: str) -> None:
    import tensorflow as tf

    from cifar10_resnet.training.history import read_history
    from cifar10_resnet.training.machine import model_and_instructions
    from resnet_model import ResNet

    description = RunConfig.from_json(json.dumps(score["description"]))
    network = ResNet(**description.model.arguments())
    parameters = sum(v.shape.num_elements() for v in network.trainable_variables)
    model, _ = model_and_instructions(processor())
    gpus = map(_name_of, tf.config.list_physical_devices("GPU") if device != "cpu" else [])
    rows, seconds, step = read_history(os.path.join(folder, "log")), 0.0, 0
    for row in rows:
        if "train_images_per_second" in row:
            # The rates give the seconds, so the time between two starts of a run does not count.
            images = (row["step"] - step) * description.training.batch_size
            seconds += images / row["train_images_per_second"]
            step = row["step"]
        row["seconds"] = seconds
    comments = {
        "command": shlex.join(run.command),
        "versions": f"Python {platform.python_version()}, TensorFlow {tf.__version__}",
        "processor": ", ".join([f"{model}, {os.cpu_count()} threads", *gpus]),
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


def _name_of(gpu: Any) -> str:
    import tensorflow as tf

    return tf.config.experimental.get_device_details(gpu).get("device_name", "a GPU")


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def ship(runs: Sequence[Run], runs_dir: str) -> None:
    """Copies the median seed's weights to `files/pretrained/`, once all seeds are finished."""
    from cifar10_resnet import checkpoints

    results = [read_result(run) for run in runs]
    if None in results:
        return
    middle = _middle(results).run
    trained = os.path.join(runs_dir, middle.name)
    if not os.path.isdir(trained):  # The CSV file came with the project.
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
    for name, dataset in (("--path", "cifar10"), ("--cifar100_path", "cifar100")):
        known = FORMATS[dataset]
        parser.add_argument(name, default=known.folder, help=f"folder of {known.title}")
    parser.add_argument("--runs_dir", default="runs/results", help="folder for the checkpoints")
    parser.add_argument(
        "--only", action="append", choices=[run.name for run in RUNS], help="only this; repeatable"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "gpu"), help="device to train on"
    )
    parser.add_argument("--again", action="store_true", help="those too whose results are there")
    parser.add_argument("--table", action="store_true", help="train nothing: print the tables")
    return parser.parse_args()


@exits_with_a_sentence
def main() -> int:
    flags = parse_flags()
    if flags.table:
        print("\n\n".join(tables([result for run in RUNS if (result := read_result(run))])))
        return 0
    for run in RUNS:
        if flags.only and run.name not in flags.only:
            continue
        if read_result(run) and not flags.again:
            print(f"== {run.name} is there", flush=True)
        else:
            print(f"== {run.name}", flush=True)
            path = {"cifar10": flags.path, "cifar100": flags.cifar100_path}[run.dataset]
            train(run, path, flags.runs_dir, flags.device)
            if run.is_shipped:
                ship(run.seeds, flags.runs_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
