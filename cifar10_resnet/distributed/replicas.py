"""Spreads a run over several devices and worker processes.

A replica is one device with its own copy of the network. It computes its share of each batch, and
the replicas add up their results (tf.distribute). A worker is one process with its replicas. One
replica in one process is the usual case, and costs nothing.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from cifar10_resnet.distributed import joining, sync_batch_norm
from cifar10_resnet.distributed.cluster import Cluster
from cifar10_resnet.errors import UserError
from resnet_model import Normalise, batch_norm_relu


class Replicas:
    """The devices that a run is spread over, in this process and in others."""

    def __init__(
        self, strategy: tf.distribute.Strategy | None = None, cluster: Cluster | None = None
    ):
        self.strategy = strategy or tf.distribute.get_strategy()
        self.count = self.strategy.num_replicas_in_sync
        self.num_workers = len(cluster.addresses) if cluster else 1
        self.worker = cluster.index if cluster else 0
        self._cluster = cluster
        self._here = self.count // self.num_workers
        self._gather = tf.function(
            self._gather_in_graph, input_signature=[tf.TensorSpec([None])], autograph=False
        )

    @property
    def is_chief(self) -> bool:
        """Returns whether this worker writes checkpoints and summaries, and prints for all."""
        return self.worker == 0

    def describe(self) -> str:
        """Returns the number of replicas for the opening line, or "" if there is only one."""
        if self.count == 1:
            return ""
        workers = f" in {self.num_workers} workers" if self.num_workers > 1 else ""
        return f" over {self.count} replicas{workers}"

    def refuse_uneven(self, batch_size: int) -> None:
        """Refuses a batch size that the replicas cannot share equally."""
        if batch_size % self.count:
            below = batch_size - batch_size % self.count
            uses = " or ".join(str(size) for size in (below, below + self.count) if size)
            raise UserError(
                f"is invalid: it must be a multiple of {self.count}, the number of replicas. Use "
                f"{uses}.",
                "batch_size",
                batch_size,
            )

    def own_share(self, values: tf.Tensor) -> tf.Tensor:
        """Returns this replica's share of its worker's part of a batch. Call it in a replica."""
        if self._here == 1:
            return values
        with tf.device("cpu"):
            parts = tf.reshape(values, [self._here, -1, *values.shape[1:]])
            return parts[_replica_id() % self._here]

    def sum(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns each value's sum over all replicas, sent in one piece. Call it in a replica."""
        packed = tf.concat([tf.reshape(value, [-1]) for value in values], 0)
        total = tf.distribute.get_replica_context().all_reduce("SUM", packed)
        parts = tf.split(total, [value.shape.num_elements() for value in values])
        return [tf.reshape(part, v.shape) for part, v in zip(parts, values, strict=True)]

    def normalise(self, over_all: bool) -> Normalise:
        """Returns the batch norm function: over all replicas, or over each replica's share."""
        return sync_batch_norm.over(self) if over_all and self.count > 1 else batch_norm_relu

    def copy_from_chief(self, variables: Sequence[tf.Variable]) -> None:
        """Copies the chief's values of float32 variables to every worker."""
        if self.num_workers == 1:
            return

        def copy_in_replica() -> None:
            is_chiefs = tf.cast(tf.equal(_replica_id(), 0), tf.float32)
            values = [variable * is_chiefs for variable in variables]
            for variable, value in zip(variables, self.sum(values), strict=True):
                tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)

        tf.function(lambda: self.strategy.run(copy_in_replica), autograph=False)()

    def largest(self, number: int) -> int:
        """Returns the largest number that a worker passes. Each worker waits for the others."""
        if self.num_workers == 1:
            return number
        return int(self._gather(tf.constant([number], tf.float32)).numpy().max())

    def exchange(self, text: str) -> list[str]:
        """Returns the texts, of one line each, that the workers pass, the chief's first."""
        if self.num_workers == 1:
            return [text]
        codes = np.frombuffer(f"{text}\n".encode(), np.uint8)
        gathered = self._gather(tf.constant(codes, tf.float32)).numpy()
        return gathered.astype(np.uint8).tobytes().decode().splitlines()[:: self._here]

    def _gather_in_graph(self, vector: tf.Tensor) -> tf.Tensor:
        def gather() -> tf.Tensor:
            # TensorFlow gathers on the device of this copy, which is the replica's own.
            own = tf.identity(vector)
            return tf.distribute.get_replica_context().all_gather(own, axis=0)

        return self.strategy.experimental_local_results(self.strategy.run(gather))[0]

    def from_chief(self, make: Callable[[], str]) -> str:
        """Returns the line of text that the chief makes. If the chief refuses, all workers do."""
        said: dict[str, str] = {}
        if self.is_chief:
            try:
                said = {"text": make()}
            except UserError as error:
                if self.num_workers == 1:
                    raise
                said = {"error": [error.why, error.argument, str(error.value)]}
        said = json.loads(self.exchange(json.dumps(said))[0])
        if "error" in said:
            raise UserError(*said["error"])
        return said["text"]

    def refuse_differences(self, values: dict[str, object]) -> None:
        """Refuses, on all workers, values that differ from the chief's."""
        ours, *others = (json.loads(text) for text in self.exchange(json.dumps(values)))
        for index, theirs in enumerate(others, 1):
            names = [name for name in ours if theirs.get(name) != ours[name]]
            if names:
                listed = [
                    ", ".join(f"{name}={values.get(name)}" for name in names)
                    for values in (theirs, ours)
                ]
                raise UserError(
                    f"{self._cluster.name(index)} has {listed[0]}, {self._cluster.name(0)} has "
                    f"{listed[1]}. Run the same command, with the same data, on every worker."
                )

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Keeps each worker in the block until all reach its end. Names a worker that is lost."""
        with _naming_the_lost(self._cluster):
            yield
            self.largest(0)


def choose(strategy: str, cluster: Cluster | None, worker_timeout: float = 60) -> Replicas:
    """Returns the replicas for --distribution_strategy, on the visible devices."""
    if cluster:
        with _naming_the_lost(cluster):
            return Replicas(joining.join(cluster, worker_timeout), cluster)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if strategy == "off" or len(devices) == 1:
        return Replicas()
    return Replicas(tf.distribute.MirroredStrategy([device.name for device in devices]))


@contextlib.contextmanager
def _naming_the_lost(cluster: Cluster | None) -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        lost = _lost_worker(str(error)) if cluster else None
        if lost is None:
            raise
        raise cluster.loss_of(lost) from error


def _lost_worker(message: str) -> int | None:
    """Returns the worker that TensorFlow's message is about, or None."""
    # The error began at the first target. Reports of other workers follow.
    for pattern in (r"remote target", r"Error reported from"):
        if named := re.search(rf"{pattern} /job:worker/(?:replica:0/)?task:(\d+)", message):
            return int(named[1])
    # The chief runs the service that checks the workers' heartbeats.
    return 0 if "CoordinationService" in message else None


def _replica_id() -> tf.Tensor | int:
    return tf.distribute.get_replica_context().replica_id_in_sync_group
