"""How workers meet before TensorFlow starts, and watch one another until it has started."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cifar10_resnet.distributed import cluster, meeting
from cifar10_resnet.distributed.meeting import Meeting
from cifar10_resnet.errors import UserError

LONG = 60  # Nothing here takes so long.


def clusters(count: int) -> list[cluster.Cluster]:
    """Returns the cluster as each of `count` workers on this machine sees it."""
    addresses = tuple(f"127.0.0.1:{port}" for port in cluster.free_ports(count))
    return [cluster.Cluster(addresses, index) for index in range(count)]


def meet(
    own: cluster.Cluster,
    timeout: float = LONG,
    is_started: Callable[[], bool] = lambda: True,
    worker_timeout: float = LONG,
) -> None:
    with Meeting(own, timeout, worker_timeout) as met:
        met.gather()
        met.watch(is_started)


@contextlib.contextmanager
def meetings(*own: cluster.Cluster, **keywords) -> Iterator[list[Future]]:
    """Runs the meetings of some workers. They must have ended by the end of the block."""
    with ThreadPoolExecutor(len(own)) as pool:
        yield [pool.submit(meet, each, **keywords) for each in own]


def call(address: tuple[str, int], said: bytes = b"") -> socket.socket:
    """Returns a connection, once the address listens."""
    for _ in range(600):
        with contextlib.suppress(ConnectionRefusedError):
            connected = socket.create_connection(address, LONG)
            connected.sendall(said)
            return connected
        time.sleep(0.1)
    raise AssertionError(f"nobody listens at {address}")


def hello(own: cluster.Cluster) -> bytes:
    return f"{own.token} {own.index}\n".encode()


def lines_until_end(connected: socket.socket) -> list[str]:
    """Returns the lines that arrive before the other end closes, without empty ones."""
    with connected, connected.makefile("r") as file, contextlib.suppress(ConnectionResetError):
        return [line.strip() for line in file if line.strip()]


def wait_for(lines: Iterable[str], expected: str) -> None:
    assert any(line.strip() == expected for line in lines), expected


def start_and_leave(connected: socket.socket) -> None:
    """Does what a worker that has called does until all workers have started."""
    with connected, connected.makefile("r") as heard:
        wait_for(heard, meeting.ALL_ARE_HERE)
        connected.sendall(f"{meeting.STARTED}\n".encode())
        wait_for(heard, meeting.ALL_HAVE_STARTED)


STRANGERS = {
    "silent": b"",
    "a browser": b"GET / HTTP/1.1\r\n\r\n",
    "garbage": bytes(range(256)) * 64,
    "an index without a token": b"1\n",
    "a wrong token": b"0" * 64 + b" 1\n",
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_workers_meet_whatever_their_order_and_whatever_strangers_say(said):
    chief, *others = clusters(3)
    with contextlib.ExitStack() as held, meetings(others[0], chief) as met:
        for _ in range(20):
            held.enter_context(call(chief.host_and_port(0), said))
        with meetings(others[1]) as last:
            for each in met + last:
                each.result()


def test_strangers_use_up_no_files_and_keep_no_worker_waiting():
    chief, other = clusters(2)
    with contextlib.ExitStack() as held, meetings(chief) as met:
        strangers = [
            held.enter_context(call(chief.host_and_port(0)))
            for _ in range(meeting.MOST_CALLERS + 5)
        ]
        # The oldest are closed to make room.
        assert [stranger.recv(1) for stranger in strangers[:5]] == [b""] * 5
        with meetings(other) as second:
            for each in met + second:
                each.result()


@pytest.mark.parametrize("index", ["0", "3", "-1", "+1", "01", "1 ", "", "x"])
def test_a_caller_with_an_index_that_does_not_exist_is_refused(index):
    chief, *others = clusters(3)
    with meetings(chief) as met:
        said = f"{chief.token} {index}\n".encode()
        assert lines_until_end(call(chief.host_and_port(0), said)) == [meeting.OTHER_LIST]
        with meetings(*others) as rest:
            for each in met + rest:
                each.result()


def test_a_worker_with_another_list_of_workers_is_told_and_the_others_meet():
    chief, other = clusters(2)
    stray = cluster.Cluster((*chief.addresses, "127.0.0.1:1"), 1)
    with meetings(chief) as met:
        with pytest.raises(UserError, match=r"^worker 0 .* has another list of workers"):
            meet(stray)
        with meetings(other) as second:
            for each in met + second:
                each.result()


def test_a_second_worker_with_one_index_is_told_and_the_others_meet():
    chief, *others = clusters(3)
    with meetings(chief) as met, call(chief.host_and_port(0), hello(others[0])) as first:
        # The chief has heard the first call when it has refused another.
        refused = lines_until_end(call(chief.host_and_port(0), hello(others[0])))
        assert refused == [meeting.SECOND]
        with pytest.raises(UserError, match=r"^worker 0 .* already has a worker 1\. Give each"):
            meet(others[0])
        with meetings(others[1]) as second:
            start_and_leave(first)
            for each in met + second:
                each.result()


def test_a_worker_that_leaves_before_the_last_one_calls_can_come_back():
    chief, *others = clusters(3)
    with meetings(chief) as met:
        call(chief.host_and_port(0), hello(others[0])).close()
        with meetings(*others) as rest:
            for each in met + rest:
                each.result()


def test_a_worker_that_comes_back_at_once_is_not_its_own_second(monkeypatch):
    def late(*arguments):
        time.sleep(0.3)  # So the chief sees the end and the next call at the same time.
        return at_once(*arguments)

    at_once = select.select
    monkeypatch.setattr("select.select", late)
    chief, *others = clusters(3)
    with meetings(chief) as met:
        call(chief.host_and_port(0), hello(others[0])).close()
        with call(chief.host_and_port(0), hello(others[0])) as back, meetings(others[1]) as rest:
            start_and_leave(back)
            for each in met + rest:
                each.result()


def is_never_started() -> bool:
    return False


@pytest.mark.parametrize("said", ["", f"{meeting.STARTED}\n"], ids=["at once", "once started"])
def test_a_worker_that_leaves_after_the_answer_is_named_by_all(said):
    chief, leaving, other = clusters(3)
    with meetings(chief, other, is_started=is_never_started) as met:
        with call(chief.host_and_port(0), hello(leaving)) as lost:
            wait_for(lost.makefile("r"), meeting.ALL_ARE_HERE)
            lost.sendall(said.encode())
        for each, index in zip(met, (0, 2), strict=True):
            with pytest.raises(UserError, match=rf"^worker 1 .* was lost, so worker {index} "):
                each.result()


def test_a_worker_that_falls_silent_after_the_answer_is_named():
    chief, silent = clusters(2)
    with (
        meetings(chief, is_started=is_never_started, worker_timeout=1) as met,
        call(chief.host_and_port(0), hello(silent)),
        pytest.raises(UserError, match=r"^worker 1 .* was lost, so worker 0 "),
    ):
        met[0].result()


def test_a_worker_that_waits_long_but_is_alive_is_not_lost():
    ready = threading.Event()
    with meetings(*clusters(2), is_started=ready.is_set, worker_timeout=1) as met:
        with contextlib.suppress(TimeoutError):
            met[0].result(timeout=3)
        ready.set()
        for each in met:
            each.result()


def test_a_chief_that_leaves_after_its_answer_is_named():
    chief, other = clusters(2)
    with socket.create_server(chief.host_and_port(0)) as door, meetings(other) as met:
        caller, _ = door.accept()
        with caller:
            caller.sendall(f"{meeting.ALL_ARE_HERE}\n".encode())
        with pytest.raises(UserError, match=r"^worker 0 .* was lost, so worker 1 "):
            met[0].result()


def test_workers_that_do_not_come_are_named():
    chief, *others = clusters(3)
    with meetings(others[0], timeout=1) as late:
        with pytest.raises(UserError, match=r"worker 2 \(\S+\) did not start within 1 seconds"):
            meet(chief, 1)
        with pytest.raises(UserError, match=r"^worker 0 \(\S+\) did not start"):
            late[0].result()
    nowhere = cluster.Cluster(("no.such.host.invalid:4000", others[0].addresses[0]), 1)
    with pytest.raises(UserError, match="worker 0 "):
        meet(nowhere, 0.1)


def test_workers_that_do_not_finish_their_start_are_named():
    with (
        meetings(*clusters(2), timeout=2, is_started=is_never_started) as met,
        pytest.raises(UserError, match=r"^worker 0 \(\S+\) did not start within 2 seconds"),
    ):
        met[0].result()


def test_a_port_that_is_taken_is_reported():
    chief, other = clusters(2)
    for each in (chief, other):
        with socket.create_server(each.host_and_port(each.index)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(
                UserError, match=f"worker {each.index} .* cannot use port {port}: .*in use"
            ):
                meet(each, 1)
