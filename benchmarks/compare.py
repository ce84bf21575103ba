"""Compares the speed of this project with other ways to train the same network.

Every contender is a separate process. Each round runs every contender once, one at a time. If the
machine slows down, it slows all of them. All ratios are taken within a round.
`python benchmarks/compare.py --help` lists the flags.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measures
import report
from cifar10_resnet.errors import UserError
from processes import FOLDER, Failure, Worker

# They run in this order. "matmul" shares the rounds of "train20".
MEASURES: dict[str, Callable[[measures.Bench], dict[str, Any]]] = {
    "train20": lambda bench: measures.measure_steps(bench, 20, "matmul" in bench.flags.measures),
    "train110": lambda bench: measures.measure_steps(bench, 110),
    "matmul": lambda bench: measures.measure_steps(bench, 20, matmul=True, everyone=False),
    "fine_tuning": measures.measure_fine_tuning,
    "pipeline": measures.measure_pipeline,
    "trainer": measures.measure_trainer,
    "startup": measures.measure_startup,
    "evaluate": measures.measure_evaluate,
    "memory": measures.measure_memory,
    "scaling": measures.measure_scaling,
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
LIBRARIES = ("tensorflow", "keras", "torch", "numpy")

# If others use more than this share of a processor, the machine is too busy to measure.
BUSY = 0.2

# --check allows these differences between logits, relative to the largest logit. Before training,
# the networks differ only by rounding, and each step multiplies the difference. The weight decay is
# strong enough to show after two steps: with 5% less, the difference would be 0.1.
CHECKED = {"layers": 20, "dtype": "fp32", "weight_decay": 2.0}
TOLERANCES = {"before training": 1e-4, "after training": 1e-2}


def describe_machine() -> dict[str, Any]:
    """Returns the processor, its threads, the GPU if there is one, the system and the versions."""
    cpuinfo = ""
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)$", cpuinfo, re.MULTILINE)
    versions = {}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "processor": name[1] if name else platform.processor() or platform.machine(),
        "cpu_flags": sorted(set(CPU_FLAGS) & set(flags[1].split())) if flags else [],
        "threads": len(os.sched_getaffinity(0)),
        "gpu": gpu_name(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def gpu_name() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.strip().splitlines()[0] if told.strip() else None


def busy_with_others() -> float:
    """Returns how many processors others use in a second in which the benchmark sleeps."""

    def ticks() -> tuple[int, int]:
        times = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(times), times[3] + times[4]  # total; idle or waiting for a disk

    try:
        before = ticks()
        time.sleep(1)
        after = ticks()
    except (OSError, ValueError):
        return 0.0
    total, idle = after[0] - before[0], after[1] - before[1]
    return (os.cpu_count() or 1) * (1 - idle / total) if total else 0.0


def default_output(machine: dict[str, Any]) -> Path:
    name = " ".join(filter(None, (machine["processor"], machine["gpu"])))
    return FOLDER / "results" / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def check() -> int:
    """Returns 0 if all contenders are the same function before and after training, else 1."""
    print("How far the logits lie from this project's, relative to the largest:")
    sound = True
    with (
        tempfile.TemporaryDirectory() as folder,
        Worker.start(measures.THIS_PROJECT.file) as project,
    ):
        file = os.path.join(folder, "variables.npz")
        project.ask("prepare", **CHECKED)
        project.ask("export", file=file)
        expected = project.ask("check", file=file)
        for contender in measures.CONTENDERS[1:]:
            if importlib.util.find_spec(contender.needs) is None:
                print(f"  {contender.name}: skipped: no {contender.needs}")
                continue
            try:
                with Worker.start(contender.file) as worker:
                    worker.ask("prepare", **CHECKED, **dict(contender.options))
                    found = worker.ask("check", file=file)
            except Failure as failure:
                print(f"  {contender.name}: failed: {failure}")
                sound = False
                continue
            for (when, tolerance), ours, theirs in zip(
                TOLERANCES.items(), expected, found, strict=True
            ):
                apart = relative_difference(ours, theirs)
                sound &= apart <= tolerance
                verdict = "the same" if apart <= tolerance else "NOT the same"
                print(f"  {contender.name}, {when}: {apart:.1e}, {verdict}", flush=True)
    return 0 if sound else 1


def relative_difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> float:
    rows = list(zip(ours, theirs, strict=True))
    apart = max(abs(a - b) for row in rows for a, b in zip(*row, strict=True))
    return apart / max(abs(a) for row in ours for a in row)


def warn_if_busy(busy: dict[str, float]) -> None:
    if max(busy.values()) > BUSY:
        told = ", ".join(f"{share:.1f} {when}" for when, share in busy.items())
        print(
            f"\nOthers were using the processors ({told}). Such figures are not to be trusted: "
            "one contender suffers from it more than another."
        )


def parse_flags() -> argparse.Namespace:
    def several(text: str) -> list[str]:
        names = text.split(",")
        if unknown := sorted(set(names) - set(MEASURES)):
            raise argparse.ArgumentTypeError(f"no such measure: {', '.join(unknown)}")
        return names

    def at_least(least: int) -> Callable[[str], int]:
        def whole_number(text: str) -> int:
            if int(text) < least:
                raise argparse.ArgumentTypeError(f"{text} is less than {least}")
            return int(text)

        return whole_number

    parser = argparse.ArgumentParser(
        description="Measures this project beside Keras fit, the common TensorFlow 2 style and "
        "PyTorch, all training the same network.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--measures", type=several, default=list(MEASURES), help=f"of {','.join(MEASURES)} (all)")
    add("--rounds", type=at_least(1), default=5, help="turns of each contender (%(default)s)")
    add(
        "--steps",
        type=at_least(1),
        default=20,
        help="of ResNet-20 in a turn; the other measures' lengths follow (%(default)s)",
    )
    add(
        "--images",
        type=at_least(1000),
        default=50_000,
        help="in the training set of the measures that read files (%(default)s)",
    )
    add("--output", type=Path, help="results/<processor>.json beside this file, if left out")
    add("--check", action="store_true", help="measure nothing: compare what the networks compute")
    flags = parser.parse_args()
    if flags.images % 5:
        parser.error("--images must be a multiple of 5: CIFAR-10 has five files")
    return flags


def measure_all(flags: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        bench = measures.Bench(flags, Path(folder))
        for name, measure in MEASURES.items():
            if name not in flags.measures or name in found:
                continue
            print(f"{name}:", flush=True)
            found |= measure(bench)
    return found


def terminate(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    flags = parse_flags()
    signal.signal(signal.SIGTERM, terminate)
    try:
        if flags.check:
            return check()
        results: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "busy_with_others": {"before": busy_with_others()},
            "rounds": flags.rounds,
            "steps": flags.steps,
            "images": flags.images,
        }
        results["measures"] = measure_all(flags)
        results["busy_with_others"]["after"] = busy_with_others()
        for measure in results["measures"].values():
            report.print_measure(measure)
        warn_if_busy(results["busy_with_others"])
        report.save(results, flags.output or default_output(results["machine"]))
    except KeyboardInterrupt:
        print("\nstopped; nothing was saved", file=sys.stderr)
        return 130
    except (Failure, measures.DifferentNetworks, UserError, OSError) as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
