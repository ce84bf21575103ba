"""Which processes train together: what `TF_CONFIG` says. Read before anything slow is imported."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from errors import UserError

EXAMPLE = '{"cluster": {"worker": ["host0:4000", "host1:4000"]}, "task": {"type": "worker", "index": 0}}'  # fmt: skip  # noqa: E501


@dataclass(frozen=True)
class Cluster:
    """The workers' addresses, in the same order everywhere, and which of them this process is."""

    addresses: tuple[str, ...]
    index: int

    def name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"


def to_tf_config(addresses: Sequence[str], index: int) -> str:
    """The value of `TF_CONFIG` for one of the workers."""
    return json.dumps(
        {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}}
    )


def from_environment() -> Cluster | None:
    """The cluster that `TF_CONFIG` names; None where it names none, or this process alone."""
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return None
    try:
        config = json.loads(text)
        if not config.get("cluster"):
            return None
        jobs, task = config["cluster"], config["task"]
        addresses, index = tuple(jobs["worker"]), int(task["index"])
        whole = set(jobs) == {"worker"} == {task["type"]} and 0 <= index < len(addresses)
        if not whole or not all(isinstance(address, str) for address in addresses):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"TF_CONFIG={text} does not name this process among the workers of a cluster: it wants "
            f"to be like {EXAMPLE}, with this process's own index from 0 on."
        ) from error
    if len(set(addresses)) < len(addresses):
        raise UserError(f"TF_CONFIG names an address twice among {', '.join(addresses)}.")
    return Cluster(addresses, index) if len(addresses) > 1 else None
