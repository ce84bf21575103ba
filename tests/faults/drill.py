"""Kills a training again and again, and compares what comes out with one that was left alone.

    python tests/faults/drill.py                    # 50 kills
    python tests/faults/drill.py --kills=3 --steps=40

SIGKILL ends the trainer while it starts, at some step, or while it saves a checkpoint. After each
kill, the folder must contain an intact checkpoint. At the end, every byte of the last checkpoint
must equal the uninterrupted run's.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from cifar10_resnet import checkpoints  # noqa: E402

SAVE_EVERY = 5
KEPT = 2
PARTS = len(checkpoints.SUFFIXES)
KINDS = ("while saving", "between steps", "while starting")  # one after the other


def command(data: Path, run: Path, steps: int) -> list[str]:
    flags = {
        **{"path": data, "ckpt_path": run, "num_iterations": steps, "device": "cpu"},
        **{"num_layers": 8, "batch_size": 8, "save_per_iterations": SAVE_EVERY},
        **{"max_ckpts": KEPT, "log_per_iterations": 1},
    }
    program = [sys.executable, str(PROJECT / "run_trainer.py")]
    return program + [f"--{name}={value}" for name, value in flags.items()]


def train(*flags: object) -> None:
    ended = subprocess.run(command(*flags), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@contextlib.contextmanager
def one_life(*flags: object) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def live(process: subprocess.Popen, run: Path, kind: str, rng: random.Random) -> tuple[int, int]:
    """Lets a trainer live until its moment has come; returns the steps it came from and to."""
    moment = rng.random()
    if kind == "while starting":
        time.sleep(4 * moment)  # TensorFlow's import, the restoring, the tracing
        process.kill()
    began, reached = 0, 0
    goal = rng.randrange(1, 12)
    for line in process.stdout:
        if going_on := re.match(r"Resuming from \S+ at step (\d+)\.", line):
            began = reached = int(going_on[1])
        elif step := re.match(r"step (\d+)/", line):
            reached = int(step[1])
        if reached - began < goal or process.poll() is not None:
            continue
        if kind == "while saving":
            # The folder of a save exists for a few milliseconds. The moves come after it.
            while process.poll() is None and not (run / ".saving").exists():
                pass
            time.sleep(0.012 * moment)
        else:
            time.sleep(0.03 * moment)
        process.kill()
    return began, reached


def complete(run: Path) -> int:
    """Returns the step of the newest checkpoint that restores, or 0 if none was written."""
    prefix, _ = checkpoints.newest_intact(str(run))
    return checkpoints.read(prefix).step if prefix else 0


def drill(data: Path, folder: Path, steps: int, kills: int, seed: int) -> Counter:
    """Kills one run `kills` times. Returns how often, and what the run was doing."""
    rng = random.Random(seed)
    undisturbed, run = folder / "undisturbed", folder / "run"
    train(data, undisturbed, steps)
    seen: Counter = Counter()
    there = 0
    while seen["kills"] < kills:
        with one_life(data, run, steps) as process:
            kind = KINDS[seen["kills"] % len(KINDS)]
            began, reached = live(process, run, kind, rng)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, process.returncode
            raise SystemExit(f"the run ended after {seen['kills']} kills: give it more --steps")
        seen["kills"] += 1
        seen[kind] += 1
        seen["left .saving behind"] += (run / ".saving").exists()
        now = complete(run)
        assert now >= there, f"step {there} was saved, and now {now} is the newest that restores"
        assert not reached or began == there, f"went on from {began}, where {there} was saved"
        # The checkpoint before the last step that was printed.
        assert now >= (reached - 1) // SAVE_EVERY * SAVE_EVERY, f"{reached} reached, {now} saved"
        seen["steps repeated"] += max(reached - now, 0)
        there = now
        files = [path for path in run.glob("*") if path.is_file()]
        seen["files at most"] = max(seen["files at most"], len(files))
        # the kept ones, one that has come and one that is going, the lock, the state and the next
        assert len(files) <= (KEPT + 2) * PARTS + 3, files
        if seen["kills"] % 10 == 0:
            print(f"{seen['kills']} kills, step {there}", flush=True)
    train(data, run, steps)

    last = [f"{checkpoints.NAME}-{steps}{suffix}" for suffix in checkpoints.SUFFIXES]
    for name in last:
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert sorted(os.listdir(run)) == sorted(os.listdir(undisturbed)), "something was left behind"
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_data = [str(PROJECT / "cifar10_download_and_extract.py"), "--synthetic"]
        make_data += [f"--data_dir={folder}", "--synthetic_train_images=400"]
        subprocess.run([sys.executable, *make_data, "--synthetic_test_images=50"], check=True)
        seen = drill(
            Path(folder) / "cifar-10-batches-bin",
            Path(folder),
            *(flags.steps, flags.kills, flags.seed),
        )
    for what, count in seen.items():
        print(f"{what:<24}{count}")
    print("The killed run ended with the bytes of the undisturbed one.")


if __name__ == "__main__":
    main()
