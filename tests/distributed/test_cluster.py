"""TF_CONFIG, and how workers meet before TensorFlow starts."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from programs import error_of, without_tensorflow

from cifar10_resnet.distributed import cluster
from cifar10_resnet.errors import UserError


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
    with pytest.raises(UserError, match="does not list this worker"):
        cluster.from_environment()


def test_a_tf_config_with_an_address_twice_is_refused(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", cluster.to_tf_config(["a:1", "b:1", "a:1"], 1))
    with pytest.raises(UserError, match=r"a:1.* is invalid: it lists an address twice"):
        cluster.from_environment()


def test_a_tf_config_is_read_as_it_was_written(monkeypatch):
    for text in ("", "{}", '{"task": {"type": "worker", "index": 0}}'):
        monkeypatch.setenv("TF_CONFIG", text)
        assert cluster.from_environment() is None
    monkeypatch.setenv("TF_CONFIG", cluster.to_tf_config(["a:1", "b:1"], 1))
    assert cluster.from_environment() == cluster.Cluster(("a:1", "b:1"), 1)
    assert cluster.from_environment().name(1) == "worker 1 (b:1)"


def clusters(count: int) -> list[cluster.Cluster]:
    """Returns the cluster as each of `count` workers on this machine sees it."""
    addresses = tuple(f"127.0.0.1:{port}" for port in cluster.free_ports(count))
    return [cluster.Cluster(addresses, index) for index in range(count)]


def test_workers_meet_whatever_their_order_and_with_any_other_callers():
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
        with pytest.raises(UserError, match=r"^worker 2 \(\S+\) did not start within 1 seconds"):
            cluster.meet(chief, 1)
        with pytest.raises(UserError, match=r"^worker 0 \(\S+\) did not start"):
            late.result()
    nowhere = cluster.Cluster(("no.such.host.invalid:4000", others[0].addresses[0]), 1)
    with pytest.raises(UserError, match="worker 0 "):
        cluster.meet(nowhere, 0.1)


def test_a_port_that_is_taken_is_reported():
    chief, other = clusters(2)
    for each in (chief, other):
        with socket.create_server(each.host_and_port(each.index)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(
                UserError, match=f"worker {each.index} .* cannot use port {port}: .*in use"
            ):
                cluster.meet(each, 1)


def test_a_cluster_that_is_asked_for_but_not_named_is_an_error_before_tensorflow_starts(tmp_path):
    without = without_tensorflow(tmp_path) | {"TF_CONFIG": ""}
    wrong = ("run_trainer.py", "--distribution_strategy=multi_worker", "--use_synthetic_data")
    assert "needs TF_CONFIG" in error_of(*wrong, env=without)
