"""Which processes train together, as `TF_CONFIG` says, and how they find one another.

Takes Python alone, so that a wrong `TF_CONFIG` is told before anything slow is imported.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cifar10_resnet.errors import UserError
from cifar10_resnet.terminal import command

EXAMPLE = '{"cluster": {"worker": ["host0:4000", "host1:4000"]}, "task": {"type": "worker", "index": 0}}'  # fmt: skip  # noqa: E501

ALL_ARE_HERE = b"all are here"
ANSWER_SECONDS = 5  # for a caller to say who it is


@dataclass(frozen=True)
class Cluster:
    """The workers' addresses, in the same order everywhere, and which of them this process is."""

    addresses: tuple[str, ...]
    index: int

    def name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    def host_and_port(self, index: int) -> tuple[str, int]:
        host, _, port = self.addresses[index].rpartition(":")
        return host.strip("[]"), int(port)


def to_tf_config(addresses: Sequence[str], index: int) -> str:
    """The value of `TF_CONFIG` for one of the workers."""
    return json.dumps(
        {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}}
    )


def from_environment(strategy: str = "auto") -> Cluster | None:
    """Returns the workers that `TF_CONFIG` names, if they are to train together.

    `strategy` is the value of --distribution_strategy.
    """
    workers = _named_by_environment() if strategy in ("auto", "multi_worker") else None
    if strategy == "multi_worker" and workers is None:
        raise UserError(
            "--distribution_strategy=multi_worker needs TF_CONFIG to name the workers, as in "
            f"{EXAMPLE}: `{command('launch')}` sets it to try it on one machine."
        )
    return workers


def _named_by_environment() -> Cluster | None:
    """Returns the cluster, or None if `TF_CONFIG` names none or this process alone."""
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        os.environ.pop("TF_CONFIG", None)  # which TensorFlow would take for broken JSON
        return None
    try:
        config = json.loads(text)
        if not config.get("cluster"):
            return None
        jobs, task = config["cluster"], config["task"]
        addresses, index = tuple(jobs["worker"]), int(task["index"])
        whole = set(jobs) == {"worker"} == {task["type"]} and 0 <= index < len(addresses)
        if not whole or not all(map(_is_address, addresses)):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"TF_CONFIG={text} is invalid: it does not list this worker. Set it like this, with "
            f"this worker's index: {EXAMPLE}"
        ) from error
    if len(set(addresses)) < len(addresses):
        raise UserError(f"TF_CONFIG names an address twice among {', '.join(addresses)}.")
    return Cluster(addresses, index) if len(addresses) > 1 else None


def _is_address(text: str) -> bool:
    return bool(re.fullmatch(r"\S+:\d{1,5}", text)) and 0 < int(text.rpartition(":")[2]) < 2**16


def meet(cluster: Cluster, timeout: float) -> None:
    """Waits until all workers are there, for so many seconds at most.

    TensorFlow by itself waits too, but deaf to Ctrl-C, and does not say for whom.
    """
    end = time.monotonic() + timeout
    with _own_port(cluster) as door:
        if cluster.index == 0:
            absent = _receive(door, len(cluster.addresses), end)
    if cluster.index != 0:
        absent = [] if _call_chief(cluster, end) else [0]
    if absent:
        raise UserError(
            f"{', '.join(map(cluster.name, absent))} did not start within {timeout:g} seconds. Run "
            "the same command there, with its own index in TF_CONFIG."
        )


def _own_port(cluster: Cluster) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    _, port = cluster.host_and_port(cluster.index)
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"{cluster.name(cluster.index)} cannot listen on port {port}: {error.strerror}. Use "
            "another port in every worker's TF_CONFIG."
        ) from error


def _receive(door: socket.socket, count: int, end: float) -> list[int]:
    """Waits for all others to call, and lets them go at once; returns those who have not."""
    callers: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        while absent := [index for index in range(1, count) if index not in callers]:
            door.settimeout(max(end - time.monotonic(), 0.001))
            try:
                caller = opened.enter_context(door.accept()[0])
            except TimeoutError:
                return absent
            caller.settimeout(ANSWER_SECONDS)
            with contextlib.suppress(OSError, ValueError):  # a stranger, or one who left
                callers[int(caller.recv(16))] = caller
        for caller in callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(ALL_ARE_HERE)
    return []


def _call_chief(cluster: Cluster, end: float) -> bool:
    """Calls the chief until it says that all are there."""
    while time.monotonic() < end:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(cluster.host_and_port(0), ANSWER_SECONDS) as chief,
        ):
            chief.sendall(str(cluster.index).encode())
            chief.settimeout(max(end - time.monotonic(), 0.001))
            if chief.recv(len(ALL_ARE_HERE)) == ALL_ARE_HERE:
                return True
        time.sleep(0.2)
    return False


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens to at the moment."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
