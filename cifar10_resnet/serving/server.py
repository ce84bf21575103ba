"""Serves a page to try the network on photos, and TensorFlow Serving's REST API.

One thread does all reading and writing, so a slow client costs only its connection. A few threads
do the work, on whole requests. The server limits the size of a request, the bodies of all requests
together, the number of connections, and the time to send a request.
"""

import asyncio
import base64
import contextlib
import ctypes
import hashlib
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tornado import httpserver, iostream, netutil, template, web
from tornado.httputil import responses

from cifar10_resnet.data.photos import data_url, read_photo
from cifar10_resnet.errors import UserError
from cifar10_resnet.serving import rest
from cifar10_resnet.serving.saved_network import SavedNetwork

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.html")
MODEL = "resnet"
VERSION = "1"
API = f"/v1/models/{MODEL}"
SHOWN_CLASSES = 5

MAX_BODY = 16 * 2**20
# The server reads a body up to this size, and drops it if it is over MAX_BODY. Most clients read no
# answer before they have sent everything.
MAX_READ = 8 * MAX_BODY
MAX_BODIES = 16 * MAX_BODY
MAX_HEADER = 16 * 2**10
MAX_CONNECTIONS = 1000
OTHER_FILES = 100  # generous limit for open files that are not connections
WORKERS = 2  # TensorFlow spreads each request over the processors already
SECONDS_TO_FINISH = 5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

ANYWHERE = ("", "0.0.0.0", "::")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


async def serve(
    network: SavedNetwork, sockets: list[socket.socket], host: str, timeout: float
) -> int:
    """Answers requests until Ctrl-C or SIGTERM, and returns the number of that signal."""
    loop = asyncio.get_running_loop()
    stopped = loop.create_future()

    def stop(number: int) -> None:
        for each in STOP_SIGNALS:
            loop.remove_signal_handler(each)  # a second signal stops at once
        stopped.set_result(number)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop, number)
    application = _Application(network, host)
    server = _Server(
        application,
        idle_connection_timeout=timeout,
        body_timeout=timeout,
        max_header_size=MAX_HEADER,
        max_body_size=MAX_READ,
    )
    server.add_sockets(sockets)
    shown = "127.0.0.1" if host in ANYWHERE else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{sockets[0].getsockname()[1]}"
    print(
        f"Open {address} in a browser. REST API: {address}{API}:predict. Press Ctrl-C to stop.",
        flush=True,
    )
    stopped_by = await stopped
    server.stop()
    await application.finish()
    await server.close_all_connections()
    return stopped_by


class _Server(httpserver.HTTPServer):
    """Tornado's server with a limit on its connections. It closes any further one at once."""

    def initialize(self, *arguments: Any, **keywords: Any) -> None:
        super().initialize(*arguments, **keywords)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        unlimited = files == resource.RLIM_INFINITY
        self._free = MAX_CONNECTIONS if unlimited else min(MAX_CONNECTIONS, files - OTHER_FILES)

    def handle_stream(self, stream: iostream.IOStream, address: tuple) -> None:
        if self._free > 0:
            self._free -= 1
            super().handle_stream(stream, address)
        else:
            stream.close()

    def on_close(self, server_conn: object) -> None:
        self._free += 1
        super().on_close(server_conn)


class _Application(web.Application):
    """The state that handlers share: the network, the threads and the size of open requests."""

    def __init__(self, network: SavedNetwork, host: str):
        self.network = network
        self.workers = ThreadPoolExecutor(WORKERS)
        self.requests = 0
        self.body_bytes = 0
        self._answered_bytes = 0
        self._hosts = {*LOOPBACK, host.lower()}
        self._anywhere = host in ANYWHERE
        if self._anywhere:
            self._hosts.add(socket.gethostname().lower())
        with open(PAGE, "rb") as file:
            self.page = template.Template(file.read(), whitespace="all").generate(
                class_names=network.class_names, max_body=MAX_BODY, api=API
            )
        self.page_policy = _page_policy(self.page)
        api = f"{API}(?:/versions/{VERSION})?"
        super().__init__(
            [
                ("/", _Page),
                ("/classify", _Classify),
                (api, _Status),
                (f"{api}/metadata", _Metadata),
                (f"{api}:predict", _Predict),
            ],
            default_handler_class=_NothingThere,
            log_function=lambda handler: None,
        )

    def is_own(self, host: str) -> bool:
        """Returns whether a Host header names this server.

        Another site can point its name at this address ("DNS rebinding"). Its page then sends that
        name, never the address.
        """
        host = host.strip("[]")
        return host in self._hosts or (self._anywhere and netutil.is_valid_ip(host))

    def end_request(self, body_bytes: int) -> None:
        """Counts a request as ended. After the last one, frees the memory of large requests."""
        self.requests -= 1
        self._answered_bytes += body_bytes
        if not self.requests and self._answered_bytes > MAX_BODY:
            self._answered_bytes = 0
            with contextlib.suppress(AttributeError, OSError):  # the C library is not glibc
                ctypes.CDLL(None).malloc_trim(0)

    async def finish(self) -> None:
        """Waits up to SECONDS_TO_FINISH for the open requests, and stops the threads."""
        end = time.monotonic() + SECONDS_TO_FINISH
        while self.requests and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.workers.shutdown(wait=False, cancel_futures=True)


class _Refusal(web.HTTPError):
    """An HTTP error with a sentence that contains the reason."""

    def __init__(self, status: int, sentence: str):
        super().__init__(status)
        self.sentence = sentence


@web.stream_request_body
class _Handler(web.RequestHandler):
    """A handler that reads a whole request within the limits, and then sends `answer`."""

    SUPPORTED_METHODS = ("GET", "HEAD")
    application: _Application

    async def answer(self) -> dict[str, Any] | bytes:
        """Returns what to send, or raises a _Refusal. Subclasses implement it."""
        raise NotImplementedError

    async def get(self) -> None:
        if self._refusal:
            raise self._refusal
        self.finish(await self.answer())

    head = post = get

    async def work(self, answer: Callable[[SavedNetwork, bytes], dict[str, Any]]) -> dict[str, Any]:
        """Returns the answer to the request's body, computed in another thread."""

        def unless_gone() -> dict[str, Any]:
            if self._ended:  # the client has closed its connection
                raise web.Finish
            return answer(self.application.network, self.body)

        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.application.workers, unless_gone)
        except UserError as error:
            raise _Refusal(400, str(error)) from error

    def initialize(self) -> None:
        self.body = bytearray()
        self._received = 0
        self._refusal: _Refusal | None = None
        self._ended = False
        self.application.requests += 1

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        self.set_header("Cache-Control", "no-store")
        self.set_header("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        self.set_header("Cross-Origin-Resource-Policy", "same-origin")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("X-Content-Type-Options", "nosniff")

    def prepare(self) -> None:
        origin = self.request.headers.get("Origin")
        length = self.request.headers.get("Content-Length", "")
        if not self.application.is_own(self.request.host_name):
            name = f"{self.request.host_name:.100}"
            advice = f"Use its IP address, or start it with --host={name}."
            self._refuse(421, f"this server is not {name}. {advice}")
        elif origin and origin.partition("://")[2] != self.request.host:
            self._refuse(403, "requests from other websites are not allowed.")
        elif length.isdecimal() and int(length[:20]) > MAX_READ:
            self._refuse_size()
            raise self._refusal

    def data_received(self, chunk: bytes) -> None:
        self._received += len(chunk)
        if self._refusal:
            return
        self.body += chunk
        self.application.body_bytes += len(chunk)
        if len(self.body) > MAX_BODY:
            self._refuse_size()
        elif self.application.body_bytes > MAX_BODIES:
            self._refuse(503, "too many large requests. Try again in a moment.")

    def _refuse_size(self) -> None:
        self._refuse(413, f"the request is larger than {MAX_BODY >> 20} MiB.")

    def _refuse(self, status: int, sentence: str) -> None:
        """Sets an error as the answer, to be sent once the client has sent its request."""
        self._refusal = _Refusal(status, sentence)
        self._forget_body()

    def _forget_body(self) -> None:
        self.application.body_bytes -= len(self.body)
        self.body = bytearray()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self._end()

    def on_finish(self) -> None:
        self._end()

    def _end(self) -> None:
        self._forget_body()
        if not self._ended:
            self._ended = True
            self.application.end_request(self._received)

    def write_error(self, status_code: int, **keywords: Any) -> None:
        error = keywords.get("exc_info", (None, None))[1]
        if status_code == 405:
            self.set_header("Allow", ", ".join(self.SUPPORTED_METHODS))
        reason = f"{responses.get(status_code, 'Error')}."
        self.finish({"error": getattr(error, "sentence", reason)})

    def log_exception(self, kind: Any, error: Any, trace: Any) -> None:
        if not isinstance(error, web.HTTPError):  # an HTTPError is the client's mistake
            super().log_exception(kind, error, trace)


class _NothingThere(_Handler):
    SUPPORTED_METHODS = ("GET", "HEAD", "POST")

    async def answer(self) -> bytes:
        raise _Refusal(404, f"not found. The page is at /, the API at {API}.")


class _Page(_Handler):
    async def answer(self) -> bytes:
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.set_header("Content-Security-Policy", self.application.page_policy)
        return self.application.page


class _Classify(_Handler):
    """The address that the page uses. The request's body is a photo."""

    SUPPORTED_METHODS = ("POST",)

    async def answer(self) -> dict[str, Any]:
        return await self.work(_classify)


class _Status(_Handler):
    async def answer(self) -> dict[str, Any]:
        status = {"error_code": "OK", "error_message": ""}
        version = {"version": VERSION, "state": "AVAILABLE", "status": status}
        return {"model_version_status": [version]}


class _Metadata(_Handler):
    async def answer(self) -> dict[str, Any]:
        signatures = self.application.network.describe_signatures()
        return {
            "model_spec": {"name": MODEL, "signature_name": "", "version": VERSION},
            "metadata": {"signature_def": {"signature_def": signatures}},
        }


class _Predict(_Handler):
    SUPPORTED_METHODS = ("POST",)

    async def answer(self) -> dict[str, Any]:
        return await self.work(rest.predict)


def _classify(network: SavedNetwork, encoded: bytes) -> dict[str, Any]:
    """Returns what the network saw, as a data URL, and the most likely classes, best first."""
    photo = read_photo(encoded, "This file")
    probabilities = network(photo[None])["probabilities"][0]
    best = np.argsort(-probabilities, kind="stable")[:SHOWN_CLASSES]
    return {
        "seen": data_url(photo),
        "classes": [
            {"name": network.class_names[i], "probability": float(probabilities[i])} for i in best
        ],
    }


def _page_policy(page: bytes) -> str:
    """Returns a policy that allows the page's own style and script, and nothing from elsewhere."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for tag, content in re.findall(rb"<(style|script)>(.*?)</", page, re.S)
    }
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[b'style']}'; "
        f"script-src 'sha256-{hashes[b'script']}'; connect-src 'self'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
