"""Holds the workers together from their first call until TensorFlow has started in all of them.

TensorFlow waits too. But it ignores Ctrl-C, does not name missing workers, and does not notice
that a worker ended while it started.
"""

import contextlib
import re
import select
import socket
import time
from collections.abc import Callable
from typing import NoReturn

from cifar10_resnet.distributed.cluster import Cluster
from cifar10_resnet.errors import UserError

ANSWER_SECONDS = 5  # to connect to the chief, or to send it the list of workers and an index
RETRY_SECONDS, BEAT_SECONDS, POLL_SECONDS = 0.2, 1.0, 0.05
MOST_CALLERS = 100  # Unknown clients must not use up the chief's open files.
MOST_BYTES = 4096  # The most in one line. The workers' lines are shorter.

# The lines that workers send. An empty line shows that the sender is alive.
ALL_ARE_HERE, STARTED, ALL_HAVE_STARTED = "all are here", "started", "all have started"
OTHER_LIST, SECOND, LOST = "other list of workers", "second worker with this index", "lost {}"


class Connection:
    """A connection to another worker. It carries short lines of text."""

    def __init__(self, connected: socket.socket, index: int | None = None):
        self.index = index
        self.is_open = True
        self.opened = self.heard = time.monotonic()
        self._socket, self._unread = connected, b""
        connected.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, text: str) -> None:
        """Sends a line. If the other end is gone, `read` shows it."""
        with contextlib.suppress(OSError):
            self._socket.sendall(f"{text}\n".encode())

    def read(self) -> list[str]:
        """Returns the lines that have arrived. Notices the end of the other end."""
        try:
            data = self._socket.recv(MOST_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.heard = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        self.is_open = bool(data) and len(self._unread) < MOST_BYTES
        return [line.decode("utf-8", "replace") for line in lines if line]

    def close(self) -> None:
        self.is_open = False
        self._socket.close()


class Meeting:
    """The connections between the chief and the other workers. As a context, it closes them."""

    def __init__(self, cluster: Cluster, timeout: float, worker_timeout: float):
        self._cluster, self._timeout, self._worker_timeout = cluster, timeout, worker_timeout
        self._end = time.monotonic() + timeout
        self._between_beats = min(BEAT_SECONDS, worker_timeout / 4)
        self._next_beat = 0.0
        self._is_chief = cluster.index == 0
        self._indices = [str(index) for index in range(1, len(cluster.addresses))]
        self._others: dict[int, Connection] = {}  # by the index of the worker at the other end
        self._said: list[tuple[int, str]] = []  # the lines that `watch` has to read first

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *exception: object) -> None:
        for other in self._others.values():
            other.close()

    @property
    def seconds_left(self) -> float:
        return max(self._end - time.monotonic(), 0)

    def gather(self) -> None:
        """Waits until all workers have called the chief."""
        with _own_port(self._cluster) as door:
            if self._is_chief:
                self._receive(door)
        if not self._is_chief:
            self._call_chief()

    def watch(self, is_started: Callable[[], bool]) -> None:
        """Waits until `is_started` is true in all workers. Names a worker that is lost."""
        waiting_for, is_announced = set(self._others), False
        while True:
            if not is_announced and is_started():
                is_announced = True
                if not self._is_chief:
                    self._others[0].send(STARTED)
            for index, text in self._said + self._wait(POLL_SECONDS):
                if lost := re.fullmatch(LOST.format(r"(\d+)"), text):
                    raise self._cluster.loss_of(int(lost[1]))
                if text == (STARTED if self._is_chief else ALL_HAVE_STARTED):
                    waiting_for.discard(index)
            self._said = []
            if is_announced and not waiting_for:
                break
            if not self.seconds_left:
                self._give_up(waiting_for if is_announced else {self._cluster.index})
            for index, other in self._others.items():
                if not self._is_alive(other):
                    self._tell_all(LOST.format(index))
                    raise self._cluster.loss_of(index)
        self._tell_all(ALL_HAVE_STARTED)
        # The others end the connections. A connection that ends here first may lose its last line.
        patience = time.monotonic() + ANSWER_SECONDS
        while self._is_chief and self._are_open() and time.monotonic() < patience:
            self._wait(POLL_SECONDS)

    # --- The chief ------------------------------------------------------------------------------

    def _receive(self, door: socket.socket) -> None:
        """Answers all other workers once each has called."""
        callers: list[Connection] = []
        door.setblocking(False)
        try:
            while absent := set(map(int, self._indices)) - set(self._others):
                if not self.seconds_left:
                    self._give_up(absent)
                self._wait(BEAT_SECONDS, door, *callers)
                with contextlib.suppress(OSError):  # The caller has already gone.
                    callers.append(Connection(door.accept()[0]))
                for caller in callers:
                    self._hear(caller)
                callers = _patient(callers)
                self._forget_lost()
        finally:
            for caller in callers:
                caller.close()
        self._tell_all(ALL_ARE_HERE)

    def _hear(self, caller: Connection) -> None:
        """Makes a caller one of the workers if it has said that it is one. Refuses others."""
        for text in caller.read()[:1]:
            self._wait(0)  # A worker that calls again may have gone since the last wait.
            self._forget_lost()
            token, _, index = text.partition(" ")
            if token != self._cluster.token or index not in self._indices:
                caller.send(OTHER_LIST)
            elif int(index) in self._others:
                caller.send(SECOND)
            else:
                caller.index = int(index)
                self._others[caller.index] = caller
                return
            caller.close()

    def _forget_lost(self) -> None:
        """Forgets the workers that are gone. They may start again."""
        for index, other in list(self._others.items()):
            if not self._is_alive(other):
                self._others.pop(index).close()

    # --- Other workers --------------------------------------------------------------------------

    def _call_chief(self) -> None:
        """Calls the chief until it answers."""
        address = self._cluster.host_and_port(0)
        while self.seconds_left:
            with contextlib.suppress(OSError):
                seconds = max(min(ANSWER_SECONDS, self.seconds_left), 0.01)
                self._others[0] = Connection(socket.create_connection(address, seconds), 0)
                self._others[0].send(f"{self._cluster.token} {self._cluster.index}")
                if self._is_answered(self._others[0]):
                    return
                self._others.pop(0).close()
            time.sleep(RETRY_SECONDS)
        self._give_up({0})

    def _is_answered(self, chief: Connection) -> bool:
        """Returns whether the chief says that all workers are here."""
        while self.seconds_left and self._is_alive(chief):
            said = self._wait(BEAT_SECONDS)
            for place, (_, text) in enumerate(said, 1):
                name, index = self._cluster.name(0), self._cluster.index
                if text == OTHER_LIST:
                    raise UserError(
                        f"{name} has another list of workers in its TF_CONFIG. Use the same list "
                        "on every worker."
                    )
                if text == SECOND:
                    raise UserError(
                        f"{name} already has a worker {index}. Give each worker its own index in "
                        "TF_CONFIG."
                    )
                if text == ALL_ARE_HERE:
                    self._said = said[place:]  # The chief may already have lost a worker.
                    return True
        return False

    # --- All workers ----------------------------------------------------------------------------

    def _wait(self, most: float, *more: socket.socket | Connection) -> list[tuple[int, str]]:
        """Waits for something to arrive, for `most` seconds. Returns what the workers said."""
        others = [other for other in self._others.values() if other.is_open]
        seconds = min(most, self._next_beat - time.monotonic(), self.seconds_left)
        select.select([*others, *more], [], [], max(seconds, 0))
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + self._between_beats
            for other in others:
                other.send("")
        return [(other.index, text) for other in others for text in other.read()]

    def _is_alive(self, other: Connection) -> bool:
        return other.is_open and time.monotonic() - other.heard < self._worker_timeout

    def _are_open(self) -> bool:
        return any(other.is_open for other in self._others.values())

    def _tell_all(self, text: str) -> None:
        """Sends a line from the chief to all other workers."""
        for other in self._others.values() if self._is_chief else ():
            other.send(text)

    def _give_up(self, absent: set[int]) -> NoReturn:
        names = ", ".join(map(self._cluster.name, sorted(absent)))
        raise UserError(
            f"{names} did not start within {self._timeout:g} seconds. Run the same command there, "
            "with its own index in TF_CONFIG."
        )


def _own_port(cluster: Cluster) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    _, port = cluster.host_and_port(cluster.index)
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"{cluster.name(cluster.index)} cannot use port {port}: {error.strerror}. Use "
            "another port in every worker's TF_CONFIG."
        ) from error


def _patient(callers: list[Connection]) -> list[Connection]:
    """Returns the callers that may still send their index. Closes the others."""
    unknown = [caller for caller in callers if caller.index is None and caller.is_open]
    since = time.monotonic() - ANSWER_SECONDS
    kept = [caller for caller in unknown if caller.opened > since][-MOST_CALLERS:]
    for caller in callers:
        if caller.index is None and caller not in kept:
            caller.close()
    return kept
