"""Runs the benchmark's processes: contenders that wait between turns, and programs that end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent
TAIL = 40  # the lines of a failed process's stderr to keep

ENVIRONMENT = os.environ | {
    # A machine's own libraries may be on this path too.
    "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH")))),
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # Several processes share the GPU, if there is one.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}


class Failure(Exception):
    """A failed process, described by its last line on stderr or by how it ended.

    `tail` has the last lines on its stderr.
    """

    def __init__(self, problem: str, tail: Sequence[str] = ()):
        super().__init__(problem)
        self.tail = list(tail)[-TAIL:]


class Late(Failure):
    """A process that was killed at its deadline, with the lines it had printed and their times."""

    def __init__(self, deadline: float, tail: list[str], lines: list[str], times: list[float]):
        super().__init__(f"killed at its deadline of {deadline:.0f} s", tail)
        self.lines, self.times = lines, times


def kill_group(child: subprocess.Popen) -> None:
    """Kills a child with all processes that it started, so their memory is free again."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def _child(command: list[str], stdin: int) -> Iterator[tuple[subprocess.Popen, Any]]:
    """Starts a child and yields it with its stderr. At the end, kills its process group."""
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        child = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=ENVIRONMENT,
            # The session can be killed as a group, and Ctrl-C reaches only the benchmark.
            start_new_session=True,
        )
        try:
            yield child, stderr
        finally:
            kill_group(child)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _lines_of(stderr: Any) -> list[str]:
    stderr.seek(0)
    return [line.strip() for line in stderr if line.strip()]


def _failure(child: subprocess.Popen, stderr: Any) -> Failure:
    status, lines = child.wait(), _lines_of(stderr)
    if status < 0:
        return Failure(f"killed by {signal.Signals(-status).name}", lines)
    return Failure(lines[-1] if lines else f"ended with status {status}", lines)


class Worker:
    """A contender in a separate process that waits for requests."""

    def __init__(self, child: subprocess.Popen, stderr: Any):
        self._child, self._stderr = child, stderr

    @classmethod
    @contextlib.contextmanager
    def start(cls, file: str) -> Iterator["Worker"]:
        with _child([sys.executable, str(FOLDER / file)], subprocess.PIPE) as (child, stderr):
            yield cls(child, stderr)

    def ask(self, do: str, **what: Any) -> Any:
        """Sends a request, returns the answer, and halts the process until the next request.

        Otherwise, its input pipeline would keep filling buffers during the others' turns.
        """
        answer = ""
        with contextlib.suppress(BrokenPipeError, ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGCONT)
            print(json.dumps({"do": do, **what}), file=self._child.stdin, flush=True)
            answer = self._child.stdout.readline()
            os.killpg(self._child.pid, signal.SIGSTOP)
        if not answer:
            raise _failure(self._child, self._stderr)
        return json.loads(answer)


@dataclass(frozen=True)
class Ended:
    """A finished program: its seconds until the expected line, or else until its exit.

    `times` are the seconds after which it printed each of its lines.
    """

    seconds: float
    peak_mib: float
    lines: list[str]
    times: list[float] = field(default_factory=list)


def run_program(
    *command: Any,
    until: str | None = None,
    deadline: float | None = None,
    enough: Callable[[list[str], list[float]], bool] = lambda lines, times: False,
) -> Ended:
    """Runs a Python program to its end, to its `deadline` in seconds, or until it is `enough`.

    After each line, `enough` sees the lines and their times. A program that printed enough is
    killed. So is a program at its deadline, which raises `Late`.
    """
    started, reached = time.perf_counter(), None
    lines: list[str] = []
    times: list[float] = []
    with _child([sys.executable, *map(str, command)], subprocess.DEVNULL) as (child, stderr):
        is_late, has_enough = threading.Event(), False
        with _killed_after(child, deadline, is_late):
            for line in child.stdout:
                if until and reached is None and line.startswith(until):
                    reached = time.perf_counter()
                lines.append(line.rstrip("\n"))
                times.append(time.perf_counter() - started)
                if has_enough := enough(lines, times):
                    kill_group(child)
                    break
            # Unlike Popen.wait(), os.wait4() returns the memory that this child has used.
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        ended = time.perf_counter()
        if is_late.is_set():
            raise Late(deadline, _lines_of(stderr), lines, times)
        if child.returncode and not has_enough:
            raise _failure(child, stderr)
        if until and reached is None:
            raise Failure(f"never said {until!r}")
    return Ended((reached or ended) - started, usage.ru_maxrss / 1024, lines, times)


@contextlib.contextmanager
def _killed_after(
    child: subprocess.Popen, deadline: float | None, is_late: threading.Event
) -> Iterator[None]:
    """Kills the child if the block takes longer than `deadline` seconds, and sets `is_late`."""

    def kill() -> None:
        is_late.set()
        kill_group(child)

    timer = threading.Timer(deadline or 0, kill)
    if deadline is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
