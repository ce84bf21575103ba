"""Runs the benchmark's processes: contenders that wait between turns, and programs that end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(PROJECT),
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # Several processes share the GPU, if there is one.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
}


class Failure(Exception):
    """A failed process, described by its last line on stderr or by how it ended."""


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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _failure(child: subprocess.Popen, stderr: Any) -> Failure:
    status = child.wait()
    if status < 0:
        return Failure(f"killed by {signal.Signals(-status).name}")
    stderr.seek(0)
    lines = [line.strip() for line in stderr if line.strip()]
    return Failure(lines[-1] if lines else f"ended with status {status}")


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
    """A finished program: its seconds until the expected line, or else until its exit."""

    seconds: float
    peak_mib: float
    lines: list[str]


def run_program(*command: Any, until: str | None = None) -> Ended:
    """Runs a Python program to its end."""
    started, reached, lines = time.perf_counter(), None, []
    with _child([sys.executable, *map(str, command)], subprocess.DEVNULL) as (child, stderr):
        for line in child.stdout:
            if until and reached is None and line.startswith(until):
                reached = time.perf_counter()
            lines.append(line.rstrip("\n"))
        # Unlike Popen.wait(), os.wait4() returns the memory that this child has used.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        ended = time.perf_counter()
        if child.returncode:
            raise _failure(child, stderr)
        if until and reached is None:
            raise Failure(f"never said {until!r}")
    return Ended((reached or ended) - started, usage.ru_maxrss / 1024, lines)
