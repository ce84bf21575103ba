"""Trains, evaluates and saves for long in one process: memory and open files must stay level.

    python tests/faults/load.py     # writes files/load.png

Takes 2,000 steps with an evaluation and a checkpoint every 20 steps. Then evaluates the last
checkpoint 200 times, each time with a new network.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

import numpy as np  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

import run_trainer  # noqa: E402
from cifar10_resnet import checkpoints  # noqa: E402
from cifar10_resnet.data import dataset  # noqa: E402
from cifar10_resnet.evaluation.evaluator import score_checkpoints  # noqa: E402
from cifar10_resnet.figures.style import ACCENT, picture  # noqa: E402
from cifar10_resnet.options import Options  # noqa: E402
from cifar10_resnet.training import resume  # noqa: E402

STEPS, EVERY, EVALUATIONS = 2_000, 20, 200
BATCH = 16
# The allocators settle over the first part; from there on, this much more is growth.
SETTLED, MOST_GROWTH = 0.25, 0.05


class Sample(NamedTuple):
    megabytes: float
    files: int


def sample() -> Sample:
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.split("VmRSS:")[1].split()[0])
    return Sample(kilobytes / 1024, len(os.listdir("/proc/self/fd")))


def train(folder: str) -> list[Sample]:
    """A sample at each checkpoint of a run."""
    samples: list[Sample] = []
    save = checkpoints.save

    def watched(*arguments: object) -> str:
        samples.append(sample())
        return save(*arguments)

    options = Options(
        ckpt_path=folder,
        save_per_iterations=EVERY,
        log_per_iterations=EVERY,
        epochs_between_evals=1,
    )
    given = {"dataset": "synthetic", "num_layers": 8, "batch_size": BATCH, "num_iterations": STEPS}
    run, _, _ = resume.prepare_run(given, folder)
    checkpoints.save = watched
    try:
        run_trainer.train(run, options)
    finally:
        checkpoints.save = save
    return samples


def evaluate(folder: str) -> list[Sample]:
    samples = []
    for _ in range(EVALUATIONS):
        list(score_checkpoints([checkpoints.find(folder)]))
        samples.append(sample())
    return samples


def growth(values: list[float]) -> float:
    """Returns by how much the last quarter's median exceeds the first settled quarter's."""
    settled = values[int(SETTLED * len(values)) :]
    quarter = max(1, len(settled) // 4)
    first, last = (sorted(part)[len(part) // 2] for part in (settled[:quarter], settled[-quarter:]))
    return last / first - 1


def draw(runs: dict[str, list[Sample]], file: Path) -> None:
    """Draws memory above open files, each with its own axis, for each of the runs."""
    title = "Memory and open files stay level over a long run"
    subtitle = "One process trains, evaluates and saves. Then it evaluates 200 networks"
    with picture(file, height=440, title=title, subtitle=subtitle) as figure:
        grid = figure.subplots(2, len(runs), sharex="col", sharey="row")
        for column, (what, samples) in zip(grid.T, runs.items(), strict=True):
            count = int(what.split()[0].replace(",", ""))
            places = np.linspace(count / len(samples), count, len(samples))
            for axes, values in zip(column, zip(*samples, strict=True), strict=True):
                axes.plot(places, values, color=ACCENT)
                axes.set(xlim=(0, count))
            column[0].set_title(what)
            column[-1].xaxis.set_major_formatter("{x:,.0f}")
            column[-1].xaxis.set_major_locator(MaxNLocator(4, integer=True))
            column[-1].set_xlabel(what.split()[1].strip(",:"))
        for axes, name in zip(grid[:, 0], ("memory in MiB", "open files"), strict=True):
            axes.set_ylabel(name)
            axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def main() -> int:
    # an epoch is as long as the steps between two checkpoints
    dataset.SYNTHETIC_IMAGES = {"train": EVERY * BATCH, "test": 200}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            f"{STEPS:,} steps: evaluated and saved every {EVERY}": train(folder),
            f"{EVALUATIONS} evaluations, each with a new network": evaluate(folder),
        }
    draw(runs, PROJECT / "files" / "load.png")
    failed = False
    for title, samples in runs.items():
        memory = growth([s.megabytes for s in samples])
        files = growth([float(s.files) for s in samples])
        print(
            f"{title}: memory {samples[0].megabytes:.0f} to {samples[-1].megabytes:.0f} MiB, "
            f"{memory:+.1%} once settled; open files {samples[0].files} to {samples[-1].files}"
        )
        failed |= memory > MOST_GROWTH or files > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
