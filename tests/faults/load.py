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
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np  # noqa: E402

import run_trainer  # noqa: E402
from cifar10_resnet import checkpoints  # noqa: E402
from cifar10_resnet.config import Options  # noqa: E402
from cifar10_resnet.data import dataset  # noqa: E402
from cifar10_resnet.evaluation.evaluator import score_checkpoints  # noqa: E402
from cifar10_resnet.figures.style import BLUE, VERMILLION, picture  # noqa: E402
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
    title = "Memory and open files over a long run"
    subtitle = "Of one process that trains, evaluates and saves, and then evaluates anew 200 times."
    with picture(file, height=320, title=title, subtitle=subtitle) as figure:
        axes = figure.subplots(1, len(runs), sharey=True)
        for axis, (what, samples) in zip(axes, runs.items(), strict=True):
            count = int(what.split()[0].replace(",", ""))
            places = np.linspace(count / len(samples), count, len(samples))
            for values, name, colour, lift in (
                ([s.megabytes for s in samples], "memory, MiB", BLUE, -16),
                ([s.files for s in samples], "open files", VERMILLION, 6),
            ):
                axis.plot(places, values, color=colour)
                place = {"xytext": (0, lift), "textcoords": "offset points", "ha": "right"}
                axis.annotate(name, (places[-1], values[-1]), color=colour, **place)
            axis.set(title=what, ylim=(0, None), xlim=(0, count))


def main() -> int:
    # an epoch is as long as the steps between two checkpoints
    dataset.SYNTHETIC_IMAGES = {"train": EVERY * BATCH, "test": 200}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            f"{STEPS:,} steps, an evaluation and a checkpoint every {EVERY}": train(folder),
            f"{EVALUATIONS} evaluations, each of a network of its own": evaluate(folder),
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
