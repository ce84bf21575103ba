"""What the download promises, kept against real archives, an unkind server and real kills."""

import dataclasses
import gzip
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import contents

import cifar10_download_and_extract as program
from cifar10_resnet.data import synthetic
from cifar10_resnet.formats import FORMATS, Archive, Digest

SCRIPT = Path(program.__file__)
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


# --- A server on loopback, with faults ------------------------------------------------------------


class Site:
    """Serves one archive. Each request takes the next fault; once they are used up, all is well."""

    def __init__(self) -> None:
        self.archive = GOOD
        self.etag = '"one"'
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
        asked, condition = handler.headers["Range"], handler.headers["If-Range"]
        size = len(self.archive)
        if asked is None or condition not in (None, self.etag):
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
        for name, value in {"ETag": self.etag, "Content-Length": str(len(body)), **headers}.items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Adds a fault: a fixed answer. A header given as "" is left out."""
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


@pytest.fixture(autouse=True)
def _no_pauses_and_no_proxy(monkeypatch):
    monkeypatch.setattr(program, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "*")


# --- Running the program --------------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def run(data_dir, capsys) -> Callable[..., str]:
    """Runs the program on `data_dir` and returns what it says; `fails` is for the sentence."""

    def run(*flags: str, status: int = 0) -> str:
        capsys.readouterr()
        assert program.main([f"--data_dir={data_dir}", *flags]) == status
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


# --- The plain way --------------------------------------------------------------------------------


def test_download_unpacks_every_file_and_names_the_next_command(get, data_dir):
    out = get()
    assert_complete(data_dir)
    assert f"python run_trainer.py --path={data_dir / FOLDER}" in out.splitlines()[-1]


def test_no_flags_fill_the_folder_in_the_current_directory(site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_official(monkeypatch, "cifar10", Archive(site.url, Digest("sha256", sha256(GOOD))))
    assert program.main([]) == 0
    assert_complete(tmp_path)
    assert f"--path={FOLDER}\n" in capsys.readouterr().out


def test_without_a_digest_a_mirror_must_have_the_official_archive(run, site, data_dir):
    err = run(f"--url={site.url}", status=1)
    assert sha256(GOOD) in err
    assert FORMATS["cifar10"].archive.digest.value in err
    assert "--sha256" in err
    assert os.listdir(data_dir) == []


def test_keep_archive_keeps_it_beside_the_data(get, data_dir):
    get("--keep_archive")
    assert_complete(data_dir, ARCHIVE)
    assert (data_dir / ARCHIVE).read_bytes() == GOOD


def test_archive_that_is_there_is_used_and_left_alone(get, site, data_dir):
    (data_dir / ARCHIVE).write_bytes(GOOD)
    get()
    assert_complete(data_dir, ARCHIVE)
    assert site.requests == []


def test_other_archive_in_its_place_is_refused_and_left_alone(get, data_dir):
    (data_dir / ARCHIVE).write_bytes(b"mine")
    err = get(status=1)
    assert sha256(b"mine") in err
    assert sha256(GOOD) in err
    assert (data_dir / ARCHIVE).read_bytes() == b"mine"


def test_file_url_works_like_any_mirror(run, tmp_path, data_dir):
    (tmp_path / "my archive.tgz").write_bytes(GOOD)
    run(f"--url={(tmp_path / 'my archive.tgz').as_uri()}", "--sha256", sha256(GOOD).upper())
    assert_complete(data_dir)


def test_extra_files_in_the_archive_are_left_in_it(run, tmp_path, data_dir):
    extras = [member(f"{FOLDER}/more.bin", b"x"), member("elsewhere/test_batch.bin", b"x" * 600)]
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(zipped(tar_of(extras + good_members())))
    run(f"--url={archive.as_uri()}", f"--sha256={sha256(archive.read_bytes())}")
    assert_complete(data_dir)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_common_kind_of_tar_is_read(run, tmp_path, data_dir, tar_format):
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w:gz", format=tar_format, pax_headers={"a": "b"}
    ) as tar:
        for info, data in good_members():
            info.name, info.mtime = f"./{info.name}", 0.5  # a half second needs a pax header
            if tar_format != tarfile.PAX_FORMAT:
                info.mtime = 0
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar.gz").write_bytes(buffer.getvalue())
    run(f"--url={(tmp_path / 'a.tar.gz').as_uri()}", f"--sha256={sha256(buffer.getvalue())}")
    assert_complete(data_dir)


# --- CIFAR-100 ------------------------------------------------------------------------------------


def cifar100_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for name in ("train.bin", "test.bin"):
        records = rng.integers(0, 256, (5, 3074), np.uint8)
        records[:, 0], records[:, 1] = rng.integers(0, 20, 5), rng.integers(0, 100, 5)
        files[name] = records.tobytes()
    for kind, count in (("coarse", 20), ("fine", 100)):
        files[f"{kind}_label_names.txt"] = "".join(f"{kind}{i}\n" for i in range(count)).encode()
    return files


def cifar100_archive(**changed: bytes) -> bytes:
    files = {**cifar100_files(), **{name.replace("_bin", ".bin"): d for name, d in changed.items()}}
    members = [member(f"cifar-100-binary/{name}", data) for name, data in files.items()]
    return zipped(tar_of([member("cifar-100-binary/", type=tarfile.DIRTYPE), *members]))


@pytest.fixture
def get_100(run, site, monkeypatch) -> Callable[..., str]:
    """Downloads CIFAR-100 from its official place, which is known by an MD5 alone."""
    site.archive = cifar100_archive()
    url = site.url.replace(ARCHIVE, "cifar-100-binary.tar.gz")
    digest = Digest("md5", hashlib.md5(site.archive).hexdigest())
    make_official(monkeypatch, "cifar100", Archive(url, digest))
    return lambda *flags, **kw: run("--dataset=cifar100", *flags, **kw)


def test_cifar100_has_a_folder_of_its_own_and_an_archive_verified_by_its_md5(
    get_100, site, data_dir
):
    out = get_100("--keep_archive")
    folder = data_dir / "cifar-100-binary"
    assert f"python run_trainer.py --path={folder}\n" in out
    assert sorted(os.listdir(data_dir)) == [folder.name, "cifar-100-binary.tar.gz"]
    found = contents(folder)
    manifest = found.pop(".sha256").decode()
    assert found == cifar100_files()
    assert f"archive with the MD5 {hashlib.md5(site.archive).hexdigest()}" in manifest
    assert f"{sha256(found['train.bin'])}  train.bin" in manifest
    before = tree(data_dir)
    assert "nothing to do" in get_100()
    assert tree(data_dir) == before


def test_cifar10_and_cifar100_lie_side_by_side(get, get_100, site, data_dir):
    get_100()
    site.archive = GOOD
    get()
    assert_complete(data_dir, "cifar-100-binary")


def test_another_archive_of_cifar100_is_refused_by_its_md5_unless_its_sha256_is_given(
    get_100, site, data_dir
):
    site.archive = cifar100_archive(test_bin=cifar100_files()["train.bin"])
    err = get_100(status=1)
    for digest in (hashlib.md5(site.archive).hexdigest(), f"--sha256={sha256(site.archive)}"):
        assert digest in err
    assert os.listdir(data_dir) == []
    get_100(f"--sha256={sha256(site.archive)}")
    assert contents(data_dir / "cifar-100-binary")["test.bin"] == cifar100_files()["train.bin"]


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (GOOD, "holds no cifar-100-binary/train.bin"),
        (cifar100_archive(test_bin=bytes(3073)), "no whole number of 3074-byte records"),
        (cifar100_archive(test_bin=bytes([20]) + bytes(3073)), "coarse label 20 in record 0"),
        (cifar100_archive(test_bin=bytes([19, 100]) + bytes(3072)), "fine label 100 in record 0"),
    ],
    ids=["CIFAR-10", "cut off", "coarse label", "fine label"],
)
def test_an_archive_of_something_else_is_not_unpacked_as_cifar100(
    run, tmp_path, data_dir, archive, reason
):
    (tmp_path / "a.tar.gz").write_bytes(archive)
    flags = (f"--url={(tmp_path / 'a.tar.gz').as_uri()}", f"--sha256={sha256(archive)}")
    assert reason in run("--dataset=cifar100", *flags, status=1)
    assert os.listdir(data_dir) == []


# --- A second run ---------------------------------------------------------------------------------


def test_second_run_verifies_and_touches_nothing(get, site, data_dir):
    get()
    before, asked = tree(data_dir), len(site.requests)
    assert "nothing to do" in get()
    assert tree(data_dir) == before
    assert len(site.requests) == asked


def test_manifest_is_what_sha256sum_writes(get, data_dir):
    get()
    lines = (data_dir / FOLDER / ".sha256").read_text().splitlines()
    assert lines[0].startswith("# ")
    files = {name: data for name, data in good_files().items() if name != "readme.html"}
    assert lines[1:] == [f"{sha256(data)}  {name}" for name, data in files.items()]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: spoil(folder / "data_batch_3.bin", 100, 7),
        lambda folder: spoil(folder / "data_batch_3.bin", 3073, 10),
        lambda folder: os.truncate(folder / "test_batch.bin", 3072),
        lambda folder: (folder / "batches.meta.txt").unlink(),
        lambda folder: (folder / ".sha256").write_text("nonsense"),
    ],
    ids=["pixel", "label", "length", "missing", "manifest"],
)
def test_damage_is_noticed_and_mended(get, data_dir, damage):
    get()
    folder = data_dir / FOLDER
    (folder / "data_batch_3.bin").write_bytes(good_files()["data_batch_3.bin"])
    damage(folder)
    assert "will be replaced" in get()
    assert_complete(data_dir)


def test_damaged_data_stays_until_the_new_is_whole(get, site, data_dir):
    get()
    spoil(data_dir / FOLDER / "data_batch_3.bin", 100, 7)
    before = tree(data_dir)
    site.answer(404)
    get(status=1)
    assert tree(data_dir) == before


def test_data_the_user_unpacked_himself_is_accepted(get, site, data_dir):
    get()
    (data_dir / FOLDER / ".sha256").unlink()
    (data_dir / FOLDER / "notes.txt").write_text("mine")
    before, asked = tree(data_dir), len(site.requests)
    assert "its structure was verified" in get()
    assert tree(data_dir) == before
    assert len(site.requests) == asked


@pytest.mark.parametrize("name", ["notes.txt", "test_batch.bin"])
def test_a_folder_with_things_of_the_users_is_never_replaced(get, site, data_dir, name):
    folder = data_dir / FOLDER
    (folder / name).mkdir(parents=True)
    (folder / "data_batch_1.bin").write_bytes(b"mine")
    before = tree(data_dir)
    assert name in get(status=1)
    assert tree(data_dir) == before
    assert site.requests == []


def test_a_file_or_a_dangling_link_in_the_folders_place_is_refused(get, data_dir):
    place = data_dir / FOLDER
    for make in (place.touch, lambda: place.symlink_to("nowhere")):
        make()
        assert "in the way" in get(status=1)
        assert os.listdir(data_dir) == [FOLDER]
        place.unlink()


def test_a_linked_folder_is_used_but_never_replaced(get, data_dir, tmp_path):
    get()
    folder, place = tmp_path / "big disk", data_dir / FOLDER
    place.rename(folder)
    place.symlink_to(folder)
    assert "nothing to do" in get()
    spoil(folder / "test_batch.bin", 0, 10)
    before = tree(tmp_path)
    assert "not a plain folder" in get(status=1)
    assert tree(tmp_path) == before


def test_an_explicit_digest_is_not_answered_with_other_data(get, run, data_dir):
    get()
    assert "other data" in run(f"--sha256={'0' * 64}", status=1)
    assert_complete(data_dir)


def test_two_runs_at_once_do_not_write_into_the_same_files(get, data_dir):
    with program.only_run_in(data_dir):
        assert "another run" in get(status=1)
    get()
    assert_complete(data_dir)


# --- Broken downloads -----------------------------------------------------------------------------


def test_broken_download_goes_on_where_it_stopped(get, site, data_dir):
    site.drop_after(HALF)
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


def test_more_breaks_than_tries_are_fine_while_there_is_progress(get, site, data_dir, monkeypatch):
    monkeypatch.setattr(program, "PROGRESS_BYTES", 1000)
    step = len(GOOD) // 8

    def a_little(handler: BaseHTTPRequestHandler) -> None:
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        span = f"bytes {start}-{start + step - 1}/{len(GOOD)}"
        site.respond(handler, 206, GOOD[start : start + step], **{"Content-Range": span})

    site.faults = [a_little] * 7
    get()
    assert len(site.requests) == 8 > program.TRIES
    assert_complete(data_dir)


def test_server_without_ranges_is_asked_again_from_zero(get, site, data_dir):
    site.drop_after(HALF)
    site.answer(200, GOOD)
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(
    "span",
    [
        f"bytes 0-{len(GOOD) - 1}/{len(GOOD)}",
        f"bytes {HALF + 1}-{len(GOOD) - 1}/{len(GOOD)}",
        f"bytes {HALF}-{len(GOOD)}/{len(GOOD)}",
        f"bytes {HALF}-{HALF - 1}/{len(GOOD)}",
        "bytes",
        "",
    ],
)
def test_another_range_than_asked_is_not_appended(get, site, data_dir, span):
    site.drop_after(HALF)
    site.answer(206, GOOD[HALF:], **{"Content-Range": span})
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-", None]


def test_an_archive_that_changes_on_the_server_is_not_spliced(get, site, data_dir):
    site.answer(200, b"old" * 1000, ETag='"old"', **{"Content-Length": "9000"})
    get()
    assert_complete(data_dir)
    assert len(site.requests) == 2


@pytest.mark.parametrize("stale", [b"x" * 100, b"x" * (len(GOOD) + 100), b"x" * len(GOOD)])
def test_stale_part_of_another_archive_is_started_again(get, data_dir, stale):
    (data_dir / PART).write_bytes(stale)
    get()
    assert_complete(data_dir)


def test_part_that_was_complete_needs_no_server(get, site, data_dir):
    (data_dir / PART).write_bytes(GOOD)
    get()
    assert_complete(data_dir)
    assert site.requests == []


def test_length_announced_too_long_ends_with_the_right_archive(get, site, data_dir):
    site.answer(200, GOOD, **{"Content-Length": str(len(GOOD) + 100)})
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={len(GOOD)}-"]


def test_length_announced_too_short_is_caught_by_the_digest(get, site, data_dir):
    site.answer(200, GOOD, **{"Content-Length": str(len(GOOD) - 100)})
    assert sha256(GOOD[:-100]) in get(status=1)
    assert os.listdir(data_dir) == []


def test_bytes_beyond_the_announced_length_are_not_stored(get, site, data_dir):
    site.answer(200, GOOD + b"junk" * 1000, **{"Content-Length": str(len(GOOD))})
    get("--keep_archive")
    assert (data_dir / ARCHIVE).read_bytes() == GOOD


def test_download_without_an_announced_length_works(get, site, data_dir):
    site.answer(200, GOOD, **{"Content-Length": ""})
    get()
    assert_complete(data_dir)


def test_broken_chunked_download_goes_on_where_it_stopped(get, site, data_dir):
    body = f"{len(GOOD):x}\r\n".encode() + GOOD[:HALF]
    # Handlers speak HTTP/1.0, whose answers cannot be chunked: this one is written by hand.
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    site.faults.append(lambda handler: handler.wfile.write(head + body))
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


def test_more_bytes_than_any_archive_has_are_refused(get, site, data_dir, monkeypatch):
    monkeypatch.setattr(program, "MAX_ARCHIVE_BYTES", len(GOOD) - 1)
    assert "announces" in get(status=1)
    site.answer(200, GOOD, **{"Content-Length": ""})
    assert "sends more than" in get(status=1)
    assert os.listdir(data_dir) == []


def test_silent_server_is_given_up_after_the_timeout(get, site, data_dir):
    for _ in range(program.TRIES):
        site.stall_after(0)
    assert "nothing arrived" in get("--timeout=0.1", status=1)
    assert FOLDER not in os.listdir(data_dir)


def test_server_that_drips_is_given_up_like_a_silent_one(get, site, data_dir, monkeypatch):
    monkeypatch.setattr(program, "TRIES", 1)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        site.respond(handler, 200, b"", **{"Content-Length": str(len(GOOD))})
        for byte in GOOD:
            handler.wfile.write(bytes([byte]))
            if site.closing.wait(0.02):
                break

    site.faults.append(drip)
    assert "bytes arrive in a second" in get("--timeout=1", status=1)
    assert FOLDER not in os.listdir(data_dir)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"


@pytest.mark.parametrize(
    ("start", "rest"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (CHUNKED + b"1;", b"a"),
        (CHUNKED + b"0\r\n", b"X: a\r\n"),
    ],
    ids=["a header", "answers before the answer", "a chunk's length", "headers after the archive"],
)
def test_server_that_never_comes_to_an_end_of_something_is_given_up(
    get, site, data_dir, monkeypatch, start, rest
):
    monkeypatch.setattr(program, "TRIES", 1)

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        while not site.closing.wait(0.02):
            handler.wfile.write(rest)

    site.faults.append(endless)
    assert "bytes arrive in a second" in get("--timeout=1", status=1)
    assert FOLDER not in os.listdir(data_dir)


def test_server_that_stalls_midway_is_asked_again(get, site, data_dir):
    site.stall_after(HALF)
    get("--timeout=2")
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_of_the_server_is_waited_out(get, site, data_dir, status):
    site.answer(status)
    get()
    assert_complete(data_dir)


def test_tries_are_bounded_and_what_came_is_kept(get, site, data_dir):
    site.drop_after(HALF)
    for _ in range(program.TRIES):
        site.answer(500)
    err = get(status=1)
    assert "500" in err
    assert f"{HALF} bytes in" in err
    assert len(site.requests) == program.TRIES
    assert (data_dir / PART).read_bytes() == GOOD[:HALF]
    site.faults.clear()
    get()
    assert_complete(data_dir)


def test_pauses_between_tries_grow(get, site, monkeypatch):
    pauses = []
    monkeypatch.setattr(program, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(program.time, "sleep", pauses.append)
    for _ in range(program.TRIES - 1):
        site.answer(500)
    get()
    assert pauses == [1, 2, 4, 8]


def test_missing_archive_is_not_asked_for_again(get, site, data_dir):
    site.answer(404)
    assert "404" in get(status=1)
    assert len(site.requests) == 1
    assert os.listdir(data_dir) == []


def test_answer_that_is_not_http_ends_in_a_sentence(get, site):
    for _ in range(program.TRIES):
        site.faults.append(lambda handler: handler.wfile.write(b"\x1b[31mSSH-2.0\r\n\r\n"))
    assert "\x1b" not in get(status=1)


def test_nobody_listening_ends_in_a_sentence(run, site, data_dir):
    url, _ = site.url, site.server.socket.close()
    assert "cannot download" in run(f"--url={url}", status=1)
    assert os.listdir(data_dir) == []


# --- Redirects and mirrors ------------------------------------------------------------------------


def test_redirects_are_followed(get, site, data_dir):
    site.redirect("/elsewhere/a", site.url)
    get()
    assert_complete(data_dir)


def test_redirects_without_end_are_refused(get, site, data_dir):
    site.redirect(*(f"/{i}" for i in range(100)))
    assert "redirects" in get(status=1)
    assert len(site.requests) <= program.WebRedirects.max_redirections + 1
    assert os.listdir(data_dir) == []


def test_redirect_away_from_the_web_is_refused_even_to_the_right_archive(
    get, site, tmp_path, data_dir
):
    (tmp_path / "a.tar.gz").write_bytes(GOOD)
    for target in ((tmp_path / "a.tar.gz").as_uri(), "ftp://127.0.0.1/a", "data:,a"):
        site.redirect(target)
        assert "redirects" in get(status=1)
        assert os.listdir(data_dir) == []


def test_mirrors_are_tried_in_order_until_one_has_the_archive(run, site, data_dir):
    site.answer(404)
    site.answer(200, b"<html>log in to this network</html>")
    urls = [f"--url={site.url}?{i}" for i in range(4)]
    run(*urls, f"--sha256={sha256(GOOD)}")
    assert [path[-1] for path, _ in site.requests] == ["0", "1", "2"]
    assert_complete(data_dir)


def test_bad_first_half_from_one_mirror_does_not_spoil_the_next(run, site, data_dir, monkeypatch):
    monkeypatch.setattr(program, "TRIES", 1)
    site.answer(200, b"x" * HALF, ETag="", **{"Content-Length": str(len(GOOD))})
    run(f"--url={site.url}?0", f"--url={site.url}?1", f"--sha256={sha256(GOOD)}")
    assert_complete(data_dir)


# --- Hostile and damaged archives -----------------------------------------------------------------


def with_member(name: str, data: bytes = b"", **fields: object) -> bytes:
    return zipped(tar_of([member(name, data, **fields), *good_members()]))


def without(name: str) -> bytes:
    return zipped(tar_of([m for m in good_members() if not m[0].name.endswith(name)]))


def replacing(name: str, data: bytes) -> bytes:
    members = [m for m in good_members() if not m[0].name.endswith(name)]
    return zipped(tar_of([*members, member(f"{FOLDER}/{name}", data)]))


# Zeros may follow a tar's end, so that nothing but the bound stops this: 640 MiB in under 1 MiB.
BOMB = zipped(tar_of(good_members())) + zipped(bytes(16 << 20)) * 40

HOSTILE = {
    "absolute path": (with_member("/tmp/evil", b"x"), "leads out"),
    "parent path": (with_member("../evil", b"x"), "leads out"),
    "parent path inside": (with_member(f"{FOLDER}/../../evil", b"x"), "leads out"),
    "line breaks in a name": (with_member("../a\nb\x1b[31m", b"x"), "leads out"),
    "symbolic link": (with_member(f"{FOLDER}/a", type=tarfile.SYMTYPE, linkname="/"), "link"),
    "link for a folder": (with_member(FOLDER, type=tarfile.SYMTYPE, linkname="/tmp"), "link"),
    "hard link": (with_member(f"{FOLDER}/a", type=tarfile.LNKTYPE, linkname="/etc/x"), "link"),
    "character device": (with_member(f"{FOLDER}/a", type=tarfile.CHRTYPE), "a device"),
    "block device": (with_member(f"{FOLDER}/a", type=tarfile.BLKTYPE), "a device"),
    "FIFO": (with_member(f"{FOLDER}/test_batch.bin", type=tarfile.FIFOTYPE), "a FIFO"),
    "sparse file": (with_member(f"{FOLDER}/a", type=tarfile.GNUTYPE_SPARSE), "not a regular file"),
    "duplicate": (with_member(f"{FOLDER}/test_batch.bin", batch(9)), "twice"),
    "batch too large": (with_member(f"{FOLDER}/test_batch.bin", size=3073 << 17), "has 402784256"),
    "meta too large": (replacing("batches.meta.txt", b"a" * 65537), "has 65537 bytes"),
    "huge tar note": (with_member("a", type=tarfile.XHDTYPE, size=1 << 40), "a size of"),
    "negative size": (with_member("a", size=-512), "a size of -512"),
    "empty batch": (replacing("test_batch.bin", b""), "is empty"),
    "names of other classes": (replacing("batches.meta.txt", b"cat\ndog\n"), "names 2 classes"),
    "half a record": (replacing("test_batch.bin", batch(6)[:-1]), "no whole number"),
    "label out of range": (replacing("data_batch_2.bin", b"\x0a" + bytes(3072)), "label 10"),
    "missing batch": (without("data_batch_4.bin"), "holds no"),
    "missing meta": (without("batches.meta.txt"), "holds no"),
    "gzip bomb": (BOMB, "unpacks to more"),
    "truncated gzip": (GOOD[:-5000], "damaged"),
    "missing gzip checksum": (GOOD[:-4], "damaged"),
    "wrong gzip checksum": (GOOD[:-8] + bytes(8), "damaged"),
    "bytes after the gzip": (GOOD + b"junk", "damaged"),
    "bytes after the tar": (zipped(tar_of(good_members()) + b"junk"), "follows the end"),
    "truncated tar": (zipped(tar_of(good_members())[:9000]), "middle of a file"),
    "tar that lies about a size": (
        zipped(tar_of([member(f"{FOLDER}/test_batch.bin", batch(1, 1), size=3073 * 50)])),
        "middle of a file",
    ),
    "header of noise": (zipped(bytes(range(256)) * 4), "damaged"),
    "not a gzip": (tar_of(good_members()), "damaged"),
    "not an archive": (b"<html>not found</html>", "damaged"),
    "empty": (b"", "holds no"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_and_leaves_nothing(run, tmp_path, data_dir, case):
    archive, reason = HOSTILE[case]
    (tmp_path / "a.tar.gz").write_bytes(archive)
    before = tree(tmp_path).keys()
    url = (tmp_path / "a.tar.gz").as_uri()
    err = run(f"--url={url}", f"--sha256={sha256(archive)}", status=1)
    assert reason in err
    assert "\x1b" not in err
    assert tree(tmp_path).keys() == before
    assert not Path("/tmp/evil").exists()


ENDLESS = """
import sys
import cifar10_download_and_extract as program
program.MAX_ARCHIVE_BYTES = 64 << 20
sys.exit(program.main(sys.argv[1:]))
"""


def test_memory_and_disk_stay_bounded_whatever_is_sent_or_unpacked(site, tmp_path):
    def endless(handler: BaseHTTPRequestHandler) -> None:
        site.respond(handler, 200, b"", **{"Content-Length": ""})
        while not site.closing.is_set():
            handler.wfile.write(bytes(1 << 20))

    def peak(archive: bytes) -> float:
        """The most memory that a download of it takes, in MiB."""
        site.archive = archive
        folder = tmp_path / sha256(archive)[:8]
        command = [sys.executable, "-c", ENDLESS, f"--data_dir={folder}", f"--url={site.url}"]
        command.append(f"--sha256={sha256(archive)}")
        process = subprocess.Popen(command, cwd=SCRIPT.parent, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == (archive != GOOD)
        assert os.listdir(folder) == ([FOLDER] if archive == GOOD else [])
        return usage.ru_maxrss / 1024

    good = peak(GOOD)
    assert peak(BOMB) < good + 16
    site.faults.append(endless)
    assert peak(b"never sent") < good + 16


# --- Interruptions --------------------------------------------------------------------------------


def start(data_dir: Path, site: Site) -> subprocess.Popen:
    """The real program, at the moment when half of the archive is on the disk."""
    command = [sys.executable, SCRIPT, f"--data_dir={data_dir}", "--url", site.url]
    command += ["--sha256", sha256(GOOD)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while program.size_of(data_dir / PART) < HALF:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_killed_download_goes_on_where_it_stopped(get, site, data_dir):
    site.stall_after(HALF)
    with start(data_dir, site) as process:
        process.kill()
    assert os.listdir(data_dir) == [PART]
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_download_ends_in_a_sentence_and_can_go_on(get, site, data_dir, signum, status):
    site.stall_after(HALF)
    with start(data_dir, site) as process:
        process.send_signal(signum)
        err = process.communicate(timeout=30)[1]
    assert process.returncode == status
    assert err.count("\n") == 1
    assert "run the same command again" in err
    assert os.listdir(data_dir) == [PART]
    get()
    assert_complete(data_dir)


def test_stopped_unpacking_leaves_nothing_that_looks_finished(get, data_dir, monkeypatch):
    with monkeypatch.context() as patch:

        def stop(*arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(program, "check_folder", stop)
        get(status=130)
    assert os.listdir(data_dir) == [PART]
    get()
    assert_complete(data_dir)


def test_leftovers_of_a_killed_unpacking_are_cleared(get, data_dir):
    (data_dir / f"{FOLDER}.part").mkdir()
    (data_dir / f"{FOLDER}.part" / "test_batch.bin").write_bytes(b"half")
    get()
    assert_complete(data_dir)


# --- The synthetic stand-in -----------------------------------------------------------------------

SMALL = ("--synthetic", "--synthetic_train_images=20", "--synthetic_test_images", "7")


def test_synthetic_files_hold_the_generated_images_as_planes(run, data_dir):
    out = run(*SMALL, "--seed=3")
    assert f"python run_trainer.py --path={data_dir / FOLDER}" in out
    files = contents(data_dir / FOLDER)
    assert sorted(files) == sorted([".sha256", *FORMATS["cifar10"].files])
    train = b"".join(files[f"data_batch_{i}.bin"] for i in range(1, 6))
    for split, count, data in (("train", 20, train), ("test", 7, files["test_batch.bin"])):
        records = np.frombuffer(data, np.uint8).reshape(count, 3073)
        images, labels = synthetic.make_split(split, count, 3)
        np.testing.assert_array_equal(records[:, 0], labels)
        planes = records[:, 1:].reshape(count, 3, 32, 32)
        np.testing.assert_array_equal(planes.transpose(0, 2, 3, 1), images)
    assert {len(files[f"data_batch_{i}.bin"]) for i in range(1, 6)} == {4 * 3073}
    assert files["batches.meta.txt"].decode().split() == list(synthetic.CLASS_NAMES)


def test_synthetic_data_depends_on_the_seed_and_on_nothing_else(tmp_path):
    made = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert program.main([f"--data_dir={tmp_path / place}", *SMALL, f"--seed={seed}"]) == 0
        made.append(contents(tmp_path / place / FOLDER))
    assert made[0] == made[1]
    assert made[0]["data_batch_1.bin"] != made[2]["data_batch_1.bin"]


def test_same_synthetic_data_is_not_written_again(run, data_dir):
    run(*SMALL)
    before = tree(data_dir)
    assert "nothing to do" in run(*SMALL)
    assert tree(data_dir) == before


def test_damaged_synthetic_data_is_mended(run, data_dir):
    run(*SMALL)
    whole = contents(data_dir / FOLDER)
    spoil(data_dir / FOLDER / "data_batch_1.bin", 5, 1)
    spoil(data_dir / FOLDER / "data_batch_1.bin", 6, 2)
    run(*SMALL)
    assert contents(data_dir / FOLDER) == whole


def test_synthetic_data_never_overwrites_other_data(get, run, data_dir):
    get()
    assert "other data" in run(*SMALL, status=1)
    (data_dir / FOLDER / ".sha256").unlink()
    (data_dir / FOLDER / "test_batch.bin").unlink()
    assert "other data" in run(*SMALL, status=1)
    assert (data_dir / FOLDER / "data_batch_1.bin").read_bytes() == batch(1)


def test_other_synthetic_data_is_not_taken_for_the_one_asked_for(run, data_dir):
    run(*SMALL)
    before = tree(data_dir)
    assert "seed 0" in run(*SMALL, "--seed=1", status=1)
    assert tree(data_dir) == before


def test_synthetic_data_is_never_taken_for_cifar10(run, data_dir):
    run(*SMALL)
    before = tree(data_dir)
    assert "synthetic stand-in" in run("--url=file:///nowhere", status=1)
    assert tree(data_dir) == before


# --- Flags and messages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--url=ftp://example.org/a"],
        ["--url=/a/path"],
        ["--url=http://"],
        ["--url=http://[::1/a"],
        ["--url=http://example.org/a b"],
        ["--url=file://far.example.org/a"],
        ["--sha256=abc"],
        ["--timeout=0"],
        ["--timeout=nan"],
        ["--timeout=soon"],
        ["--synthetic_train_images=12"],
        ["--synthetic_train_images=0"],
        ["--synthetic_test_images=many"],
        ["--synthetic_test_images=21839"],
        ["--seed=-1"],
        ["--seed=3"],
        ["--synthetic_train_images=20"],
        ["--synthetic", "--keep_archive"],
        ["--synthetic", "--dataset=cifar100"],
        ["--dataset=pictures"],
        ["--synth"],
        ["somewhere"],
    ],
    ids=" ".join,
)
def test_wrong_flag_ends_in_one_line_that_names_it(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.main(flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert flags[0].partition("=")[0] in error
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_made_ends_in_a_sentence(run, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in run(f"--data_dir={tmp_path / 'file' / 'data'}", status=1)


def test_help_needs_neither_tensorflow_nor_numpy(tmp_path):
    for name in ("tensorflow", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, SCRIPT, "--help"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert result.stderr == ""
    for flag in ("--data_dir", "--url", "--sha256", "--keep_archive", "--synthetic", "--seed"):
        assert flag in result.stdout


def test_error_of_the_real_program_is_one_line_and_status_1(tmp_path):
    command = [sys.executable, SCRIPT, f"--data_dir={tmp_path}", "--url=file:///nowhere/a.tar.gz"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("cifar10_download_and_extract.py: error: ")


def test_a_run_whose_output_nobody_reads_ends_quietly(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, SCRIPT, f"--data_dir={tmp_path}", *SMALL]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_progress_line_says_how_far_how_fast_and_how_long():
    text = program.progress_text(42_500_000, 170_000_000, 1_500_000)
    assert text == "[#####...............]  25%  42.5 of 170.0 MB  1.5 MB/s  1:25 left"
    assert program.progress_text(42_500_000, None, 0.0) == "42.5 MB  0.0 MB/s"


def test_terminal_gets_one_live_line_and_a_pipe_gets_plain_ones(get, monkeypatch, data_dir):
    plain = get("--keep_archive")
    assert "\r" not in plain
    assert "100%" in plain
    for path in (data_dir / FOLDER).iterdir():
        path.unlink()
    (data_dir / ARCHIVE).unlink()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    live = get()
    assert "\r[" in live
    assert re.search(r"100%.*left *\n", live)
