"""Finds the workers that `TF_CONFIG` lists.

Nothing slow is imported: a wrong `TF_CONFIG` is refused before TensorFlow starts.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from cifar10_resnet.errors import UserError
from cifar10_resnet.terminal import command

EXAMPLE = '{"cluster": {"worker": ["host0:4000", "host1:4000"]}, "task": {"type": "worker", "index": 0}}'  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class Cluster:
    """The workers' addresses, in the same order everywhere, and the index of this worker."""

    addresses: tuple[str, ...]
    index: int

    def name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"

    @property
    def token(self) -> str:
        """Returns what only workers with the same list of workers know."""
        return hashlib.sha256(json.dumps(self.addresses).encode()).hexdigest()

    def loss_of(self, index: int) -> UserError:
        """Returns the error of this worker if another worker is lost."""
        return UserError(
            f"{self.name(index)} was lost, so {self.name(self.index)} stopped. Run the same "
            "command on every worker to resume."
        )

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


def free_ports(count: int) -> list[int]:
    """Returns `count` ports of this machine that no program uses at the moment."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
