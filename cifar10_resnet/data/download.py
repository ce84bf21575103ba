"""Downloads an archive with the right digest, from the first address that has it.

Every download ends, whatever a server sends: it is bounded in bytes, tries and time.
"""

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from pathlib import Path
from urllib import request as web
from urllib.error import HTTPError

from cifar10_resnet import storage
from cifar10_resnet.errors import UserError, printable
from cifar10_resnet.formats import Digest
from cifar10_resnet.terminal import LiveLine, transfer

MAX_ARCHIVE_BYTES = 1 << 30
TRIES = 5
RETRY_SECONDS = 1.0  # before the second try, and doubled before each further try
PROGRESS_BYTES = 1 << 20  # A long download may break more often, if each try gets this much.
SLOWEST = 1000  # bytes a second

OPENER = web.OpenerDirector()  # Without FTP, a redirect to it fails like one to a file.
for handler in (
    *(web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler, web.FileHandler),
    *(web.HTTPRedirectHandler, web.HTTPErrorProcessor, web.HTTPDefaultErrorHandler),
):
    OPENER.add_handler(handler())


class TryAgain(Exception):
    """A problem with the download that may pass."""


class Refused(Exception):
    """A lasting problem: more requests to this address are useless."""


def obtain(part: Path, digest: Digest, urls: Sequence[str], timeout: float, title: str) -> None:
    """Downloads the archive with this digest to `part`, from the first address that has it."""
    if part.exists() and digest_of(part, digest) == digest:
        return
    problems = []
    for url in urls:
        print(f"downloading {url}", flush=True)
        try:
            return Mirror(url, digest, timeout).bring(part)
        except Refused as problem:
            print(f"{url}: {problem}", flush=True)
            problems.append(f"{url}: {problem}")
    size = storage.size(part)
    kept = f" (the {size} bytes in {part} are kept)" if size else ""
    raise UserError(
        f"{title} cannot be downloaded: {'; '.join(problems)}. Check the network and run the same "
        f"command again{kept}, use a mirror with --url, or use --synthetic."
    )


@dataclass
class Mirror:
    """An address that should have the archive with this digest."""

    url: str
    digest: Digest
    timeout: float

    def bring(self, part: Path) -> None:
        """Completes `part` in a bounded number of tries. Waits twice as long after each."""
        furthest, tries = storage.size(part), 0
        while True:
            try:
                return self._fetch(part)
            except TryAgain as problem:
                if storage.size(part) >= furthest + PROGRESS_BYTES:
                    furthest, tries = storage.size(part), 0
                tries += 1
                if tries == TRIES:
                    raise Refused(f"{problem} (tried {tries} times without progress)") from None
                wait = RETRY_SECONDS * 2 ** (tries - 1)
                print(f"{problem}; trying again in {wait:g} seconds", flush=True)
                time.sleep(wait)

    def _fetch(self, part: Path) -> None:
        with (
            deadline(1.5 * self.timeout) as put_off,  # The socket's timeout ends a silence earlier.
            contextlib.closing(self._open(storage.size(part))) as answer,
        ):
            begin, end, total = span_of(answer, part)
            if (total or 0) > MAX_ARCHIVE_BYTES:
                raise Refused(f"it announces {total} bytes, more than {MAX_ARCHIVE_BYTES}")
            with open(part, "ab" if begin else "wb") as file, LiveLine(plain=True) as line:
                have, began = begin, time.monotonic()
                while chunk := self._read(answer, (end or MAX_ARCHIVE_BYTES + 1) - have):
                    file.write(chunk)
                    file.flush()  # A slow server's bytes are kept as they come.
                    have += len(chunk)
                    put_off(len(chunk))
                    rate = (have - begin) / max(time.monotonic() - began, 1e-6)
                    line.update(*transfer(have, total, rate))
        if have > MAX_ARCHIVE_BYTES:
            part.unlink()
            raise Refused(f"it sends more than {MAX_ARCHIVE_BYTES} bytes")
        if total and have < total:
            raise TryAgain(f"the connection ended after {have} of {total} bytes")
        actual = digest_of(part, self.digest)
        if actual == self.digest:
            return
        sha256 = storage.digest(part)
        part.unlink()
        if begin:  # Two versions of an archive were spliced together, or the first part was wrong.
            raise TryAgain("the resumed archive is not the expected one, so it starts from zero")
        raise Refused(
            f"its archive has the {actual}, not the expected {self.digest.value} "
            f"(use --sha256={sha256} if you want that archive)"
        )

    def _read(self, answer, limit: int) -> bytes:
        try:
            return answer.read1(min(limit, storage.CHUNK_BYTES))
        except (OSError, HTTPException) as error:
            raise TryAgain(describe(error)) from error

    def _open(self, have: int):
        request = web.Request(self.url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            return OPENER.open(request, timeout=self.timeout)
        except HTTPError as answer:
            return answer  # `span_of` judges its status.
        except (OSError, HTTPException, ValueError) as error:
            # Waiting can fix a problem of the network, but not of a file or an address.
            lasting = request.type == "file" or isinstance(error, InvalidURL | ValueError)
            raise (Refused if lasting else TryAgain)(describe(error)) from error


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[Callable[[int], None]]:
    """Raises TryAgain in the block after `seconds`. Bytes that arrive put this off.

    A socket's timeout ends a silence, but not a header that arrives byte by byte. This works only
    in the main thread, where Python handles signals.
    """

    def give_up(number: int, frame: object) -> None:
        raise TryAgain(f"fewer than {SLOWEST} bytes arrive in a second")

    def put_off(count: int) -> None:
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        signal.setitimer(signal.ITIMER_REAL, min(left + count / SLOWEST, seconds))

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield put_off
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def digest_of(path: Path, expected: Digest) -> Digest:
    """Returns a file's digest, by the algorithm of the expected one."""
    return Digest(expected.algorithm, storage.digest(path, expected.algorithm))


def span_of(answer, part: Path) -> tuple[int, int | None, int | None]:
    """Returns where an answer's bytes begin and end, and the size of the whole archive."""
    have, status = storage.size(part), answer.status or 200  # A file's answer has no status.
    length, span = (answer.headers.get(f"Content-{name}", "") for name in ("Length", "Range"))
    if status == 200:
        end = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        return 0, end, end
    if status == 416 and span == f"bytes */{have}":  # The earlier try received everything.
        return have, have, have
    if found := re.fullmatch("bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", span):
        first, last, total = map(int, found.groups())
        if status == 206 and have == first <= last < total:
            return first, last + 1, total
    if status in (206, 416):
        storage.remove(part)
        raise TryAgain(f"the server cannot resume at byte {have}, so it starts from zero")
    if 300 <= status < 400:
        raise Refused("it redirects without end, or to something that is neither http nor https")
    passing = status in (408, 425, 429) or status >= 500
    raise (TryAgain if passing else Refused)(f"the server answers with HTTP status {status}")


def describe(error: Exception) -> str:
    """Returns a network error in a few words, whatever the server put into it."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "nothing arrived within the --timeout"
    return printable(" ".join(str(reason).split()) or type(reason).__name__)[:200]
