"""Several replicas and workers do what one device does, and survive one another."""

import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import replica_steps
import tensorflow as tf
from conftest import (
    TRAIN_FILES,
    random_images,
    skip_without_channels_first,
    values_in,
    write_random_cifar10,
    write_records,
)
from programs import (
    PROJECT,
    Workers,
    assert_lost,
    environment,
    run,
    start,
)

from cifar10_resnet import checkpoints
from cifar10_resnet.config import RunConfig
from cifar10_resnet.distributed import cluster, meeting
from cifar10_resnet.distributed import replicas as distributed
from cifar10_resnet.distributed.meeting import Meeting
from cifar10_resnet.errors import UserError
from cifar10_resnet.training.trainer import Trainer


@pytest.mark.parametrize(
    ("count", "networks"),
    [(2, ["momentum", "muon"]), (2, ["channels_first"]), (4, ["momentum"])],
)
def test_replicas_take_the_steps_of_one_device(count, networks, tmp_path):
    if "channels_first" in networks:
        skip_without_channels_first()
    one_device = replica_steps.take_steps(distributed.Replicas(), networks)
    file = tmp_path / "found.npz"
    program = ("tests/distributed/replica_steps.py", count, "CPU", file, *networks)
    run(*program, env=environment(TF_CPP_MIN_LOG_LEVEL="2"))
    found = np.load(file)
    assert set(found) == set(one_device)
    for name, value in one_device.items():
        if not name.startswith(("apart/", "shares")):
            np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-4, err_msg=name)

    # each replica has its own part of the batch, and together they have all of it
    np.testing.assert_array_equal(found["shares"].ravel(), one_device["shares"].ravel())
    assert found["shares"].shape == (count, replica_steps.BATCH_SIZE // count)
    check_steps_apart(found, count)


def check_steps_apart(found: dict[str, np.ndarray], count: int) -> None:
    """Returns a step without --sync_batch_norm: the means over the parts of the batch."""
    images, labels = (values[0] for values in replica_steps.batches())
    trainer = replica_steps.make_trainer("momentum", distributed.Replicas(), False)
    before = [v.numpy() for v in trainer.model.variables]
    gradients, after = [], []
    for part in np.split(np.arange(replica_steps.BATCH_SIZE), count):
        for variable, value in zip(trainer.model.variables, before, strict=True):
            variable.assign(value)
        with tf.GradientTape() as tape:
            logits = trainer.model(tf.constant(images[part]), training=True)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels[part], logits)
            )
        gradients.append(tape.gradient(loss, trainer.model.trainable_variables))
        after.append([v.numpy() for v in trainer.model.variables])
    moved = {
        v.name: np.mean(values, 0)
        for v, *values in zip(trainer.model.variables, *after, strict=True)
    }
    decayed = {v.name for v in trainer.model.kernels}
    for variable, *parts in zip(trainer.model.trainable_variables, *gradients, strict=True):
        start = moved[variable.name]
        gradient = np.mean(parts, 0) + 2e-4 * start * (variable.name in decayed)
        moved[variable.name] = start - 0.005 * gradient
    for name, value in moved.items():
        np.testing.assert_allclose(
            found[f"apart/{name}"], value, rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_a_batch_that_does_not_divide_is_refused():
    replicas = distributed.Replicas()
    replicas.count = 3
    with pytest.raises(
        UserError, match=r"batch_size=128 is invalid: .* multiple of 3, .* Use 126 or 129"
    ):
        Trainer(RunConfig(), replicas=replicas)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_random_cifar10(tmp_path_factory.mktemp("data"))


# steps of some milliseconds, without and with which a run is as long as the other
FLAGS = ("--num_layers=8", "--batch_size=12", "--num_iterations=60", "--save_per_iterations=20")
FLAGS += ("--log_per_iterations=1", "--init_lr=0.001", "--sync_batch_norm", "--max_ckpts=-1")
FLAGS += ("--average_weights=0.5",)


def command(data: Path, ckpt_path: Path, *more: str) -> list[str]:
    return ["run_trainer.py", f"--path={data}", f"--ckpt_path={ckpt_path}", *FLAGS, *more]


def assert_close_checkpoint(one: Path, other: Path) -> None:
    ours, theirs = values_in(one), values_in(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, np.ndarray):
            # Sums in another order differ in their last digits, which 60 steps make a percent of
            # the momentum; one other batch would make it all.
            distance = np.linalg.norm(value - theirs[name])
            assert distance <= 0.05 * np.linalg.norm(theirs[name]) + 1e-3, name
        elif name != checkpoints.DESCRIPTION_KEY:
            assert value == theirs[name], name
    # The description also contains the number of replicas, which the two may not share.
    assert checkpoints.read(str(one)).run == checkpoints.read(str(other)).run


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """The whole run on one device."""
    folder = tmp_path_factory.mktemp("alone")
    run(*command(data, folder))
    return folder


def test_workers_lost_one_after_the_other_cost_no_more_than_the_way_from_the_last_checkpoint(
    data, alone, tmp_path
):
    workers = Workers(3, command(data, tmp_path))
    workers.wait_for("step 25/60")
    workers.processes[1].kill()
    ends = workers.ends()
    assert_lost(ends[0], 1)
    assert_lost(ends[2], 1)

    workers = Workers(2, command(data, tmp_path))
    workers.wait_for("step 43/60")
    workers.processes[0].kill()
    assert_lost(workers.ends()[1], 0)

    launched = run("launch", "--workers=2", "--", *command(data, tmp_path), cwd=PROJECT)
    assert f"[0] Resuming from {tmp_path}/model.ckpt-40 at step 40." in launched.stdout
    assert "over 2 replicas in 2 workers" in launched.stdout
    assert_close_checkpoint(tmp_path / "model.ckpt-20", alone / "model.ckpt-20")
    assert_close_checkpoint(tmp_path / "model.ckpt-60", alone / "model.ckpt-60")
    scored = run("run_evaluator.py", f"--path={data}", f"--ckpt_path={tmp_path}")
    assert "step 60" in scored.stdout


def test_sigterm_to_any_worker_saves_once_and_ends_all_and_one_device_resumes(
    data, alone, tmp_path
):
    workers = Workers(2, command(data, tmp_path))
    workers.wait_for("step 25/60")
    workers.processes[1].send_signal(signal.SIGTERM)
    assert [status for status, _ in workers.ends()] == [128 + signal.SIGTERM] * 2
    step = max(step for step, _ in checkpoints.list_checkpoints(str(tmp_path)))
    assert 25 < step < 60
    went_on = run(*command(data, tmp_path))
    assert f"model.ckpt-{step} at step {step}" in went_on.stdout
    assert_close_checkpoint(tmp_path / "model.ckpt-60", alone / "model.ckpt-60")


def test_a_worker_that_falls_silent_counts_as_lost_after_its_time(data, tmp_path):
    workers = Workers(2, command(data, tmp_path, "--worker_timeout=4"))
    workers.wait_for("step 5/60")
    chief, silent = workers.processes
    silent.send_signal(signal.SIGSTOP)
    try:
        _, error = chief.communicate(timeout=120)
    finally:
        silent.kill()
    assert_lost((chief.returncode, error), 1)


def test_a_worker_with_other_flags_or_data_than_the_chief_is_refused(data, tmp_path):
    other = tmp_path / "other" / data.name
    other.mkdir(parents=True)
    for file in data.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    write_records(other / TRAIN_FILES[2], *random_images(30, seed=9))
    for own, reason in (
        (
            ((), ("--init_lr=0.02",)),
            "worker 1 .* has --init_lr=0.02, worker 0 .* has --init_lr=0.001",
        ),
        (((), (f"--path={other}",)), "worker 1 .* has SHA-256 of its training images="),
    ):
        workers = Workers(2, command(data, tmp_path / "run"), *own)
        for status, error in workers.ends():
            assert status == 1
            assert re.fullmatch(f"run_trainer.py: error: {reason}.*\n", error), error
    assert not list((tmp_path / "run").glob("*.index"))


@contextlib.contextmanager
def worker_that_starts(
    data: Path, folder: Path, index: int, *more: str
) -> Iterator[tuple[cluster.Cluster, subprocess.Popen]]:
    """Yields the other worker's view of two workers, and the process of the one with this index."""
    addresses = tuple(f"127.0.0.1:{port}" for port in cluster.free_ports(2))
    process = start(
        *command(data, folder, *more),
        env=environment(TF_CONFIG=cluster.to_tf_config(addresses, index)),
    )
    try:
        assert process.stdout.readline().startswith(f"Joining the others as worker {index}")
        yield cluster.Cluster(addresses, 1 - index), process
    finally:
        process.kill()
        process.communicate()


def wait_until_tensorflow_waits(own: cluster.Cluster) -> None:
    """Waits until the chief's TensorFlow listens. It then waits for the other workers."""
    for _ in range(600):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(own.host_and_port(0), 60).close()
        time.sleep(0.1)
    raise AssertionError("TensorFlow never listened")


def test_a_worker_that_waits_for_the_others_can_be_stopped(data, tmp_path):
    with worker_that_starts(data, tmp_path, 0) as (_, waiting):
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(timeout=120) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_in_which_tensorflow_waits_for_the_others_can_be_stopped(number, data, tmp_path):
    with (
        worker_that_starts(data, tmp_path, 0) as (other, waiting),
        Meeting(other, 120, 600) as met,
    ):
        met.gather()
        wait_until_tensorflow_waits(other)
        waiting.send_signal(number)
        # Its --worker_timeout is 60 seconds, and TensorFlow's own limit is 600.
        _, error = waiting.communicate(timeout=30)
        assert waiting.returncode == 128 + number
        assert re.fullmatch("run_trainer.py: interrupted before any work was lost.*\n", error), (
            error
        )


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_ends_while_tensorflow_waits_for_it_is_named(index, data, tmp_path):
    with worker_that_starts(data, tmp_path, index) as (other, waiting):
        with Meeting(other, 120, 600) as met:
            met.gather() if index == 0 else answer_once(other)
        assert_lost((waiting.wait(timeout=30), waiting.stderr.read()), 1 - index)


def answer_once(chief: cluster.Cluster) -> None:
    """Calls for the other worker as a chief that ends once it has answered."""
    with socket.create_server(chief.host_and_port(0)) as door:
        caller, _ = door.accept()
        with caller:
            caller.sendall(f"{meeting.ALL_ARE_HERE}\n".encode())


def test_a_worker_that_falls_silent_while_tensorflow_waits_for_it_is_named(data, tmp_path):
    with (
        worker_that_starts(data, tmp_path, 0, "--worker_timeout=2") as (other, waiting),
        Meeting(other, 120, 600) as met,
    ):
        met.gather()
        assert_lost((waiting.wait(timeout=30), waiting.stderr.read()), 1)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("aborted\nAdditional GRPC error information from remote target "
         "/job:worker/replica:0/task:1 while calling x:\n y /job:worker/replica:0/task:2", 1),
        ("Error reported from /job:worker/task:2: The following tasks are unhealthy", 2),
        ("Deadline Exceeded\n\nRPC: /tensorflow.CoordinationService/Heartbeat", 0),
        ("out of memory on /job:worker/replica:0/task:1/device:GPU:0", None),
    ],
)  # fmt: skip
def test_the_lost_worker_is_the_one_where_tensorflows_message_begins(message, lost):
    assert distributed._lost_worker(message) == lost
