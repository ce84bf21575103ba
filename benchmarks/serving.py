"""Measures the server under load, next to another checkout's server.

python benchmarks/serving.py --saved_model=savedmodels/resnet20 --other=../another-checkout
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import re
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
PREDICT = "/v1/models/resnet:predict"
CLIENTS = (1, 8, 64)
ROUNDS = 3
REQUESTS = 320  # in a round, for any number of clients
HOSTILE_CLIENTS, HOSTILE_SECONDS = 4, 30
MEMORY_REQUESTS = 10_000
IDLE, ASKED = 2000, 100
TIMEOUT = 300


class Server:
    """A checkout's server in a separate process."""

    def __init__(self, checkout: Path, saved_model: str):
        command = [sys.executable, str(checkout / "cifar10_resnet"), "serve", "--port=0"]
        self.process = subprocess.Popen(
            [*command, f"--saved_model={saved_model}"], stdout=subprocess.PIPE, text=True
        )
        self.port = int(re.search(r":(\d+) in a browser", self.process.stdout.readline())[1])

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def memory(self) -> int:
        """Returns the resident memory in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def one_image() -> bytes:
    """Returns a request for a prediction of one image."""
    return json.dumps({"instances": [[[[7, 77, 177]] * 32] * 32]}).encode()


def many_pixels() -> bytes:
    """Returns a request of 2 MB with 256 photos of 50 million pixels each."""
    file = io.BytesIO()
    Image.new("1", (7071, 7071)).save(file, "PNG")
    photo = {"b64": base64.b64encode(file.getvalue()).decode()}
    return json.dumps(
        {"signature_name": "serving_image_bytes", "instances": [photo] * 256}
    ).encode()


def seconds_of(server: Server, requests: int) -> list[float]:
    """Returns the seconds of each of a client's requests, one after the other."""
    body, found = one_image(), []
    with contextlib.closing(server.connection()) as connection:
        for _ in range(requests):
            started = time.perf_counter()
            connection.request("POST", PREDICT, body)
            response = connection.getresponse()
            response.read()
            found.append(time.perf_counter() - started)
            if response.status != 200:
                raise RuntimeError(f"a prediction got the status {response.status}")
    return found


def load(server: Server, clients: int, requests: int) -> list[float]:
    """Returns the seconds of each request of several clients."""
    with ThreadPoolExecutor(clients) as pool:
        each = [requests // clients] * clients
        return [one for found in pool.map(seconds_of, [server] * clients, each) for one in found]


@contextlib.contextmanager
def hostile_clients(server: Server) -> Iterator[None]:
    """Sends requests of many pixels all the time, until the block ends."""
    body, stopped = many_pixels(), threading.Event()

    def insist() -> None:
        while not stopped.is_set():
            with (
                contextlib.closing(server.connection()) as connection,
                contextlib.suppress(OSError),
            ):
                connection.request("POST", PREDICT, body)
                connection.getresponse().read()

    threads = [threading.Thread(target=insist, daemon=True) for _ in range(HOSTILE_CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    try:
        yield
    finally:
        stopped.set()


def under_attack(server: Server) -> list[float]:
    """Returns the seconds of one-image predictions while hostile clients are at work."""
    found: list[float] = []
    with hostile_clients(server):
        end = time.monotonic() + HOSTILE_SECONDS
        while time.monotonic() < end:
            found += seconds_of(server, 1)
    return found


def answered_beside_idle(server: Server) -> int:
    """Returns how many of ASKED requests are answered while clients hold IDLE connections."""
    answered = 0
    with contextlib.ExitStack() as idle:
        for _ in range(IDLE):
            with contextlib.suppress(OSError):
                idle.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
        for _ in range(ASKED):
            with contextlib.suppress(OSError, http.client.HTTPException):
                answered += len(seconds_of(server, 1))
    return answered


def line(name: str, what: str, found: list[float]) -> str:
    """Returns the median and the 99th percentile of some seconds, as a line of text."""
    share = statistics.quantiles(found, n=100)[-1] if len(found) > 1 else found[0]
    times = f"p50 {1000 * statistics.median(found):8.1f} ms  p99 {1000 * share:8.1f} ms"
    return f"{name:<6}  {what:<24}  {times}  ({len(found)} requests)"


def measure(servers: dict[str, Server]) -> None:
    """Prints the results of each server, part by part. Requests that hurt most come last."""
    for clients in CLIENTS:
        found: dict[str, list[float]] = {name: [] for name in servers}
        for _ in range(ROUNDS):
            for name, server in servers.items():
                found[name] += load(server, clients, REQUESTS)
        for name in servers:
            print(line(name, f"{clients} clients", found[name]), flush=True)
    for name, server in servers.items():
        print(f"{name:<6}  {IDLE:,} idle: {answered_beside_idle(server)}/{ASKED}", flush=True)
    for name, server in servers.items():
        print(line(name, "hostile clients", under_attack(server)), flush=True)
    for name, server in servers.items():
        before = server.memory()
        load(server, 8, MEMORY_REQUESTS)
        growth = server.memory() / before - 1
        print(f"{name:<6}  {MEMORY_REQUESTS:,} requests: memory {growth:+.1%}", flush=True)


def main() -> None:
    """Measures the servers alternately, and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saved_model", required=True, help="folder of a SavedModel")
    parser.add_argument("--other", type=Path, help="another checkout of this project")
    given = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    checkouts = {"this": PROJECT} | ({"other": given.other} if given.other else {})
    servers = {name: Server(place, given.saved_model) for name, place in checkouts.items()}
    try:
        for server in servers.values():
            load(server, 8, REQUESTS)
        measure(servers)
    finally:
        for server in servers.values():
            server.process.kill()


if __name__ == "__main__":
    main()
