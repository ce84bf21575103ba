"""Several replicas and workers do what one device does, and survive one another."""

import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import replica_steps
import tensorflow as tf
from conftest import TRAIN_FILES, random_images, values_in, write_records
from programs import (
    PROJECT,
    Workers,
    assert_lost,
    environment,
    error_of,
    run,
    start,
    without_tensorflow,
)

import checkpoints
import cluster
import distribution
import launch_local
import training
from cifar10_resnet.errors import UserError


@pytest.fixture(scope="module")
def one_device() -> dict[str, np.ndarray]:
    return replica_steps.take_steps(distribution.Replicas())


@pytest.mark.parametrize(("count", "networks"), [(2, [*replica_steps.NETWORKS]), (4, ["momentum"])])
def test_replicas_take_the_steps_of_one_device(count, networks, one_device, tmp_path):
    file = tmp_path / "found.npz"
    program = ("tests/replica_steps.py", count, file, *networks)
    run(*program, env=environment(TF_CPP_MIN_LOG_LEVEL="2"))
    found = np.load(file)
    kinds = {*networks, "apart", "shares"}
    expected = {name: v for name, v in one_device.items() if name.split("/")[0] in kinds}
    assert set(found) == set(expected)
    for name, value in expected.items():
        if not name.startswith(("apart/", "shares")):
            np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-4, err_msg=name)

    # each replica has its own part of the batch, and together they have all of it
    np.testing.assert_array_equal(found["shares"].ravel(), one_device["shares"].ravel())
    assert found["shares"].shape == (count, replica_steps.BATCH_SIZE // count)
    check_steps_apart(found, count)


def check_steps_apart(found: dict[str, np.ndarray], count: int) -> None:
    """A step without --sync_batch_norm: means of what each part of the batch gives by itself."""
    images, labels = (values[0] for values in replica_steps.batches())
    trainer = replica_steps.make_trainer("momentum", distribution.Replicas(), False)
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
    replicas = distribution.Replicas()
    replicas.count = 3
    with pytest.raises(UserError, match="batch_size=128 does not divide into 3 replicas"):
        training.Trainer(training.RunConfig(), replicas=replicas)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate((*TRAIN_FILES, "test_batch.bin")):
        write_records(folder / name, *random_images(30, seed))
    return folder


# steps of some milliseconds, without and with which a run is as long as the other
FLAGS = ("--num_layers=8", "--batch_size=12", "--num_iterations=60", "--save_per_iterations=20")
FLAGS += ("--log_per_iterations=1", "--init_lr=0.001", "--sync_batch_norm", "--max_ckpts=-1")


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
        else:
            assert value == theirs[name], name


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

    launched = run("launch_local.py", "--workers=2", "--", *command(data, tmp_path), cwd=PROJECT)
    assert f"[0] Going on from {tmp_path}/model.ckpt-40, step 40." in launched.stdout
    assert "over 2 replicas in 2 workers" in launched.stdout
    assert_close_checkpoint(tmp_path / "model.ckpt-20", alone / "model.ckpt-20")
    assert_close_checkpoint(tmp_path / "model.ckpt-60", alone / "model.ckpt-60")
    scored = run("run_evaluator.py", f"--path={data}", f"--ckpt_path={tmp_path}")
    assert "step 60" in scored.stdout


def test_sigterm_to_any_worker_saves_once_and_ends_all_and_one_device_goes_on(
    data, alone, tmp_path
):
    workers = Workers(2, command(data, tmp_path))
    workers.wait_for("step 25/60")
    workers.processes[1].send_signal(signal.SIGTERM)
    assert [status for status, _ in workers.ends()] == [128 + signal.SIGTERM] * 2
    step = max(step for step, _ in checkpoints.list_checkpoints(str(tmp_path)))
    assert 25 < step < 60
    went_on = run(*command(data, tmp_path))
    assert f"model.ckpt-{step}, step {step}" in went_on.stdout
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
            "worker 1 .* has init_lr=0.02, but worker 0 .* has init_lr=0.001",
        ),
        (((), (f"--path={other}",)), "worker 1 .* has SHA-256 of its training images="),
    ):
        workers = Workers(2, command(data, tmp_path / "run"), *own)
        for status, error in workers.ends():
            assert status == 1
            assert re.fullmatch(f"run_trainer.py: error: {reason}.*\n", error), error
    assert not list((tmp_path / "run").glob("*.index"))


# tells that it is there by holding a FIFO open
IDLE_WORKER = (
    "import sys, time; f = open(sys.argv[1], 'w'); print(file=f, flush=True); time.sleep(99)"
)


def test_workers_end_with_a_launcher_that_is_killed(tmp_path):
    os.mkfifo(tmp_path / "there")
    (tmp_path / "worker.py").write_text(IDLE_WORKER)
    launcher = start("launch_local.py", "--", tmp_path / "worker.py", tmp_path / "there")
    with open(tmp_path / "there") as workers:
        assert [workers.readline(), workers.readline()] == ["\n", "\n"]
        launcher.kill()
        assert workers.read() == "", "which is there once all have closed it"
    launcher.communicate()


def test_the_launcher_ends_the_others_where_one_fails_and_with_its_status(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(
        "import json, os, sys, time\n"
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        "sys.exit(3) if index == 1 else time.sleep(99)\n"
    )
    monkeypatch.setattr(launch_local, "PATIENCE", 0.1)
    assert launch_local.launch([str(tmp_path / "worker.py")], 3) == 3


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1", "b:1"]}}',
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"ps": ["a:1", "b:1"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": {"worker": [1, 2]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a", "b"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:0", "b:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:65536", "b:1"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_tf_config_that_names_no_place_for_this_process_is_refused(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError, match="does not name this process"):
        cluster.from_environment()


def test_a_tf_config_with_an_address_twice_is_refused(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", cluster.to_tf_config(["a:1", "b:1", "a:1"], 1))
    with pytest.raises(UserError, match="names an address twice among a:1, b:1, a:1"):
        cluster.from_environment()


def test_a_tf_config_is_read_as_it_was_written(monkeypatch):
    for text in ("", "{}", '{"task": {"type": "worker", "index": 0}}'):
        monkeypatch.setenv("TF_CONFIG", text)
        assert cluster.from_environment() is None
    monkeypatch.setenv("TF_CONFIG", cluster.to_tf_config(["a:1", "b:1"], 1))
    assert cluster.from_environment() == cluster.Cluster(("a:1", "b:1"), 1)
    assert cluster.from_environment().name(1) == "worker 1 (b:1)"


def clusters(count: int) -> list[cluster.Cluster]:
    """As each of so many workers on this machine sees its cluster."""
    addresses = tuple(f"127.0.0.1:{port}" for port in launch_local.free_ports(count))
    return [cluster.Cluster(addresses, index) for index in range(count)]


def test_workers_meet_whatever_their_order_and_whoever_else_calls():
    chief, *others = clusters(3)
    with ThreadPoolExecutor(3) as pool:
        meeting = [pool.submit(cluster.meet, early, 60) for early in (others[0], chief)]
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"7", b""):
            call_once_it_listens(chief.host_and_port(0)).sendall(said)
        meeting.append(pool.submit(cluster.meet, others[1], 60))
        for each in meeting:
            each.result()


def call_once_it_listens(address: tuple[str, int]) -> socket.socket:
    for _ in range(600):
        try:
            return socket.create_connection(address, 60)
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise AssertionError(f"nobody listens at {address}")


def test_workers_that_do_not_come_are_named():
    chief, *others = clusters(3)
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(cluster.meet, others[0], 1)
        with pytest.raises(UserError, match=r"^worker 2 \(\S+\) did not answer within 1 seconds"):
            cluster.meet(chief, 1)
        with pytest.raises(UserError, match=r"^worker 0 \(\S+\) did not answer"):
            late.result()
    nowhere = cluster.Cluster(("no.such.host.invalid:4000", others[0].addresses[0]), 1)
    with pytest.raises(UserError, match="worker 0 "):
        cluster.meet(nowhere, 0.1)


def test_a_port_that_is_taken_is_told():
    chief, other = clusters(2)
    for each in (chief, other):
        with socket.create_server(each.host_and_port(each.index)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(UserError, match=f"port {port} as worker {each.index} .*in use"):
                cluster.meet(each, 1)


def test_a_worker_that_waits_for_the_others_can_be_stopped(data, tmp_path):
    chief = clusters(2)[0]
    waiting = start(
        *command(data, tmp_path),
        env=environment(TF_CONFIG=cluster.to_tf_config(chief.addresses, 0)),
    )
    assert waiting.stdout.readline().startswith("Joining the others as worker 0")
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=120) == -signal.SIGTERM
    waiting.communicate()


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
    assert distribution._lost_worker(message) == lost


def test_a_cluster_that_is_asked_for_but_not_named_is_told_before_tensorflow_starts(tmp_path):
    without = without_tensorflow(tmp_path) | {"TF_CONFIG": ""}
    wrong = ("run_trainer.py", "--distribution_strategy=multi_worker", "--use_synthetic_data")
    assert "needs TF_CONFIG" in error_of(*wrong, env=without)
