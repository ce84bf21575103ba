"""Measures training on one GPU: this project's programs, its settings for GPUs, and PyTorch.

Every part is a separate process with a deadline, and the most important parts come first. The
results are written after each part, so an interrupted benchmark leaves the parts it measured.
`python benchmarks/gpu.py --help` lists the flags.
"""

import argparse
import datetime
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare import describe_machine, terminate
from gpu_parts import Bench, make_parts
from parts import Benchmark
from processes import FOLDER

# With the tests, `make gpu` takes less than six minutes.
BUDGET, QUICK_BUDGET = 250, 110
HEAD = ("part", "images/s", "first step, s", "GPU, %", "MiB", "W", "remarks")


def driver() -> str | None:
    """Returns the GPU's driver, memory, clock and power limit, as nvidia-smi prints them."""
    asked = "driver_version,memory.total,clocks.max.sm,power.limit,compute_cap"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"],
            **{"capture_output": True, "text": True, "check": True, "timeout": 20},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# --- The table ------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Returns the results as a Markdown table: a row for each part, and for each PyTorch form."""
    machine = results["machine"]
    versions = (f"{name} {number}" for name, number in machine["versions"].items())
    where = ", ".join([machine["gpu"] or machine["processor"], *versions])
    rows = [HEAD, ["---"] * len(HEAD)]
    for name, part in results["parts"].items():
        entries = part.get("forms") or [part]
        for entry in entries:
            rows.append(row(f"{name}, {entry['form']}" if "form" in entry else name, entry, part))
        if "forms" in part and "problem" in part:
            rows.append(row(name, {"problem": part["problem"]}, part))
    lines = "\n".join(f"| {' | '.join(cells)} |".replace("  ", " ") for cells in rows)
    said = "".join(f"- {sentence}\n" for sentence in ratios(results["parts"]))
    return f"`{results['command']}`, {results['date']}, {where}:\n\n{lines}\n\n{said}"


def ratios(parts: dict[str, Any]) -> list[str]:
    """Returns sentences that compare the trainer with its bare step and with PyTorch."""
    said = []
    for name in ("20-bf16", "20-fp32", "110-bf16", "110-fp32"):
        layers, dtype = name.split("-")
        ours = parts.get(name, {}).get("images_per_second")
        forms = [
            form
            for other, part in parts.items()
            if other.startswith(f"pytorch-{name}-")
            for form in part.get("forms", [])
            if "images_per_second" in form
        ]
        bare = parts.get(f"step-{layers}", {}).get("images_per_second")
        if ours and bare and dtype == "bf16":
            said.append(
                f"ResNet-{layers}, {dtype}: the trainer / its bare step = {ours / bare:.2f}"
            )
        if ours and forms:
            best = max(forms, key=lambda form: form["images_per_second"])
            ratio = ours / best["images_per_second"]
            said.append(
                f"ResNet-{layers}, {dtype}: the trainer / PyTorch's fastest form "
                f"({best['form']}, without input) = {ratio:.2f}"
            )
    return said


def row(name: str, entry: dict[str, Any], part: dict[str, Any]) -> list[str]:
    """Returns the cells of one row."""

    def cell(value: float | None, digits: int = 0) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    gpu = entry.get("gpu", {})
    remarks = [entry["problem"]] if "problem" in entry else []
    if "accuracy" in entry:
        remarks.append(
            f"{entry['steps']:,} steps in {entry['train_seconds']:.1f} s, "
            f"accuracy {entry['accuracy']:.2%}, evaluated in {entry['evaluate_seconds']:.1f} s"
        )
    if entry is part and "flags" in part:
        remarks.append(f"`{part['flags']}`")
    return [
        name,
        cell(entry.get("images_per_second")),
        cell(entry.get("startup_seconds"), 1),
        cell(gpu.get("utilization_percent")),
        cell(gpu.get("memory_mib", entry.get("peak_mib"))),
        cell(gpu.get("power_watts")),
        "; ".join(remarks).replace("|", "/"),
    ]


# --- The program ----------------------------------------------------------------------------------


def parse_flags() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter measurements, in under two minutes")
    add("--path", type=Path, help="folder of CIFAR-10 (default: synthetic images)")
    add("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    add("--name", help="name of the results' files (default: the GPU's)")
    add("--only", type=names, default=[], help="parts to measure, or the beginning of their names")
    add("--skip", type=names, default=[], help="parts to skip, or the beginning of their names")
    add("--cpu", action="store_true", help="a short form of each part on a CPU")
    add("--budget", type=float, help=f"end after this many seconds (default: {BUDGET})")
    add("--known", type=Path, action="append", default=[], help="results to add to; repeatable")
    add("--list", action="store_true", help="measure nothing: print the parts")
    return parser.parse_args()


def chosen(parts: list, only: list[str], skip: list[str]) -> list:
    """Returns the parts whose names begin as --only lists, without the parts that --skip lists."""
    for beginning in (*only, *skip):
        if not any(part.name.startswith(beginning) for part in parts):
            names = ", ".join(part.name for part in parts)
            raise SystemExit(f"gpu.py: error: {beginning} is not a part. Use {names}.")
    parts = [p for p in parts if not only or any(p.name.startswith(name) for name in only)]
    return [p for p in parts if not any(p.name.startswith(name) for name in skip)]


def main() -> int:
    flags = parse_flags()
    signal.signal(signal.SIGTERM, terminate)
    machine = describe_machine()
    name = flags.name or re.sub("[^a-z0-9]+", "-", (machine["gpu"] or "cpu").lower())
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": machine | {"driver": driver()},
        "parts": {},
    }
    for file in flags.known:
        results["parts"] |= json.loads(file.read_text())["parts"]
    budget = flags.budget or (QUICK_BUDGET if flags.quick else BUDGET)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        parts = make_parts(Bench(Path(folder), flags.path, flags.quick, flags.cpu))
        parts = chosen(parts, flags.only, flags.skip)
        if flags.list:
            print("\n".join(f"{p.name}: {p.title} (at most {p.deadline:.0f} s)" for p in parts))
            return 0
        file = (flags.output or FOLDER / "results") / f"{name.strip('-')}.json"
        benchmark = Benchmark(parts, results, file, budget, table)
        try:
            benchmark.run()
        except KeyboardInterrupt:
            print(f"\nstopped; the parts before are in {file}", file=sys.stderr)
            return 130
    print(f"\n{table(results)}\nsaved as {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
