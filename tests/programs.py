"""Runs the project's commands as their users do: processes with output and exit status."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

from cifar10_resnet.__main__ import COMMANDS
from cifar10_resnet.distributed import cluster

PROJECT = Path(__file__).resolve().parent.parent
# The module of each program, by the name that `start` takes.
PROGRAMS = {name if "." in module else f"{module}.py": module for name, module in COMMANDS.items()}
# 8 layers and small batches: a step takes a few milliseconds
SMALL = ("--num_layers=8", "--batch_size=16", "--log_per_iterations=5")


def start(*command: object, **keywords) -> subprocess.Popen:
    """Starts one of the project's programs: "run_trainer.py", "export" …"""
    program, *arguments = map(str, command)
    words = [program] if program.endswith(".py") else ["cifar10_resnet", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, str(PROJECT / words[0]), *words[1:], *arguments], **(pipes | keywords)
    )


def run(*command: object, status: int = 0, **keywords) -> subprocess.CompletedProcess:
    process = start(*command, **keywords)
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def error_of(*command: object, **keywords) -> str:
    """Returns the one-line error of a command."""
    err = run(*command, status=1, **keywords).stderr
    assert len(err.strip().splitlines()) == 1, err
    return err


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Waits until the process has printed the text."""
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"never said {text!r}: {process.communicate()}")


def run_code(code: str, *arguments: object, status: int = 0, **keywords):
    """Runs Python code that imports the project's modules, in a separate process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    keywords = {"cwd": PROJECT, "timeout": 240} | keywords
    done = subprocess.run(command, capture_output=True, text=True, **keywords)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def in_terminal(*command: object, columns: int = 80, **keywords) -> tuple[int, str]:
    """Runs a program of the project in a terminal. Returns its exit status and its output."""
    here, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = start(*command, **streams, **keywords)
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while chunk := os.read(here, 4096):
            written += chunk
    os.close(here)
    return process.wait(), written.decode()


def environment(**more: str) -> dict[str, str]:
    # A machine's own libraries may be on this path too.
    path = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


def without_tensorflow(folder: Path) -> dict[str, str]:
    """Returns an environment in which importing TensorFlow ends the program."""
    (folder / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    return {**os.environ, "PYTHONPATH": str(folder)}


class Workers:
    """Processes of one command. Each can have its own flags and its own environment."""

    def __init__(
        self,
        count: int,
        command: list[str],
        *own: tuple[str, ...],
        environments: Sequence[dict[str, str]] = (),
    ):
        addresses = [f"127.0.0.1:{port}" for port in cluster.free_ports(count)]
        self.processes = [
            start(
                *command,
                *(own[index] if own else ()),
                env=environment(
                    TF_CONFIG=cluster.to_tf_config(addresses, index),
                    **(environments[index] if environments else {}),
                ),
            )
            for index in range(count)
        ]

    def wait_for(self, text: str) -> None:
        """Waits until the chief has printed the text."""
        wait_for(self.processes[0], text)

    def ends(self) -> list[tuple[int, str]]:
        """Returns the status and the error output of each process, when all have ended."""
        return [
            (p.returncode, error)
            for p in self.processes
            for _, error in [p.communicate(timeout=120)]
        ]


def assert_lost(end: tuple[int, str], index: int) -> None:
    status, error = end
    assert status == 1, error
    assert re.fullmatch(rf"run_trainer.py: error: worker {index} \S+ was lost, .*\n", error), error


def table_in(shown: str) -> dict[str, str]:
    """The rows of the table that a program prints at its end."""
    return dict(re.findall(r"^  (\w+(?: \w+)*)  +(.*)$", shown, re.M))
