"""Starts several workers on this machine, to try distributed training.

python -m cifar10_resnet launch --workers=2 -- run_trainer.py --use_synthetic_data
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar10_resnet.cli import app
from cifar10_resnet.distributed import cluster
from cifar10_resnet.errors import UserError
from cifar10_resnet.settings import Checked, setting
from cifar10_resnet.terminal import command

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

# The other workers have this many seconds to end after one has failed.
PATIENCE = 20
# With this number, a process asks Linux for a signal when its parent ends.
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Settings(Checked):
    workers: int = setting(2, "Number of workers", "Workers", least=1)


def main(flags: "Flags") -> int:
    """Starts the program that follows the flags, once for each worker."""
    if not flags.arguments:
        raise UserError(f"No program given. Run `{command('launch')} -- run_trainer.py …`.")
    return launch(flags.arguments, flags.workers)


def launch(command: Sequence[str], count: int) -> int:
    """Runs a Python program as `count` workers. Returns the first failed status, or 0."""
    addresses = [f"127.0.0.1:{port}" for port in cluster.free_ports(count)]
    workers = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | {"TF_CONFIG": cluster.to_tf_config(addresses, index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # In its own session, a worker gets Ctrl-C once, from here.
            start_new_session=True,
            preexec_fn=_ending_with_launcher(),
        )
        for index in range(count)
    ]
    with _passing_on_signals(workers):
        printing = threading.Lock()
        readers = [
            threading.Thread(target=_show, args=(index, worker, printing))
            for index, worker in enumerate(workers)
        ]
        for reader in readers:
            reader.start()
        status = _wait(workers)
        for reader in readers:
            reader.join()
    return status


def _ending_with_launcher() -> Callable[[], None] | None:
    """Returns a function that makes a worker end when its launcher is killed, on Linux."""
    if sys.platform != "linux":
        return None
    tell_system, launcher = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        tell_system(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != launcher:  # The launcher has already ended.
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def _wait(workers: Sequence[subprocess.Popen]) -> int:
    """Waits for all workers. Kills the others `PATIENCE` seconds after one has failed."""
    ended = threading.Condition()
    statuses: list[int] = []

    def watch(worker: subprocess.Popen) -> None:
        status = worker.wait()
        with ended:
            statuses.append(status)
            ended.notify()

    for worker in workers:
        threading.Thread(target=watch, args=(worker,), daemon=True).start()
    with ended:
        ended.wait_for(lambda: any(statuses) or len(statuses) == len(workers))
        if not ended.wait_for(lambda: len(statuses) == len(workers), PATIENCE):
            for worker in workers:
                worker.kill()
            ended.wait_for(lambda: len(statuses) == len(workers))
        failed = next((status for status in statuses if status), 0)
    return 128 - failed if failed < 0 else failed


def _show(index: int, worker: subprocess.Popen, printing: threading.Lock) -> None:
    for line in worker.stdout:
        with printing, contextlib.suppress(BrokenPipeError):
            print(f"[{index}] {line}", end="", flush=True)


@contextlib.contextmanager
def _passing_on_signals(workers: Sequence[subprocess.Popen]):
    def pass_on(number: int, frame: object) -> None:
        for worker in workers:
            worker.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    app.run(main, Settings, arguments="last")
