"""The server as users see it: a process that gets good and bad requests over loopback."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from browsers import page_width, show_as_on_a_phone
from conftest import random_images
from PIL import Image
from programs import PROJECT, run, run_code, without_tensorflow
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from tornado.netutil import bind_sockets

from cifar10_resnet.errors import UserError

NAMES = ("airplane", "automobile", "<b>bird</b>", "cat", "deer", "dog", "frog")
API = "/v1/models/resnet"
PREDICT = f"{API}:predict"
TIMEOUT = 4  # seconds that the frugal server waits for a request
MIB = 2**20
POST = b"POST /classify HTTP/1.1\r\nHost: localhost\r\n"


def save_network(
    folder: Path, names: tuple[str, ...] = NAMES, resource: object | None = None
) -> None:
    """Saves an untrained network with an exported network's signatures, and maybe a resource."""
    import tensorflow as tf

    from resnet_model import ResNet

    network = ResNet(num_layers=8, num_classes=len(NAMES))
    network.image_mean.assign(np.full([32, 32, 3], 120))
    network.resource = resource
    network.class_names = tf.Variable(names, trainable=False)

    def outputs(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = network(images - network.image_mean)
        probabilities = tf.nn.softmax(logits)
        return {"logits": logits, "probabilities": probabilities, "classes": tf.argmax(logits, 1)}

    def decoded(encoded: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_image(encoded, 3, expand_animations=False)
        return tf.image.resize(pixels, [32, 32])

    def signature(function: Callable, shape: list, dtype: tf.DType, name: str) -> tf.Tensor:
        spec = tf.TensorSpec(shape, dtype, name)
        return tf.function(function, [spec], autograph=False).get_concrete_function()

    images = [None, 32, 32, 3]
    tf.saved_model.save(
        network,
        folder,
        {
            "serving_default": signature(
                lambda images: outputs(tf.cast(images, tf.float32)), images, tf.uint8, "images"
            ),
            "serving_float": signature(outputs, images, tf.float32, "images"),
            "serving_image_bytes": signature(
                lambda encoded: outputs(
                    tf.map_fn(decoded, encoded, fn_output_signature=tf.float32)
                ),
                *([None], tf.string, "image_bytes"),
            ),
        },
    )


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved_model")
    save_network(folder)
    return folder


@pytest.fixture(scope="module")
def expected(saved_model) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns the network's answer to TensorFlow."""
    import tensorflow as tf

    loaded = tf.saved_model.load(saved_model)

    def ask(images: np.ndarray) -> dict[str, np.ndarray]:
        answer = loaded.signatures["serving_float"](images=tf.constant(images, tf.float32))
        return {name: value.numpy() for name, value in answer.items()}

    return ask


@dataclass
class Server:
    process: subprocess.Popen | None
    port: int
    log: Path | None = None
    greeting: str = ""

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def post(self, path: str, body: bytes) -> tuple[int, dict]:
        status, _, answer = self.ask("POST", path, body)
        return status, json.loads(answer)

    def predict(self, **request: object) -> dict:
        status, answer = self.post(PREDICT, json.dumps(request).encode())
        assert status == 200, answer
        return answer

    def refusal(self, path: str, body: bytes, status: int = 400) -> str:
        """Returns the one-line error of a request."""
        found, answer = self.post(path, body)
        assert found == status, answer
        assert list(answer) == ["error"]
        return answer["error"]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def memory(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


@contextlib.contextmanager
def running(saved_model: Path, log: Path, *arguments: str, **keywords) -> Iterator[Server]:
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, str(PROJECT / "cifar10_resnet"), "serve"),
                f"--saved_model={saved_model}",
                *("--port=0", *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            **keywords,
        )
    try:
        greeting = process.stdout.readline()
        address = re.match(r"Open http://127\.0\.0\.1:(\d+) in a browser", greeting)
        assert address, greeting + log.read_text()
        yield Server(process, int(address[1]), log, greeting)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(saved_model, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "stderr"
    with running(saved_model, log) as server:
        yield server


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def in_json(photo_bytes: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(photo_bytes).decode()}


def photo(height: int, width: int) -> np.ndarray:
    """Returns a large photo without small detail, as photographs are."""
    small = np.random.default_rng(5).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def assert_rows(rows: list[dict], answer: dict[str, np.ndarray]) -> None:
    assert len(rows) == len(answer["classes"])
    for i, row in enumerate(rows):
        assert row.keys() == {"logits", "probabilities", "classes"}
        np.testing.assert_allclose(row["logits"], answer["logits"][i], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(row["probabilities"], answer["probabilities"][i], atol=1e-5)
        assert row["classes"] == answer["classes"][i]


def test_rows_are_answered_with_an_object_for_each_photo(server, expected):
    images, _ = random_images(3)
    rows = server.predict(instances=images.tolist())
    assert list(rows) == ["predictions"]
    assert_rows(rows["predictions"], expected(images))
    named = server.predict(instances=[{"images": image.tolist()} for image in images])
    assert named == rows


def test_columns_are_answered_with_columns(server, expected):
    images, _ = random_images(3)
    columns = server.predict(inputs={"images": images.tolist()})
    assert list(columns) == ["outputs"]
    assert columns["outputs"].keys() == {"logits", "probabilities", "classes"}
    assert columns == server.predict(inputs=images.tolist(), signature_name="serving_default")
    rows = [
        dict(zip(columns["outputs"], row, strict=True))
        for row in zip(*columns["outputs"].values(), strict=True)
    ]
    assert_rows(rows, expected(images))


def test_fractions_of_pixels_are_for_the_float_signature(server, expected):
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    images[0, 0, 0] = 7  # whole numbers among them do not matter
    rows = server.predict(signature_name="serving_float", instances=images.tolist())
    assert_rows(rows["predictions"], expected(images))


def test_encoded_photos_of_any_size_are_read_as_everywhere_in_the_project(server, expected):
    from cifar10_resnet.data.photos import read_photo

    files = [encoded(photo(90, 130), "JPEG"), encoded(photo(33, 32)), encoded(photo(8, 9), "BMP")]
    answer = expected(np.stack([read_photo(file, "") for file in files]))
    values = [in_json(file) for file in files]
    for request in (
        {"instances": values},
        {"instances": [{"image_bytes": value} for value in values]},
    ):
        rows = server.predict(signature_name="serving_image_bytes", **request)
        assert_rows(rows["predictions"], answer)
    columns = server.predict(signature_name="serving_image_bytes", inputs={"image_bytes": values})
    np.testing.assert_array_equal(columns["outputs"]["classes"], answer["classes"])


def test_the_client_in_the_docs_works_as_it_is_printed(server, tmp_path):
    page = (PROJECT / "docs" / "export_and_serve.md").read_text(encoding="utf-8")
    (client,) = re.findall(r"```python\n([^`]*8501[^`]*)```", page)
    upload = encoded(photo(40, 40), "JPEG")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "cat.jpg").write_bytes(upload)
    printed = run_code(client.replace("8501", str(server.port)), cwd=tmp_path).stdout
    best = server.post("/classify", upload)[1]["classes"][0]
    probabilities = json.loads(printed)
    assert max(probabilities) == pytest.approx(best["probability"], abs=1e-5)
    assert NAMES[np.argmax(probabilities)] == best["name"]


def test_numbers_have_no_more_digits_than_they_are_worth(server):
    images, _ = random_images(1)
    _, _, answer = server.ask("POST", PREDICT, json.dumps({"instances": images.tolist()}).encode())
    numbers = re.findall(rb"\d+\.\d+(?:e-?\d+)?", answer)
    assert len(numbers) == 2 * len(NAMES)
    for number in numbers:
        assert str(np.float32(number)) == str(float(number))


def test_status_and_metadata_say_what_is_served(server):
    for address in (API, f"{API}/versions/1"):
        status, headers, answer = server.ask("GET", address)
        assert status == 200
        assert headers["Content-Type"].startswith("application/json")
        assert json.loads(answer) == {
            "model_version_status": [
                {
                    "version": "1",
                    "state": "AVAILABLE",
                    "status": {"error_code": "OK", "error_message": ""},
                }
            ]
        }
        status, _, answer = server.ask("GET", f"{address}/metadata")
        metadata = json.loads(answer)
        assert metadata["model_spec"]["name"] == "resnet"
        assert metadata["model_spec"]["version"] == "1"
        signatures = metadata["metadata"]["signature_def"]["signature_def"]
        images = signatures["serving_default"]["inputs"]["images"]
        assert images["dtype"] == "DT_UINT8"
        assert [dim["size"] for dim in images["tensor_shape"]["dim"]] == ["-1", "32", "32", "3"]
        assert signatures["serving_float"]["outputs"]["classes"]["dtype"] == "DT_INT64"
        assert "serving_image_bytes" in signatures


def test_a_version_may_be_named(server):
    images, _ = random_images(1)
    body = json.dumps({"instances": images.tolist()}).encode()
    assert server.post(f"{API}/versions/1:predict", body) == server.post(PREDICT, body)


def test_an_uploaded_photo_comes_back_as_the_network_saw_it_with_its_likeliest_classes(
    server, expected
):
    from cifar10_resnet.data.photos import read_photo

    turned = Image.Exif()
    turned[0x0112] = 6
    upload = encoded(photo(300, 400), "JPEG", exif=turned)
    status, answer = server.post("/classify", upload)
    assert status == 200
    kind, data = answer["seen"].split(",")
    assert kind == "data:image/png;base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(seen, read_photo(upload, ""))
    probabilities = expected(seen[None])["probabilities"][0]
    best = np.argsort(-probabilities)[:5]
    assert [found["name"] for found in answer["classes"]] == [NAMES[i] for i in best]
    np.testing.assert_allclose(
        [found["probability"] for found in answer["classes"]], probabilities[best], atol=1e-5
    )


PIXELS = random_images(1)[0].tolist()


def with_pixel(value: str) -> bytes:
    """A request for whole numbers whose last one is something else."""
    text = json.dumps({"instances": PIXELS})
    return re.sub(r"\d+\]\]\]\]", f"{value}]]]]", text).encode()


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"instances": [' + b"9" * 5000 + b"]}", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"{}", "'instances'"),
        (b'{"instances": [], "inputs": []}', "either 'instances'"),
        (b'{"instances": []}', "one or more images"),
        (b'{"instances": 3}', "one or more images"),
        (b'{"inputs": {"b64": "aGk="}}', "one or more images"),
        (b'{"inputs": {"pictures": []}}', "'images'"),
        (b'{"instances": [{"pictures": []}]}', "'images'"),
        (b'{"instances": [{"images": []}, {"pictures": []}]}', "instance 1"),
        (b'{"instances": [1, 2]}', "shape [2]"),
        (b'{"instances": [[[[1, 2], [3]]]]}', "shape [1, 1, 2]"),
        (json.dumps({"instances": PIXELS[0]}).encode(), "shape [32, 32, 3]"),
        (json.dumps({"instances": [PIXELS[0], PIXELS[0][1:]]}).encode(), "shape [2]"),
        (json.dumps({"instances": PIXELS, "signature_name": "no"}).encode(), "serving_float"),
        (json.dumps({"instances": PIXELS, "signature_name": ["x"]}).encode(), "signature"),
        (json.dumps({"instances": [0] * 257}).encode(), "up to 256"),
        (with_pixel("256"), "0 to 255"),
        (with_pixel("-1"), "0 to 255"),
        (with_pixel("1.5"), "0 to 255"),
        (with_pixel("NaN"), "0 to 255"),
        (with_pixel("-Infinity"), "0 to 255"),
        (with_pixel("null"), "0 to 255"),
        (with_pixel("true"), "0 to 255"),
        (with_pixel('"7"'), "0 to 255"),
        (with_pixel("{}"), "0 to 255"),
    ],
)  # fmt: skip
def test_what_is_not_a_request_is_refused_with_a_one_line_error(server, body, fragment):
    assert fragment in server.refusal(PREDICT, body)


@pytest.mark.parametrize("value", ["1e39", "1e400", "9" * 4000, "null", "true", '"7"', "NaN"])
def test_only_numbers_that_a_float32_holds_are_pixels(server, value):
    body = with_pixel(value).replace(b"{", b'{"signature_name": "serving_float", ')
    assert re.search("number|float32", server.refusal(PREDICT, body))


def test_an_answer_that_json_cannot_say_is_refused(server):
    glaring = [[[[3e38] * 3] * 32] * 32]
    body = json.dumps({"signature_name": "serving_float", "instances": glaring}).encode()
    assert "is not finite" in server.refusal(PREDICT, body)


def png_header(width: int, height: int) -> bytes:
    """A small PNG that claims to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("photo_bytes", "fragment"),
    [
        (b"", "empty"),
        (b"hello", "not a JPEG, PNG or BMP"),
        (b"GIF89a" + bytes(100), "not a JPEG, PNG or BMP"),
        (encoded(photo(40, 40), "JPEG")[:-200], "damaged"),
        (png_header(60_000, 60_000), "pixels"),
        (png_header(2000, 2000), "damaged"),
    ],
)
def test_what_is_not_a_photo_is_refused_with_a_one_line_error(server, photo_bytes, fragment):
    assert fragment in server.refusal("/classify", photo_bytes)
    request = {"signature_name": "serving_image_bytes", "instances": [in_json(photo_bytes)]}
    in_request = server.refusal(PREDICT, json.dumps(request).encode())
    assert in_request.startswith("instance 0")
    assert fragment in in_request


def test_base64_is_read_with_and_without_line_breaks_and_padding(server):
    photo_bytes = encoded(photo(40, 40))
    photo_bytes += bytes(1 + -len(photo_bytes) % 3)  # what follows a photo does not matter
    broken = base64.encodebytes(photo_bytes).decode()
    plain = in_json(photo_bytes)["b64"]
    assert "\n" in broken
    assert plain.endswith("==")
    rows = server.predict(
        signature_name="serving_image_bytes",
        instances=[{"b64": text} for text in (plain, broken, plain.rstrip("="))],
    )["predictions"]
    assert rows[0]["classes"] == rows[1]["classes"] == rows[2]["classes"]


def test_photos_are_not_unpacked_once_nobody_waits_for_the_answer(monkeypatch):
    from cifar10_resnet.serving import rest

    unpacked, asked = [], []
    monkeypatch.setattr(rest, "unpacked", lambda image, name: unpacked.append(name))

    def admit(pixels: int) -> None:
        asked.append(pixels)
        if len(asked) == 3:
            raise TimeoutError

    files = {name: encoded(photo(40, 50)) for name in "abcde"}
    with pytest.raises(TimeoutError):
        rest.read_photos(files, admit)
    assert asked == [5 * 40 * 50] * 3
    assert unpacked == ["a", "b"]


HOSTILE = encoded(np.zeros((7071, 7071), np.bool_))  # almost 50,000,000 pixels in 6 KB


def hostile_request() -> bytes:
    photos = [in_json(HOSTILE)] * 256
    return json.dumps({"signature_name": "serving_image_bytes", "instances": photos}).encode()


def test_the_pixels_of_a_request_are_counted_before_any_is_unpacked(server):
    body = hostile_request()
    assert len(body) < 3 * MIB
    assert "over 50,000,000 pixels" in server.refusal(PREDICT, body, 413)


def test_four_clients_with_requests_of_many_pixels_do_not_delay_the_others(server, expected):
    images, _ = random_images(1)
    body, stopped = hostile_request(), threading.Event()

    def insist() -> None:
        while not stopped.is_set():
            server.post(PREDICT, body)
            server.post("/classify", HOSTILE)  # this is allowed, and takes about a second

    with ThreadPoolExecutor(4) as clients:
        hostile = [clients.submit(insist) for _ in range(4)]
        try:
            started = time.monotonic()
            for _ in range(20):
                assert_rows(
                    server.predict(instances=images.tolist())["predictions"], expected(images)
                )
            assert time.monotonic() - started < 60  # one of them took a minute before
        finally:
            stopped.set()
        for each in hostile:
            each.result()


@pytest.mark.parametrize("value", ["aGk=", {"b64": 7}, {"b64": "a"}, {"b64": "ä"}, 5, None, []])
def test_what_is_not_base64_is_refused_with_a_one_line_error(server, value):
    good = in_json(encoded(photo(40, 40)))
    request = {"signature_name": "serving_image_bytes", "instances": [good, value]}
    assert "instance 1" in server.refusal(PREDICT, json.dumps(request).encode())


@pytest.mark.parametrize("path", ["/classify", PREDICT])
def test_a_request_over_the_limit_is_refused_after_it_was_sent(server, path):
    assert "larger than 16 MiB" in server.refusal(path, bytes(16 * MIB + 1), 413)


def test_a_request_far_over_the_limit_is_not_read(server):
    with server.connect() as client:
        client.sendall(POST + b"Content-Length: 1000000000000000\r\n\r\n")
        assert b" 413 " in until_closed(client)


def test_a_request_that_does_not_say_its_length_is_limited_too(server):
    with server.connect() as client:
        client.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(17):
            client.sendall(b"%x\r\n" % MIB + bytes(MIB) + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert b" 413 " in client.recv(4096)


@pytest.mark.parametrize(
    "form",
    [
        b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\n\r\n',
        b"--x\r\n" * 1000,
        b"--x--\r\n\r\n--x",
        b"",
    ],
    ids=["cut off", "boundaries", "an end first", "empty"],
)
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data; =;", ""])
def test_forms_well_made_or_not_are_no_photos_and_no_json(server, form, kind):
    for path in ("/classify", PREDICT):
        status, _, answer = server.ask("POST", path, form, **{"Content-Type": kind})
        assert status == 400
        assert list(json.loads(answer)) == ["error"]


@pytest.mark.parametrize(
    "request_head",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"X: " + bytes(20_000),
        POST + b": x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: evil.example@localhost\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_a_request_that_is_not_http_or_means_two_things_gets_no_page(server, request_head):
    with server.connect() as client:
        client.sendall(request_head)
        client.shutdown(socket.SHUT_WR)
        answer = until_closed(client)
    assert re.match(rb"HTTP/1.1 4\d\d |$", answer), answer
    assert server.ask("GET", API)[0] == 200


def test_json_that_would_grow_in_memory_is_refused_unread(server):
    for filling in (b"[],", b"{},", b"0,", b"[["):
        body = b'{"instances": [' + filling * (15 * MIB // len(filling)) + b"0]}"
        assert "up to 256 images" in server.refusal(PREDICT, body)


def until_closed(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "192.0.2.1", "127.0.0.2"]
)
def test_names_that_are_not_the_servers_are_refused(server, host):
    for method, path, body in (("GET", "/", None), ("GET", API, None), ("POST", "/classify", b"x")):
        status, _, answer = server.ask(method, path, body, Host=host)
        assert status == 421
        assert b"not " + host.split(":")[0].encode() in answer


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8501", "127.0.0.1:1", "[::1]:8501"])
def test_the_servers_own_names_are_understood(server, host):
    assert server.ask("GET", API, Host=host)[0] == 200


def test_pages_of_other_sites_get_no_answers(server):
    upload = encoded(photo(40, 40))
    status, headers, _ = server.ask("POST", "/classify", upload, Origin="http://evil.example")
    assert status == 403
    assert not any(name.startswith("Access-Control") for name in headers)
    for odd in ("null", "http://[", "127.0.0.1"):
        assert server.ask("POST", "/classify", upload, Origin=odd)[0] == 403
    own = f"http://127.0.0.1:{server.port}"
    assert server.ask("POST", "/classify", upload, Origin=own)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/nothing", "/..", "/../serve.py", "/%2e%2e/serve.py", "/..%2f..%2fetc/passwd",
        "//etc/passwd", "/serving/page.html", "/classify/../../serve.py", "/static/serve.py",
        "/%00", "/%ff", "/v1/models", "/v1/models/half", f"{API}/versions/2", f"{API}/../x",
    ],
)  # fmt: skip
def test_there_is_nothing_at_other_addresses(server, path):
    status, _, answer = server.ask("GET", path)
    assert status in (400, 404)
    assert list(json.loads(answer)) == ["error"]
    assert server.ask("POST", path + ":predict", b"{}")[0] in (400, 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/", "GET, HEAD"), ("DELETE", "/", "GET, HEAD"), ("GET", "/classify", "POST"),
        ("PUT", "/classify", "POST"), ("GET", PREDICT, "POST"), ("POST", API, "GET, HEAD"),
        ("OPTIONS", PREDICT, "POST"), ("BREW", "/", "GET, HEAD"),
    ],
)  # fmt: skip
def test_other_methods_are_refused(server, method, path, allowed):
    status, headers, answer = server.ask(method, path, b"x")
    assert status == 405
    assert headers["Allow"] == allowed
    assert list(json.loads(answer)) == ["error"]


def test_the_page_needs_no_other_site_and_lets_none_in(server):
    status, headers, page = server.ask("GET", "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=UTF-8"
    parts = headers["Content-Security-Policy"].split("; ")
    policy = dict(part.split(" ", 1) for part in parts)
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert re.findall(rb"//[\w.-]+", page) == [b"//www.w3.org"]  # a drawing's namespace
    assert b"&lt;b&gt;bird&lt;/b&gt;" in page
    assert b"<b>bird</b>" not in page
    assert server.ask("HEAD", "/")[::2] == (200, b"")


def test_clients_that_go_away_leave_no_trace(server):
    upload = encoded(photo(1500, 1500))
    for sent in (10, len(upload) - 1, len(upload)):
        for _ in range(10):
            with server.connect() as client:
                client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(upload))
                client.sendall(upload[:sent])
    assert server.post("/classify", upload)[0] == 200


@pytest.fixture(scope="module")
def storm(server) -> Callable[[], None]:
    """Makes 200 requests at once, good ones and bad ones, and checks each answer."""
    images, _ = random_images(4)
    good = json.dumps({"instances": images.tolist()}).encode()
    requests = [
        (PREDICT, good, 200),
        ("/classify", encoded(photo(500, 700), "JPEG"), 200),
        ("/classify", encoded(photo(300, 200)), 200),
        ("/classify", bytes(2 * MIB), 400),
        (PREDICT, good[:-1], 400),
    ]
    answers = [server.post(path, body) for path, body, _ in requests]
    assert [status for status, _ in answers] == [status for *_, status in requests]
    everyone = threading.Barrier(200)

    def ask(i: int) -> tuple[int, dict]:
        everyone.wait(timeout=60)
        return server.post(*requests[i % len(requests)][:2])

    def best(answer: dict) -> object:
        """Returns the parts that do not depend on TensorFlow's threads."""
        if "predictions" in answer:
            return [row["classes"] for row in answer["predictions"]]
        return answer["classes"][0]["name"] if "classes" in answer else answer

    def storm() -> None:
        with ThreadPoolExecutor(200) as clients:
            for i, (status, answer) in enumerate(clients.map(ask, range(200))):
                alone_status, alone = answers[i % len(answers)]
                assert status == alone_status
                assert best(answer) == best(alone)
        # by the answer to this, the server has put the others behind it
        assert server.ask("GET", API)[0] == 200

    return storm


def test_hundreds_of_requests_at_once_are_all_answered_and_add_no_memory(server, storm):
    # A leak adds memory in every storm. One storm that adds next to nothing rules it out.
    storm()
    for _ in range(5):
        before = server.memory()
        storm()
        if server.memory() <= 1.01 * before:
            return
    raise AssertionError("each of five storms added more than 1% to the server's memory")


def percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "< 0.1%"


class Page:
    """The page, newly opened in a browser."""

    def __init__(self, browser: webdriver.Chrome, server: Server):
        self.browser = browser
        browser.get(f"http://127.0.0.1:{server.port}/")

    def part(self, name: str) -> WebElement:
        return self.browser.find_element("id", name)

    def said(self) -> str:
        """Returns the text of the page when it has an answer."""
        message = self.part("message")
        assert eventually(lambda: message.text not in ("", "Classifying …"))
        return message.text

    def assert_shows(self, answer: dict) -> None:
        best = answer["classes"][0]
        assert self.said() == f"{best['name']}, {percent(best['probability'])}"
        seen = self.part("seen")
        assert seen.get_attribute("src") == answer["seen"]
        assert seen.get_attribute("naturalWidth") == "32"
        assert seen.size == {"width": 256, "height": 256}
        assert seen.value_of_css_property("image-rendering") == "pixelated"
        rows = self.part("classes").find_elements("tag name", "li")
        assert [row.text.splitlines() for row in rows] == [
            [found["name"], percent(found["probability"])] for found in answer["classes"]
        ]
        bars = self.browser.find_elements("class name", "bar")
        widths = [float(bar.get_attribute("style").split()[1].strip("%;")) for bar in bars]
        np.testing.assert_allclose(
            widths, [100 * found["probability"] for found in answer["classes"]], atol=0.051
        )


def test_a_photo_chosen_in_the_browser_is_shown_with_its_classes(server, browser, tmp_path):
    upload = encoded(photo(300, 200), "JPEG")
    (tmp_path / "photo.jpg").write_bytes(upload)
    (tmp_path / "notes.txt").write_text("not a photo")
    page = Page(browser, server)
    assert not page.part("answer").is_displayed()
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element == page.part("file")  # reached by keyboard
    page.part("file").send_keys(str(tmp_path / "photo.jpg"))
    page.assert_shows(server.post("/classify", upload)[1])
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    own = f"http://127.0.0.1:{server.port}/"
    assert {name for name in loaded if not name.startswith(("data:", "blob:"))} == {
        own + "classify"
    }
    assert browser.get_log("browser") == []  # the policy forbade nothing that the page needs

    page.part("file").send_keys(str(tmp_path / "notes.txt"))
    assert eventually(
        lambda: page.said() == "This file is not a JPEG, PNG or BMP photo. Convert it to JPEG."
    )
    assert not page.part("answer").is_displayed()


@pytest.mark.parametrize(
    ("kind", "carrier"), [("drop", "dataTransfer"), ("paste", "clipboardData")]
)
def test_a_photo_may_be_dropped_or_pasted(server, browser, kind, carrier):
    upload = encoded(photo(50, 60))
    page = Page(browser, server)
    browser.execute_script(
        """
        const [kind, carrier, data] = arguments;
        const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
        const held = new DataTransfer();
        held.items.add(new File([bytes], "photo.png"));
        const event = new Event(kind, {bubbles: true, cancelable: true});
        event[carrier] = held;
        document.getElementById("drop").dispatchEvent(event);
        """,
        *(kind, carrier, in_json(upload)["b64"]),
    )
    page.assert_shows(server.post("/classify", upload)[1])


def test_a_class_that_is_almost_impossible_has_less_than_a_tenth_of_a_percent(server, browser):
    page = Page(browser, server)
    shares = {"cat": 0.998, "dog": 0.0011, "eel": 0.0004, "fox": 0.0}
    classes = [{"name": name, "probability": share} for name, share in shares.items()]
    browser.execute_script(
        "show(arguments[0]); part('answer').hidden = false", {"seen": "data:,", "classes": classes}
    )
    rows = [row.text.split("\n") for row in page.part("classes").find_elements("tag name", "li")]
    assert rows == [["cat", "99.8%"], ["dog", "0.1%"], ["eel", "< 0.1%"], ["fox", "< 0.1%"]]


def test_the_page_says_so_if_the_server_is_gone_or_the_photo_too_large(
    saved_model, browser, tmp_path
):
    (tmp_path / "photo.png").write_bytes(encoded(photo(50, 60)))
    (tmp_path / "large.png").write_bytes(bytes(16 * MIB + 1))
    with running(saved_model, tmp_path / "log") as server:
        page = Page(browser, server)
    page.part("file").send_keys(str(tmp_path / "photo.png"))
    assert page.said() == "Cannot reach the server. Check that it is still running."
    page.part("file").send_keys(str(tmp_path / "large.png"))
    assert eventually(lambda: page.said() == "This photo is larger than 16 MiB.")


def test_the_page_fits_a_phone_and_follows_the_scheme(server, browser, tmp_path):
    (tmp_path / "photo.png").write_bytes(encoded(photo(50, 60)))
    backgrounds = set()
    for scheme in ("light", "dark"):
        show_as_on_a_phone(browser, 320, scheme)
        page = Page(browser, server)
        page.part("file").send_keys(str(tmp_path / "photo.png"))
        page.said()
        assert page_width(browser) == 320
        body = browser.find_element("tag name", "body")
        backgrounds.add(body.value_of_css_property("background-color"))
    assert len(backgrounds) == 2


def test_after_all_this_the_server_answers_and_had_nothing_to_complain_of(server, expected):
    images, _ = random_images(3)
    assert_rows(server.predict(instances=images.tolist())["predictions"], expected(images))
    assert server.log.read_text() == ""


def test_a_request_that_is_under_way_when_the_server_is_stopped_gets_its_answer(server):
    upload = encoded(photo(40, 40))
    with server.connect() as client:
        expect = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        client.sendall(POST + expect % len(upload))
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        server.process.send_signal(signal.SIGTERM)
        client.sendall(upload)
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
    assert server.process.wait(timeout=60) == 128 + signal.SIGTERM
    assert server.log.read_text() == ""


@pytest.fixture(scope="module")
def frugal(saved_model, tmp_path_factory) -> Iterator[Server]:
    """A server with little time and some thirty connections, for other machines too."""

    def allow_few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (130, 130))

    log = tmp_path_factory.mktemp("log") / "stderr"
    arguments = ("--host=0.0.0.0", f"--timeout={TIMEOUT}")
    with running(saved_model, log, *arguments, preexec_fn=allow_few_files) as server:
        yield server


def test_a_server_for_other_machines_knows_their_names_for_it(frugal):
    assert frugal.ask("GET", API, Host="192.0.2.1:80")[0] == 200
    assert frugal.ask("GET", API, Host=socket.gethostname())[0] == 200
    status, _, answer = frugal.ask("GET", API, Host="evil.example")
    assert status == 421
    assert "IP address, or start it with --host=evil.example." in json.loads(answer)["error"]


def test_a_server_for_other_machines_prints_an_address_for_them(frugal, server):
    address = f"http://{socket.gethostname()}:{frugal.port}"
    assert f"On other machines, open {address}." in frugal.greeting
    assert "other machines" not in server.greeting


def test_idle_connections_shut_nobody_out(frugal):
    with contextlib.ExitStack() as idle:
        for _ in range(100):
            idle.enter_context(frugal.connect())
        for _ in range(5):
            assert frugal.ask("GET", API)[0] == 200


def test_connections_of_one_address_do_not_replace_those_of_others(frugal):
    with contextlib.ExitStack() as opened:
        before = [
            http.client.HTTPConnection("127.0.0.1", frugal.port, timeout=60) for _ in range(9)
        ]
        for connection in before:
            opened.callback(connection.close)
            connection.auto_open = False  # It must stay the same connection.
            connection.connect()
        for _ in range(100):
            flood = socket.create_connection(
                ("127.0.0.1", frugal.port), timeout=60, source_address=("127.0.0.2", 0)
            )
            opened.enter_context(flood)
        for connection in before:
            connection.request("GET", API)
            assert connection.getresponse().status == 200


def test_connections_beyond_those_there_are_files_for_are_closed(frugal):
    clients = [frugal.connect() for _ in range(100)]
    answered = 0
    for client in clients:
        with contextlib.suppress(ConnectionError):
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answered += client.recv(15) == b"HTTP/1.1 200 OK"
    assert 0 < answered <= 30
    for client in clients:
        client.close()
    assert eventually(lambda: answers(frugal))


def test_slow_requests_are_cut_off_while_others_are_answered(frugal):
    starts = (
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
        POST + b"Content-Length: 1000\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n",
    )
    clients = {frugal.connect(): start for start in starts for _ in range(4)}
    for client, start in clients.items():
        with contextlib.suppress(ConnectionError):
            client.sendall(start)
    started = time.monotonic()
    while clients:
        assert time.monotonic() - started < 10 * TIMEOUT
        for client in list(clients):
            with contextlib.suppress(ConnectionError):
                client.send(b"1")  # each says a little all the time, but never all
                if not select.select([client], [], [], 0)[0] or client.recv(1000):
                    continue
            client.close()
            del clients[client]
        assert frugal.ask("GET", API)[0] == 200
        time.sleep(0.2)


def test_ctrl_c_ends_the_server_quietly(frugal):
    frugal.process.send_signal(signal.SIGINT)
    assert frugal.process.wait(timeout=60) == 128 + signal.SIGINT
    assert frugal.log.read_text() == ""


class Held:
    """A network whose answers wait until it is set free."""

    class_names = NAMES

    def __init__(self) -> None:
        import tensorflow as tf

        self.inputs = {"serving_default": tf.TensorSpec([None, 32, 32, 3], tf.uint8, "images")}
        self.calls = 0
        self.free = threading.Event()

    def __call__(self, images: np.ndarray, signature: str = "") -> dict[str, np.ndarray]:
        self.calls += 1
        assert self.free.wait(60)
        return {"probabilities": np.full([len(images), len(NAMES)], 1 / len(NAMES))}

    def describe_signatures(self) -> dict:
        return {}


@contextlib.contextmanager
def held(network: Held, timeout: float = 60) -> Iterator[tuple[Server, object]]:
    """Serves a held network in this process. Yields the server and its state."""
    from cifar10_resnet.serving import server as module

    sockets = bind_sockets(0, "127.0.0.1")
    ready, loops = threading.Event(), []

    async def serve() -> None:
        application = module._Application(network, "127.0.0.1", timeout)
        server = module._Server(application)
        server.add_sockets(sockets)
        stopped = asyncio.Event()
        loops.extend((asyncio.get_running_loop(), stopped, application))
        ready.set()
        await stopped.wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    loop, stopped, application = loops
    try:
        yield Server(None, sockets[0].getsockname()[1]), application
    finally:
        network.free.set()
        loop.call_soon_threadsafe(stopped.set)
        thread.join(60)


ONE_IMAGE = json.dumps({"instances": PIXELS}).encode()


def wait_in_line(application: object, light: int, heavy: int = 0) -> None:
    assert eventually(lambda: application.waiting == {"light": light, "heavy": heavy})


def test_a_full_queue_is_refused_with_the_time_to_come_back(monkeypatch):
    from cifar10_resnet.serving import server as module

    monkeypatch.setattr(module, "MAX_WAITING", 3)
    network = Held()
    with ThreadPoolExecutor(6) as clients, held(network) as (server, application):
        waiting = [clients.submit(server.post, PREDICT, ONE_IMAGE) for _ in range(6)]
        wait_in_line(application, light=3, heavy=3)
        status, headers, answer = server.ask("POST", PREDICT, ONE_IMAGE)
        assert status == 503
        assert headers["Retry-After"] == "1"
        assert "too many requests" in json.loads(answer)["error"]
        assert server.ask("GET", API)[0] == 200
        network.free.set()
        assert [each.result()[0] for each in waiting] == [200] * 6
        assert server.post(PREDICT, ONE_IMAGE)[0] == 200


def test_a_request_past_its_time_is_refused_and_its_work_is_dropped():
    network = Held()
    with ThreadPoolExecutor(5) as clients, held(network, timeout=1) as (server, application):
        waiting = [clients.submit(server.post, PREDICT, ONE_IMAGE) for _ in range(5)]
        for each in waiting:
            status, answer = each.result()
            assert status == 504
            assert "takes too long" in answer["error"]
        assert network.calls == 2
        wait_in_line(application, light=0)
        network.free.set()
        attempts = []
        assert eventually(
            lambda: attempts.append(server.post(PREDICT, ONE_IMAGE)[0]) or 200 in attempts
        )
        assert network.calls <= 2 + len(
            attempts
        )  # The three that waited in line are not among them.


def test_the_work_of_a_client_that_is_gone_is_dropped_at_once():
    network = Held()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with ThreadPoolExecutor(2) as clients, held(network) as (server, application):
        waiting = [clients.submit(server.post, PREDICT, ONE_IMAGE) for _ in range(2)]
        wait_in_line(application, light=2)
        for _ in range(3):
            with server.connect() as client:
                client.sendall(head % (PREDICT.encode(), len(ONE_IMAGE)) + ONE_IMAGE)
                wait_in_line(application, light=3)
            wait_in_line(application, light=2)
        network.free.set()
        assert [each.result()[0] for each in waiting] == [200, 200]
        assert network.calls == 2


def test_photos_of_many_pixels_wait_apart_from_the_other_requests():
    from cifar10_resnet.data import photos

    network = Held()
    network.free.set()
    with ThreadPoolExecutor(6) as clients, held(network) as (server, application):
        with photos.LARGE:  # They cannot be unpacked until the end of this block.
            waiting = [clients.submit(server.post, "/classify", HOSTILE) for _ in range(6)]
            wait_in_line(application, light=0, heavy=6)
            assert server.post(PREDICT, ONE_IMAGE)[0] == 200
        assert [each.result()[0] for each in waiting] == [200] * 6


def test_a_connection_is_not_replaced_while_its_request_is_answered(monkeypatch):
    from cifar10_resnet.serving import server as module

    monkeypatch.setattr(module, "MAX_CONNECTIONS", 8)
    network = Held()
    with ThreadPoolExecutor(1) as clients, held(network) as (server, application):
        waiting = clients.submit(server.post, PREDICT, ONE_IMAGE)
        wait_in_line(application, light=1)
        with contextlib.ExitStack() as idle:
            for _ in range(20):
                idle.enter_context(server.connect())
            assert server.ask("GET", API)[0] == 200
        network.free.set()
        assert waiting.result()[0] == 200


def answers(server: Server) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return server.ask("GET", API)[0] == 200
    return False


def eventually(happens: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not (happened := happens()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return happened


def refusal(*arguments: object, status: int = 1, **keywords) -> str:
    """The sentence in which the command refuses to start."""
    return run("serve", *arguments, status=status, **keywords).stderr


def test_what_cannot_be_served_is_refused_before_tensorflow_is_imported(saved_model, tmp_path):
    environment = without_tensorflow(tmp_path)

    def start(*arguments: object) -> str:
        return refusal(*arguments, env=environment)

    assert f"--saved_model={tmp_path} contains no SavedModel." in start(f"--saved_model={tmp_path}")
    assert "saved_model" in start()
    assert "num_layers" in start(f"--saved_model={saved_model}", "--num_layers=20")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} on " in start(f"--saved_model={saved_model}", f"--port={port}")
    for host in ("no.such.host.invalid", "192.168.1..5"):
        assert host in start(f"--saved_model={saved_model}", f"--host={host}")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("saved_model.pb", lambda content: content[:5000]),
        ("saved_model.pb", lambda content: b""),
        ("saved_model.pb", lambda content: b"text"),
        ("variables/variables.index", lambda content: b""),
        ("variables/variables.data-00000-of-00001", lambda content: content[:1000]),
        ("variables/variables.data-00000-of-00001", lambda content: bytes(len(content))),
    ],
)
def test_a_damaged_saved_model_is_refused(saved_model, tmp_path, file, damage):
    from cifar10_resnet.serving.saved_network import SavedNetwork

    folder = tmp_path / "damaged"
    shutil.copytree(saved_model, folder)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(UserError, match="cannot be loaded") as refused:
        SavedNetwork(str(folder))
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_another_programs_saved_model_is_refused(tmp_path):
    import tensorflow as tf

    from cifar10_resnet.serving.saved_network import SavedNetwork

    tf.saved_model.save(tf.Module(), tmp_path / "empty")
    save_network(tmp_path / "other", names=NAMES[:3])
    for name in ("empty", "other"):
        with pytest.raises(UserError, match="is another program's SavedModel"):
            SavedNetwork(str(tmp_path / name))
