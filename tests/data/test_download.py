"""Downloads that break, servers that mislead or never end, redirects and mirrors."""

import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.request
from http.server import BaseHTTPRequestHandler

import pytest
from downloads import ARCHIVE, FOLDER, GOOD, HALF, PART, assert_complete, sha256

from cifar10_resnet.data import download

# --- Broken downloads -----------------------------------------------------------------------------


def test_broken_download_resumes_where_it_stopped(get, site, data_dir):
    site.drop_after(HALF)
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


def test_more_breaks_than_tries_are_fine_while_there_is_progress(get, site, data_dir, monkeypatch):
    monkeypatch.setattr(download, "PROGRESS_BYTES", 1000)
    step = len(GOOD) // 8

    def a_little(handler: BaseHTTPRequestHandler) -> None:
        start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        span = f"bytes {start}-{start + step - 1}/{len(GOOD)}"
        site.respond(handler, 206, GOOD[start : start + step], **{"Content-Range": span})

    site.faults = [a_little] * 7
    get()
    assert len(site.requests) == 8 > download.TRIES
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
    site.answer(200, b"old" * 1000, **{"Content-Length": "9000"})
    get()
    assert_complete(data_dir)


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


def test_broken_chunked_download_resumes_where_it_stopped(get, site, data_dir):
    body = f"{len(GOOD):x}\r\n".encode() + GOOD[:HALF]
    # Handlers speak HTTP/1.0, whose answers cannot be chunked: this one is written by hand.
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    site.faults.append(lambda handler: handler.wfile.write(head + body))
    get()
    assert_complete(data_dir)
    assert site.ranges() == [None, f"bytes={HALF}-"]


def test_more_bytes_than_any_archive_has_are_refused(get, site, data_dir, monkeypatch):
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", len(GOOD) - 1)
    assert "announces" in get(status=1)
    site.answer(200, GOOD, **{"Content-Length": ""})
    assert "sends more than" in get(status=1)
    assert os.listdir(data_dir) == []


def test_silent_server_is_given_up_after_the_timeout(get, site, data_dir):
    for _ in range(download.TRIES):
        site.stall_after(0)
    assert "nothing arrived" in get("--timeout=0.1", status=1)
    assert FOLDER not in os.listdir(data_dir)


def test_server_that_drips_is_given_up_like_a_silent_one(get, site, data_dir, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        site.respond(handler, 200, b"", **{"Content-Length": str(len(GOOD))})
        for byte in GOOD:
            handler.wfile.write(bytes([byte]))
            if site.closing.wait(0.02):
                break

    site.faults.append(drip)
    assert "bytes arrive in a second" in get("--timeout=1", status=1)
    assert FOLDER not in os.listdir(data_dir)


def test_server_that_is_slow_but_not_too_slow_is_waited_for(get, site, data_dir):
    def steady(handler: BaseHTTPRequestHandler) -> None:
        site.respond(handler, 200, b"", **{"Content-Length": str(len(GOOD))})
        for start in range(0, len(GOOD), len(GOOD) // 20):
            handler.wfile.write(GOOD[start : start + len(GOOD) // 20])
            time.sleep(0.05)

    site.faults.append(steady)
    get("--timeout=0.5")  # It takes a second.
    assert_complete(data_dir)
    assert len(site.requests) == 1


def test_a_deadline_that_is_over_leaves_no_alarm_behind():
    before = signal.getsignal(signal.SIGALRM)
    with download.deadline(60) as put_off:
        put_off(1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == before


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
    monkeypatch.setattr(download, "TRIES", 1)

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
    for _ in range(download.TRIES):
        site.answer(500)
    err = get(status=1)
    assert "500" in err
    assert f"{HALF} bytes in" in err
    assert len(site.requests) == download.TRIES
    assert (data_dir / PART).read_bytes() == GOOD[:HALF]
    site.faults.clear()
    get()
    assert_complete(data_dir)


def test_pauses_between_tries_grow(get, site, monkeypatch):
    waits = []
    monkeypatch.setattr(download, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(download.time, "sleep", waits.append)
    for _ in range(download.TRIES - 1):
        site.answer(500)
    get()
    assert waits == [1, 2, 4, 8]


def test_missing_archive_is_not_asked_for_again(get, site, data_dir):
    site.answer(404)
    assert "404" in get(status=1)
    assert len(site.requests) == 1
    assert os.listdir(data_dir) == []


def test_answer_that_is_not_http_ends_with_a_one_line_error(get, site):
    for _ in range(download.TRIES):
        site.faults.append(lambda handler: handler.wfile.write(b"\x1b[31mSSH-2.0\r\n\r\n"))
    assert "\x1b" not in get(status=1)


def test_nobody_listening_ends_with_a_one_line_error(run, site, data_dir):
    url, _ = site.url, site.server.socket.close()
    assert "cannot be downloaded" in run(f"--url={url}", status=1)
    assert os.listdir(data_dir) == []


# --- Redirects and mirrors ------------------------------------------------------------------------


def test_redirects_are_followed(get, site, data_dir):
    site.redirect("/elsewhere/a", site.url)
    get()
    assert_complete(data_dir)


def test_redirects_that_each_take_their_time_are_given_up(get, site, data_dir, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)

    def slow_redirect(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        site.respond(handler, 302, b"", Location=f"/{len(site.requests)}")

    site.faults = [slow_redirect] * 10
    assert "bytes arrive in a second" in get("--timeout=0.5", status=1)
    assert len(site.requests) < 5


def test_redirects_without_end_are_refused(get, site, data_dir):
    site.redirect(*(f"/{i}" for i in range(100)))
    assert "redirects" in get(status=1)
    assert len(site.requests) <= urllib.request.HTTPRedirectHandler.max_redirections + 1
    assert os.listdir(data_dir) == []


def test_redirect_away_from_the_web_is_refused_even_to_the_right_archive(
    get, site, tmp_path, data_dir
):
    (tmp_path / "a.tar.gz").write_bytes(GOOD)
    for target in ((tmp_path / "a.tar.gz").as_uri(), "ftp://127.0.0.1/a", "data:,a"):
        site.redirect(target)
        assert "redirects" in get(status=1)
        assert os.listdir(data_dir) == []


def test_a_server_whose_certificate_nobody_vouches_for_gets_no_request(
    run, site, data_dir, tmp_path, monkeypatch
):
    if not shutil.which("openssl"):
        pytest.skip("no openssl is installed, which makes the certificate")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem -out"
    subprocess.run([*make.split(), "certificate.pem"], cwd=tmp_path, check=True)
    monkeypatch.setattr(download, "TRIES", 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    url = site.url.replace("http://127.0.0.1", "https://localhost")
    assert "CERTIFICATE_VERIFY_FAILED" in run(f"--url={url}", f"--sha256={sha256(GOOD)}", status=1)
    assert site.requests == []


def test_mirrors_are_tried_in_order_until_one_has_the_archive(run, site, data_dir):
    site.answer(404)
    site.answer(200, b"<html>log in to this network</html>")
    urls = [f"--url={site.url}?{i}" for i in range(4)]
    run(*urls, f"--sha256={sha256(GOOD)}")
    assert [path[-1] for path, _ in site.requests] == ["0", "1", "2"]
    assert_complete(data_dir)


def test_bad_first_half_from_one_mirror_does_not_spoil_the_next(run, site, data_dir):
    site.answer(200, b"x" * HALF, **{"Content-Length": str(len(GOOD))})
    for _ in range(download.TRIES - 1):
        site.answer(500)
    run(f"--url={site.url}?0", f"--url={site.url}?1", f"--sha256={sha256(GOOD)}")
    assert_complete(data_dir)
