"""Serves a page to try the network on photos, and TensorFlow Serving's REST API.

One thread does all reading and writing, so a slow client costs only its connection. A few threads
work on whole requests. Heavy requests have their own thread, so light ones never wait for them. The
server limits the bytes and pixels of a request, the bodies of all requests together, connections,
waiting requests, and the time to send a request and to answer it.
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

from tornado import httpserver, iostream, netutil, template, web

from cifar10_resnet.data.photos import MAX_PIXELS, data_url
from cifar10_resnet.errors import UserError
from cifar10_resnet.serving import rest
from cifar10_resnet.serving.saved_network import SavedNetwork, best_classes

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
TOO_LARGE = f"the request is larger than {MAX_BODY >> 20} MiB."
MAX_HEADER = 16 * 2**10
MAX_CONNECTIONS = 1000
OTHER_FILES = 100  # generous limit for open files that are not connections
# Heavy requests have more than LIGHT_BYTES, or photos with more pixels than light ones may have.
# TensorFlow spreads each request over the processors already.
LIGHT_BYTES = 256 * 2**10
THREADS = {"light": 2, "heavy": 1}
PIXELS = {"light": 2_000_000, "heavy": MAX_PIXELS}
MAX_WAITING = 256  # requests of each kind
SECONDS_TO_FINISH = 5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

ANYWHERE = ("", "0.0.0.0", "::")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


async def serve(
    network: SavedNetwork, sockets: list[socket.socket], host: str, timeout: float
) -> int:
    """Answers requests until Ctrl-C or SIGTERM, and returns the number of that signal."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, signals.put_nowait, number)
    application = _Application(network, host, timeout)
    server = _Server(application)
    server.add_sockets(sockets)
    port = sockets[0].getsockname()[1]
    shown = "127.0.0.1" if host in ANYWHERE else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}"
    others = f" On other machines, open http://{socket.gethostname()}:{port}."
    print(
        f"Open {address} in a browser.{others if host in ANYWHERE else ''} "
        f"REST API: {address}{API}:predict. Press Ctrl-C to stop.",
        flush=True,
    )
    stopped_by = await signals.get()
    for number in STOP_SIGNALS:
        loop.remove_signal_handler(number)  # a second signal stops at once
    server.stop()
    end = time.monotonic() + SECONDS_TO_FINISH
    while application.requests and time.monotonic() < end:
        await asyncio.sleep(0.05)
    for threads in application.threads.values():
        threads.shutdown(wait=False, cancel_futures=True)
    await server.close_all_connections()
    return stopped_by


class _Server(httpserver.HTTPServer):
    """Tornado's server with a limit on its connections, and half of it for each address.

    At a limit, a new one replaces the one that is silent for longest and is not being answered.
    """

    def initialize(self, application: "_Application") -> None:
        super().initialize(
            application,
            idle_connection_timeout=application.timeout,
            body_timeout=application.timeout,
            max_header_size=MAX_HEADER,
            max_body_size=MAX_READ,
        )
        self._clients = application.clients
        self._answering = application.answering
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = MAX_CONNECTIONS if files == resource.RLIM_INFINITY else files - OTHER_FILES
        self._most = min(MAX_CONNECTIONS, most)

    def handle_stream(self, stream: iostream.IOStream, address: tuple) -> None:
        same = {each: other for each, other in self._clients.items() if other == address[0]}
        for crowd, most in ((same, self._most // 2), (self._clients, self._most)):
            if len(crowd) >= most:
                replaced = next((each for each in crowd if each not in self._answering), stream)
                replaced.close()
                self._clients.pop(replaced, None)
        if not stream.closed():
            self._clients[stream] = address[0]
            super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        self._clients.pop(server_conn.stream, None)
        super().on_close(server_conn)


class _Application(web.Application):
    """The state that handlers share: the network, the threads and the open requests."""

    def __init__(self, network: SavedNetwork, host: str, timeout: float):
        self.network = network
        self.timeout = timeout
        self.threads = {kind: ThreadPoolExecutor(number) for kind, number in THREADS.items()}
        self.waiting = dict.fromkeys(THREADS, 0)
        # Each connection has its client's address. The first one has been silent for longest.
        self.clients: dict[iostream.IOStream, str] = {}
        self.answering: dict[iostream.IOStream, asyncio.Task] = {}
        self.requests = 0
        self.body_bytes = 0
        self._answered_bytes = 0
        self._anywhere = host in ANYWHERE
        own_name = socket.gethostname() if self._anywhere else host
        self._hosts = {*LOOPBACK, own_name.lower()}
        with open(PAGE, "rb") as file:
            page = template.Template(file.read(), whitespace="all").generate(
                class_names=network.class_names, max_body=MAX_BODY, api=API
            )
        status = {"error_code": "OK", "error_message": ""}
        version = {"version": VERSION, "state": "AVAILABLE", "status": status}
        metadata = {
            "model_spec": {"name": MODEL, "signature_name": "", "version": VERSION},
            "metadata": {"signature_def": {"signature_def": network.describe_signatures()}},
        }
        api = f"{API}(?:/versions/{VERSION})?"
        super().__init__(
            [
                ("/", _Fixed, {"content": page} | _page_headers(page)),
                (api, _Fixed, {"content": {"model_version_status": [version]}}),
                (f"{api}/metadata", _Fixed, {"content": metadata}),
                ("/classify", _Work, {"compute": _classify}),
                (f"{api}:predict", _Work, {"compute": rest.predict}),
            ],
            default_handler_class=_Handler,
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

    def hear(self, stream: iostream.IOStream) -> None:
        """Notes that a connection's client is not silent."""
        if stream in self.clients:
            self.clients[stream] = self.clients.pop(stream)


class _Refusal(web.HTTPError):
    """An HTTP error with a sentence that contains the reason."""

    def __init__(self, status: int, sentence: str):
        super().__init__(status)
        self.sentence = sentence


@web.stream_request_body
class _Handler(web.RequestHandler):
    """A handler that reads a whole request within the limits, and then sends `answer`."""

    SUPPORTED_METHODS = ("GET", "HEAD", "POST")
    application: _Application

    async def answer(self) -> dict[str, Any] | bytes:
        """Returns what to send, or raises a _Refusal. Subclasses replace it."""
        raise _Refusal(404, f"not found. The page is at /, the API at {API}.")

    async def get(self) -> None:
        if self._refusal:
            raise self._refusal
        self.finish(await self.answer())

    head = post = get

    def initialize(self) -> None:
        self.body = bytearray()
        self._received = 0
        self._refusal: _Refusal | None = None
        self._ended = False
        self._stream = self.request.connection.stream
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
            raise _Refusal(413, TOO_LARGE)

    def data_received(self, chunk: bytes) -> None:
        self.application.hear(self._stream)
        self._received += len(chunk)
        if self._refusal:
            return
        self.body += chunk
        self.application.body_bytes += len(chunk)
        if len(self.body) > MAX_BODY:
            self._refuse(413, TOO_LARGE)
        elif self.application.body_bytes > MAX_BODIES:
            self._refuse(503, "too many large requests. Try again in a moment.")

    def _refuse(self, status: int, sentence: str) -> None:
        """Sets an error as the answer, to be sent once the client has sent its request."""
        self._refusal = _Refusal(status, sentence)
        self._forget_body()

    def _forget_body(self) -> None:
        self.application.body_bytes -= len(self.body)
        self.body = bytearray()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.on_finish()

    def on_finish(self) -> None:
        self._forget_body()
        if not self._ended:
            self._ended = True
            self.application.hear(self._stream)
            self.application.end_request(self._received)
        if task := self.application.answering.pop(self._stream, None):
            task.cancel()  # Nobody waits for the answer any more.

    def write_error(self, status_code: int, **keywords: Any) -> None:
        error = keywords.get("exc_info", (None, None))[1]
        if status_code == 405:
            self.set_header("Allow", ", ".join(self.SUPPORTED_METHODS))
        if status_code == 503:
            self.set_header("Retry-After", "1")
        self.finish({"error": getattr(error, "sentence", f"{self._reason}.")})


class _Fixed(_Handler):
    """An address whose answer never changes: the page, or an object of the API."""

    SUPPORTED_METHODS = ("GET", "HEAD")

    def initialize(self, content: dict[str, Any] | bytes, **headers: str) -> None:
        super().initialize()
        self._content = content
        for name, value in headers.items():
            self.set_header(name, value)

    async def answer(self) -> dict[str, Any] | bytes:
        return self._content


class _Work(_Handler):
    """An address where a thread computes the answer to the request's body."""

    SUPPORTED_METHODS = ("POST",)

    def initialize(self, compute: Callable[..., dict[str, Any]]) -> None:
        super().initialize()
        self._compute = compute

    async def answer(self) -> dict[str, Any]:
        task = self.application.answering[self._stream] = asyncio.ensure_future(self._work())
        try:
            return await asyncio.wait_for(task, self.application.timeout)
        except asyncio.TimeoutError as error:
            raise _Refusal(504, "the answer takes too long. Send less, or try again.") from error
        except asyncio.CancelledError as error:
            raise _Refusal(503, "the server stops.") from error
        except UserError as error:
            raise _Refusal(400, str(error)) from error

    async def _work(self) -> dict[str, Any]:
        if len(self.body) <= LIGHT_BYTES:
            with contextlib.suppress(_Refusal):
                return await self._in_thread("light")
        return await self._in_thread("heavy")

    async def _in_thread(self, kind: str) -> dict[str, Any]:
        def admit(pixels: int) -> None:
            if self._ended:  # The client is gone, or time is up.
                raise web.Finish
            if pixels > PIXELS[kind]:
                raise _Refusal(413, f"the photos have over {PIXELS[kind]:,} pixels. Send fewer.")

        app = self.application
        if app.waiting[kind] >= MAX_WAITING:
            raise _Refusal(503, "too many requests. Try again in a moment.")
        app.waiting[kind] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                app.threads[kind], lambda: self._compute(app.network, self.body, admit)
            )
        finally:
            app.waiting[kind] -= 1


def _classify(network: SavedNetwork, encoded: bytes, admit: rest.Admit) -> dict[str, Any]:
    """Returns what the network saw, as a data URL, and the most likely classes, best first."""
    image = rest.read_photos({"This file": encoded}, admit)
    probabilities = network(image)["probabilities"][0]
    classes = best_classes(probabilities, network.class_names, SHOWN_CLASSES)
    return {"seen": data_url(image[0]), "classes": classes}


def _page_headers(page: bytes) -> dict[str, str]:
    """Returns headers that allow the page's own style and script, and nothing from elsewhere."""
    style, script = (
        base64.b64encode(hashlib.sha256(content).digest()).decode()
        for content in re.findall(rb"<(?:style|script)>(.*?)</", page, re.S)
    )
    policy = (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "connect-src 'self'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {"Content-Type": "text/html; charset=UTF-8", "Content-Security-Policy": policy}
