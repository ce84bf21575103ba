"""Runs the parts of a benchmark one after the other, and writes the results after each part.

A part that fails or is late is recorded, and the next part runs. At the end of the budget, the part
that is running is late, and the other parts are skipped.
"""

import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar10_resnet import storage
from processes import Ended, Failure, run_program

SAMPLE_MS = 500
LEAST_SECONDS = 5  # A part that has less than this is skipped.
SAMPLED = "utilization.gpu,memory.used,power.draw"
Results = dict[str, Any]


class Clock:
    """The deadline of one part, which all programs of the part share.

    `save` writes what the part has measured so far.
    """

    def __init__(self, deadline: float, save: Callable[[], None]):
        self._deadline, self._started = deadline, time.monotonic()
        self.save = save

    def run(self, *command: Any, **keywords: Any) -> Ended:
        """Runs a program in the seconds that are left, as `run_program` does."""
        left = self._deadline - (time.monotonic() - self._started)
        return run_program(*command, deadline=max(left, 1), **keywords)


@dataclass(frozen=True)
class Part:
    """A part of a benchmark: its name, its deadline in seconds, and how to measure it.

    `measure` adds what it finds to the results that it gets. What it added before a failure counts.
    """

    name: str
    title: str
    deadline: float
    measure: Callable[[Clock, Results], None]


class GpuSamples:
    """The GPU's use, memory and power, sampled in the background while a part runs."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        self._sampler: subprocess.Popen | None = None

    def __enter__(self) -> "GpuSamples":
        command = ["nvidia-smi", f"--query-gpu={SAMPLED}", "--format=csv,noheader,nounits"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        try:
            self._sampler = subprocess.Popen([*command, "-lms", str(SAMPLE_MS)], **pipes)
        except OSError:
            return self  # There is no NVIDIA GPU here.
        threading.Thread(target=self._read, args=(self._sampler.stdout,), daemon=True).start()
        return self

    def _read(self, lines: Any) -> None:
        for line in lines:
            values = []
            for value in line.split(","):
                try:
                    values.append(float(value))
                except ValueError:
                    values.append(float("nan"))  # "[N/A]"
            if len(values) == 3:
                self._samples.append((time.monotonic(), values))

    def __exit__(self, *exception: object) -> None:
        if self._sampler:
            self._sampler.kill()
            self._sampler.wait()

    def medians(self, seconds: float) -> Results:
        """Returns the medians over the last `seconds`, in which the GPU should be busy."""
        since = time.monotonic() - seconds
        chosen = [values for at, values in self._samples if at >= since]
        names = ("utilization_percent", "memory_mib", "power_watts")
        columns = {
            name: [value for value in column if value == value]
            for name, column in zip(names, zip(*chosen, strict=True), strict=False)
        }
        return {name: statistics.median(column) for name, column in columns.items() if column}


@dataclass
class Benchmark:
    """The parts of a benchmark, its results, and the files that it writes after each part."""

    parts: Sequence[Part]
    results: Results
    file: Path
    budget: float
    table: Callable[[Results], str]
    started: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        """Measures all parts that are not in the results yet."""
        found = self.results.setdefault("parts", {})
        for number, part in enumerate(self.parts, 1):
            where = f"[{number}/{len(self.parts)}, {self._seconds():.0f} s] {part.name}"
            if part.name in found and found[part.name]["status"] == "measured":
                print(f"{where}: already measured", flush=True)
                continue
            left = self.budget - self._seconds()
            if left < LEAST_SECONDS:
                problem = f"skipped: the budget of {self.budget:.0f} s is spent"
                found[part.name] = {"title": part.title, "status": "skipped", "problem": problem}
                print(f"{where}: {problem}", flush=True)
                continue
            print(f"{where}: {part.title} …", flush=True)
            found[part.name] = result = {"title": part.title, "status": "running"}
            self.measure(part, result, min(part.deadline, left))
            print(f"    {summary(result)}", flush=True)
            self.write()
        self.write()

    def measure(self, part: Part, result: Results, deadline: float) -> None:
        """Measures a part within its deadline, and records how it ended."""
        began = time.monotonic()
        try:
            part.measure(Clock(deadline, self.write), result)
            result["status"] = "measured"
        # The next parts must run, whatever goes wrong in this part.
        except Exception as error:
            result["status"] = "failed"
            name = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
            result["problem"] = f"{name}{error}"[:400]
            result["stderr"] = getattr(error, "tail", [])
        except KeyboardInterrupt:
            result |= {"status": "failed", "problem": "stopped by Ctrl-C"}
            self.write()
            raise
        finally:
            result["seconds"] = round(time.monotonic() - began, 1)

    def write(self) -> None:
        """Writes the results as JSON and as a Markdown table."""
        self.results["seconds"] = round(self._seconds(), 1)
        storage.make_folder(str(self.file.parent))
        storage.new_file(self.file, (json.dumps(self.results, indent=1) + "\n").encode())
        storage.new_file(self.file.with_suffix(".md"), (self.table(self.results)).encode())

    def _seconds(self) -> float:
        return time.monotonic() - self.started


def summary(result: Mapping[str, Any]) -> str:
    """Returns the line that is printed after a part."""
    words = [result["status"]]
    if "images_per_second" in result:
        words.append(f"{result['images_per_second']:,.0f} images/s")
    if "accuracy" in result:
        words.append(f"{result['accuracy']:.2%}")
    if "problem" in result:
        words.append(result["problem"])
    return f"{', '.join(words)} ({result['seconds']:.0f} s)"
