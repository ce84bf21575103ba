"""For the tests of the download: archives, a server with faults, and runs of the script."""

import dataclasses
import gzip
import hashlib
import os
import re
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import cifar10_download_and_extract as script
from cifar10_resnet.cli import app
from cifar10_resnet.data import download
from cifar10_resnet.formats import FORMATS, Archive

SCRIPT = Path(script.__file__)
FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
PART = ARCHIVE + ".part"
META = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n"


# --- Archives -------------------------------------------------------------------------------------


def batch(seed: int, records: int = 3) -> bytes:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (records, 3073), np.uint8)
    data[:, 0] = rng.integers(0, 10, records)
    return data.tobytes()


def good_files() -> dict[str, bytes]:
    files = {f"data_batch_{i}.bin": batch(i) for i in range(1, 6)}
    return {**files, "test_batch.bin": batch(6), "batches.meta.txt": META, "readme.html": b"<p>"}


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def good_members() -> list[tuple[tarfile.TarInfo, bytes]]:
    files = [member(f"{FOLDER}/{name}", data) for name, data in good_files().items()]
    return [member(f"{FOLDER}/", type=tarfile.DIRTYPE), *files]


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar of exactly these headers and bytes, also where the two contradict each other."""
    blocks = [i.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) for i, data in members]
    return b"".join(blocks) + bytes(1024)


def zipped(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=1, mtime=0)


GOOD = zipped(tar_of(good_members()))
HALF = len(GOOD) // 2


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_official(monkeypatch: pytest.MonkeyPatch, dataset: str, archive: Archive) -> None:
    monkeypatch.setitem(FORMATS, dataset, dataclasses.replace(FORMATS[dataset], archive=archive))


def with_member(name: str, data: bytes = b"", **fields: object) -> bytes:
    return zipped(tar_of([member(name, data, **fields), *good_members()]))


def without(name: str) -> bytes:
    return zipped(tar_of([m for m in good_members() if not m[0].name.endswith(name)]))


def replacing(name: str, data: bytes) -> bytes:
    members = [m for m in good_members() if not m[0].name.endswith(name)]
    return zipped(tar_of([*members, member(f"{FOLDER}/{name}", data)]))


# --- A server on loopback, with faults ------------------------------------------------------------


class Site:
    """Serves one archive. Each request takes the next fault; once they are used up, all is well."""

    def __init__(self) -> None:
        self.archive = GOOD
        self.faults: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append((self.path, self.headers["Range"]))
                answer = site.faults.pop(0) if site.faults else site.serve
                answer(self)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                pass  # of clients that go away, and of faults that were asked for

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/{ARCHIVE}"

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.requests]

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers["Range"]
        size = len(self.archive)
        if asked is None:
            return self.respond(handler, 200, self.archive)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        if start >= size:
            return self.respond(handler, 416, b"", **{"Content-Range": f"bytes */{size}"})
        span = f"bytes {start}-{size - 1}/{size}"
        return self.respond(handler, 206, self.archive[start:], **{"Content-Range": span})

    def respond(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str
    ) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Adds a fault: a fixed answer. A header given as "" is not sent."""
        self.faults.append(lambda handler: self.respond(handler, status, body, **headers))

    def drop_after(self, count: int) -> None:
        self.answer(200, GOOD[:count], **{"Content-Length": str(len(GOOD))})

    def stall_after(self, count: int) -> None:
        def fault(handler: BaseHTTPRequestHandler) -> None:
            self.respond(handler, 200, GOOD[:count], **{"Content-Length": str(len(GOOD))})
            self.closing.wait()

        self.faults.append(fault)

    def redirect(self, *targets: str) -> None:
        for target in targets:
            self.answer(302, Location=target)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


# --- Running the script ---------------------------------------------------------------------------


def run_script(*flags: str) -> int:
    """Runs the script in this process, where tests can change it; returns its exit status."""
    with (
        mock.patch.object(sys, "argv", [str(SCRIPT), *flags]),
        pytest.raises(SystemExit) as ended,
    ):
        app.run(script.main, script.Settings)
    return ended.value.code


@pytest.fixture
def data_dir(tmp_path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def run(data_dir, capsys, monkeypatch) -> Callable[..., str]:
    """Runs the script on `data_dir`; returns its output, or the sentence in which it fails."""
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "*")

    def run(*flags: str, status: int = 0) -> str:
        capsys.readouterr()
        assert run_script(f"--data_dir={data_dir}", *flags) == status
        out, err = capsys.readouterr()
        if status == 0:
            assert err == ""
            return out
        assert err.count("\n") == 1, "an error is one line"
        assert err.endswith(".\n")
        return err

    return run


@pytest.fixture
def get(run, site) -> Callable[..., str]:
    """Downloads from the site, whose archive is the one that is expected."""
    return lambda *flags, **kw: run(f"--url={site.url}", f"--sha256={sha256(GOOD)}", *flags, **kw)


def tree(path: Path) -> dict[str, tuple[int, int]]:
    """Every path below, with what changes when somebody writes to it."""
    paths = sorted(path.rglob("*"))
    return {str(p.relative_to(path)): (p.lstat().st_mtime_ns, p.lstat().st_ino) for p in paths}


def assert_complete(data_dir: Path, *beside: str) -> None:
    assert sorted(os.listdir(data_dir)) == sorted([FOLDER, *beside])
    folder = data_dir / FOLDER
    found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".sha256"}
    assert found == good_files()


def spoil(path: Path, offset: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] = value
    path.write_bytes(data)
