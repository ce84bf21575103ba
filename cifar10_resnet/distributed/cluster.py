"""Finds the workers that `TF_CONFIG` lists, and waits for them.

Nothing slow is imported: a wrong `TF_CONFIG` is refused before TensorFlow starts.
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
ANSWER_SECONDS = 5  # to connect to the chief, or to send it an index


@dataclass(frozen=True)
class Cluster:
    """The workers' addresses, in the same order everywhere, and the index of this worker."""

    addresses: tuple[str, ...]
    index: int

    def name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    def host_and_port(self, index: int) -> tuple[str, int]:
        host, _, port = self.addresses[index].rpartition(":")
        return host.strip("[]"), int(port)


def to_tf_config(addresses: Sequence[str], index: int) -> str:
    """Returns the value of `TF_CONFIG` for one of the workers."""
    return json.dumps(
        {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}}
    )


def from_environment(strategy: str = "auto") -> Cluster | None:
    """Returns the workers that `TF_CONFIG` lists, or None if this process trains without them.

    `strategy` is the value of --distribution_strategy.
    """
    workers = _named_by_environment() if strategy in ("auto", "multi_worker") else None
    if strategy == "multi_worker" and workers is None:
        raise UserError(
            "--distribution_strategy=multi_worker needs TF_CONFIG with all workers, such as "
            f"{EXAMPLE}. To try it on one machine, run `{command('launch')}`."
        )
    return workers


def _named_by_environment() -> Cluster | None:
    """Returns the cluster, or None if `TF_CONFIG` lists fewer than two workers."""
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        os.environ.pop("TF_CONFIG", None)  # TensorFlow would read it as broken JSON.
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
        why = "it lists an address twice. Use one for each worker."
        raise UserError(f"TF_CONFIG={text} is invalid: {why}")
    return Cluster(addresses, index) if len(addresses) > 1 else None


def _is_address(text: str) -> bool:
    return bool(re.fullmatch(r"\S+:\d{1,5}", text)) and 0 < int(text.rpartition(":")[2]) < 2**16


def meet(cluster: Cluster, timeout: float) -> None:
    """Waits until all workers have started, for `timeout` seconds at most.

    TensorFlow waits too, but it ignores Ctrl-C and does not name the missing workers.
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
            f"{cluster.name(cluster.index)} cannot use port {port}: {error.strerror}. Use "
            "another port in every worker's TF_CONFIG."
        ) from error


def _receive(door: socket.socket, count: int, end: float) -> list[int]:
    """Answers all other workers once each has called. Returns the indices of missing workers."""
    callers: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as opened:
        while absent := [index for index in range(1, count) if index not in callers]:
            door.settimeout(max(end - time.monotonic(), 0.001))
            try:
                caller = opened.enter_context(door.accept()[0])
            except TimeoutError:
                return absent
            caller.settimeout(ANSWER_SECONDS)
            with contextlib.suppress(OSError, ValueError):  # an unknown or lost client
                callers[int(caller.recv(16))] = caller
        for caller in callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(ALL_ARE_HERE)
    return []


def _call_chief(cluster: Cluster, end: float) -> bool:
    """Calls the chief until it answers. Returns whether all workers have started."""
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
    """Returns `count` ports of this machine that no program uses at the moment."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
