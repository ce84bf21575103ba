"""Compares two checkouts of this project: both must compute and save the same, bit for bit.

python benchmarks/same_as_before.py BEFORE AFTER

Runs the same commands of both checkouts, side by side on the CPU, and prints one line a comparison.
Exits with 1 if anything differs. It takes about three minutes on two cores.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# A CPU computes the same bits every time. The programs below inherit this setting.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}

import numpy as np
import tensorflow as tf

# Each command of the package, and the file that does the same where there is no such command yet.
# The other programs are `NAME.py` in every checkout.
FILES = {
    "export": "export_saved_model.py",
    "classify": "classify_images.py",
    "serve": "serve.py",
    "plot": "plot_runs.py",
    "launch": "launch_local.py",
    "import": "images_to_binary.py",
    "draw": "files/draw_network.py",
}
STEPS = 20
RESNET8 = ("--num_layers=8",)
RUNS = {
    "paper-fp32": RESNET8,
    "paper-bf16": (*RESNET8, "--dtype=bf16"),
    "one_cycle-fp32": (*RESNET8, "--recipe=one_cycle"),
    "one_cycle-bf16": (*RESNET8, "--recipe=one_cycle", "--dtype=bf16"),
    "fast-fp32": (*RESNET8, "--recipe=fast"),
    "fast-bf16": (*RESNET8, "--recipe=fast", "--dtype=bf16"),
    "plain": (*RESNET8, "--shortcut_connections=False", "--data_format=channels_first"),
    "bottleneck": ("--num_layers=11", "--bottleneck", "--recipe=fast"),
    "version-1": (*RESNET8, "--resnet_version=1"),
    "holdout": (*RESNET8, "--holdout=500", "--epochs_between_evals=1", "--seed=7"),
    "transfer": ("--pretrained_model_checkpoint_path=pretrained/resnet20",),
    "fine-tune": ("--pretrained_model_checkpoint_path=pretrained/resnet20", "--fine_tune"),
}
# The runs that BEFORE begins and AFTER finishes, and those that are evaluated, on which images.
HANDED_OVER = ("paper-fp32", "fast-bf16")
EVALUATED = {"paper-fp32": "test", "holdout": "holdout"}
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # TensorFlow's own bookkeeping


class Side(NamedTuple):
    """A checkout, and the folder in which its commands run.

    All paths in the commands are relative, because descriptions of runs and reports contain them.
    """

    name: str
    checkout: Path
    folder: Path


class Failure(Exception):
    """A command that did not do its work."""


# --- Running commands -----------------------------------------------------------------------------


def start(side: Side, program: str, *arguments: str) -> subprocess.Popen:
    file = side.checkout / FILES.get(program, f"{program}.py")
    words = [str(file)] if file.exists() else ["-m", "cifar10_resnet", program]
    return subprocess.Popen(
        [sys.executable, *words, *arguments],
        cwd=side.folder,
        env=os.environ | {"PYTHONPATH": str(side.checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(side: Side, process: subprocess.Popen) -> str:
    out, err = process.communicate()
    if process.returncode:
        last = (err.strip() or "no message").splitlines()[-1]
        raise Failure(f"{side.name} ends with status {process.returncode}: {last:.200}")
    return out


def run_both(sides: list[Side], program: str, *arguments: str) -> list[str]:
    """Runs a program of both checkouts at the same time, and returns what each prints."""
    processes = [start(side, program, *arguments) for side in sides]
    return [output_of(side, process) for side, process in zip(sides, processes, strict=True)]


# --- Comparing ------------------------------------------------------------------------------------
# Each comparison yields what differs, and nothing if all is the same.


def different_values(what: str, before: dict, after: dict) -> Iterator[str]:
    """Compares two dicts of comparable values."""
    if missing := before.keys() - after.keys():
        yield f"AFTER lacks {len(missing)} {what}, such as {min(missing)}"
    if added := after.keys() - before.keys():
        yield f"AFTER adds {len(added)} {what}, such as {min(added)}"
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    if changed:
        yield f"{len(changed)} of {len(before)} {what} differ, such as {changed[0]}"


def different_tensors(before: Path, after: Path) -> Iterator[str]:
    yield from different_values("tensors", tensors_in(before), tensors_in(after))


def tensors_in(run_folder: Path) -> dict[str, tuple]:
    """Returns the last checkpoint of a run, the run's description included, as comparable bytes."""
    reader = tf.train.load_checkpoint(str(run_folder / f"model.ckpt-{STEPS}"))
    found = {}
    for key in reader.get_variable_to_shape_map().keys() - {OBJECT_GRAPH}:
        value = np.asarray(reader.get_tensor(key))
        found[key] = (value.dtype, value.shape, value.tobytes())
    return found


def logged(output: str) -> list[tuple[str, ...]]:
    """Returns step, loss, accuracy and learning rate of each log line. Evaluations have no rate."""
    return re.findall(r"^step (\d+)/.*? loss (\S+) accuracy (\S+)(?: lr (\S+))?", output, re.M)


def train(sides: list[Side], run: str, flags: tuple[str, ...]) -> Iterator[str]:
    before, after = map(logged, run_both(sides, "run_trainer", f"--ckpt_path={run}", *flags))
    if len(before) < STEPS or len(after) != len(before):
        yield f"BEFORE logs {len(before)} lines, AFTER {len(after)}"
    differing = [pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
    if differing:
        (step, *was), (_, *now) = differing[0]
        names = "loss, accuracy and learning rate"
        yield f"{len(differing)} log lines differ: {names} of step {step} are {was}, now {now}"
    yield from different_tensors(*(side.folder / run for side in sides))


def hand_over(sides: list[Side], folder: Path, run: str, flags: tuple[str, ...]) -> Iterator[str]:
    """Has BEFORE begin a run and AFTER finish it, and compares it with BEFORE's own."""
    before, after = (side._replace(folder=folder) for side in sides)
    command = ("run_trainer", f"--ckpt_path={run}", *flags)
    output_of(before, start(before, *command, f"--max_train_steps={STEPS // 2}"))
    steps = [int(line[0]) for line in logged(output_of(after, start(after, *command)))]
    # A run that starts over ends in the same bits too.
    if steps != list(range(STEPS // 2 + 1, STEPS + 1)):
        yield f"AFTER does not resume at step {STEPS // 2}: it logs the steps {steps}"
    yield from different_tensors(sides[0].folder / run, folder / run)


def write(sides: list[Side], output: str, program: str, *arguments: str) -> Iterator[str]:
    """Compares the file that a program writes, or all files in the folder that it writes."""
    run_both(sides, program, *arguments)
    before, after = (files_in(side.folder / output) for side in sides)
    if not before:
        yield f"BEFORE writes no {output}"
    yield from different_values("files", before, after)


def files_in(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def classify(sides: list[Side]) -> Iterator[str]:
    arguments = ("--ckpt_path=pretrained/resnet20", "--json", "--top=10", "photos/cat")
    before, after = run_both(sides, "classify", *arguments)
    if before != after:
        yield "the printed JSON differs"


def export(sides: list[Side], network: str) -> Iterator[str]:
    """Compares the logits of a shipped network on fixed images, as both checkouts export it."""
    folder = f"exported-{network}"
    run_both(sides, "export", f"--ckpt_path=pretrained/{network}", f"--export_dir={folder}")
    before, after = (logits_of(side.folder / folder) for side in sides)
    if before.tobytes() != after.tobytes():
        yield f"the logits differ by {np.abs(before - after).max():.2g} at most"


def logits_of(saved_model: Path) -> np.ndarray:
    loaded = tf.saved_model.load(str(saved_model))  # Its signatures do not keep its variables.
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    return loaded.signatures["serving_default"](images=tf.constant(images))["logits"].numpy()


def write_photos(folder: Path) -> None:
    """Writes 10 photos of random pixels in each of two classes, none of them square."""
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (40 + i, 60, 3), np.uint8)
            (folder / name / f"{i}.png").write_bytes(tf.io.encode_png(pixels).numpy())


def comparisons(
    sides: list[Side], work: Path, data: list[str]
) -> Iterator[tuple[str, Iterator[str]]]:
    """Yields the name of each comparison, and what differs."""
    every_step = (f"--num_iterations={STEPS}", "--log_per_iterations=1")
    on = data or ["--use_synthetic_data"]
    runs = {name: (*on, *every_step, *flags) for name, flags in RUNS.items()}
    for run, flags in runs.items():
        yield f"train {run}", train(sides, run, flags)
    for run in HANDED_OVER:
        yield f"resume {run}", hand_over(sides, work / "handed-over", run, runs[run])
    for run, split in EVALUATED.items():
        flags = (f"--ckpt_path={run}", f"--split={split}", f"--output_json={run}.json", *data)
        yield f"evaluate {run}", write(sides, f"{run}.json", "run_evaluator", *flags)
    small = ("--synthetic_train_images=500", "--synthetic_test_images=100")
    generate = ("cifar10_download_and_extract", "--synthetic", "--data_dir=data", *small)
    yield "write synthetic images", write(sides, "data", *generate)
    photos = ("--image_dir=photos", "--data_dir=photos-bin")
    yield "import photos", write(sides, "photos-bin", "import", *photos)
    flags = ("--path=photos-bin", "--batch_size=8", *every_step, *RESNET8)
    yield "train photos", train(sides, "photos-run", flags)
    yield "classify photos", classify(sides)
    plot = ("--run=paper-fp32", "--run=fast-fp32", "--output=curves.png")
    yield "plot curves", write(sides, "curves.png", "plot", *plot)
    yield "draw a network", write(sides, "net.png", "draw", *RESNET8, "--output=net.png")
    for folder in sorted((sides[0].checkout / "files/pretrained").iterdir()):
        yield f"logits of {folder.name}", export(sides, folder.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a checkout")
    parser.add_argument("after", type=Path, metavar="AFTER", help="the checkout to check")
    parser.add_argument("--data", type=Path, help="data folder (default: synthetic images)")
    options = parser.parse_args()
    data = [f"--path={options.data.resolve()}"] if options.data else []
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_photos(work / "photos")
        (work / "handed-over").mkdir()
        sides = []
        for name, checkout in (("BEFORE", options.before), ("AFTER", options.after)):
            side = Side(name, checkout.resolve(strict=True), work / name.lower())
            side.folder.mkdir()
            (side.folder / "pretrained").symlink_to(side.checkout / "files/pretrained")
            (side.folder / "photos").symlink_to(work / "photos")
            sides.append(side)
        for name, comparison in comparisons(sides, work, data):
            try:
                differences = list(comparison)
            except (Failure, OSError, ValueError, KeyError, tf.errors.OpError) as error:
                differences = [str(error)]
            print(f"{name:24}  {'; '.join(differences) or 'same'}", flush=True)
            results.append(not differences)
    different = results.count(False)
    seconds = time.monotonic() - began
    print(f"{len(results)} comparisons, {different} different, in {seconds:.0f} s")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
