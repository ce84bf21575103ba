"""Downloads CIFAR-10 or CIFAR-100, verifies it and unpacks it.

    python cifar10_download_and_extract.py                      # into ./cifar-10-batches-bin
    python cifar10_download_and_extract.py --data_dir=~/data    # into ~/data/cifar-10-batches-bin
    python cifar10_download_and_extract.py --dataset=cifar100   # into ./cifar-100-binary
    python cifar10_download_and_extract.py --synthetic          # a small stand-in, no download

A broken download goes on where it stopped, and the data folder appears only once it is complete.
"""

import argparse
import contextlib
import fcntl
import functools
import gzip
import hashlib
import http.client
import io
import os
import re
import shutil
import signal
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from cifar10_resnet import errors
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.formats import FORMATS, IMAGE_BYTES, Digest, Format
from cifar10_resnet.terminal import command

README_FILE = "readme.html"  # CIFAR-10's archive has one
MANIFEST = ".sha256"

CHUNK_BYTES = 1 << 20
CHUNK_RECORDS = 256

MAX_ARCHIVE_BYTES = 1 << 30
MAX_UNPACKED_BYTES = 512 << 20
MAX_BATCH_BYTES = 256 << 20
MAX_TEXT_BYTES = 64 << 10

MAX_SYNTHETIC_BATCH = 20_000  # images in one file of the stand-in

TRIES = 5
RETRY_SECONDS = 1.0  # before the second try; doubled before each further one
SLOWEST = 1000  # bytes of the archive a second; below it, a try is given up as if silent
# A try that gets this much further is progress: a long download may break more often than TRIES.
PROGRESS_BYTES = 1 << 20


class TryAgain(Exception):
    """The download broke in a way that may pass."""


class Refused(Exception):
    """This address will not give the archive, however often it is asked."""


class BadData(Exception):
    """The data is not in a data set's binary format. The text says where."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the program as Ctrl-C does but with an exit status of its own."""


# --- Progress -------------------------------------------------------------------------------------


def progress_text(done: int, total: int | None, rate: float) -> str:
    """One line that says how far a download is."""
    speed = f"{rate / 1e6:.1f} MB/s"
    if not total:
        return f"{done / 1e6:.1f} MB  {speed}"
    share = min(done / total, 1.0)
    bar = "#" * int(20 * share)
    minutes, seconds = divmod(int((total - done) / rate) if rate > 0 else 0, 60)
    return (
        f"[{bar:.<20}] {share:4.0%}  {done / 1e6:.1f} of {total / 1e6:.1f} MB  {speed}"
        f"  {minutes}:{seconds:02d} left"
    )


class Progress:
    """A live line on a terminal, a plain line every tenth of the way elsewhere."""

    def __init__(self, done: int, total: int | None) -> None:
        self.start, self.total = done, total
        self.began = time.monotonic()
        self.live = sys.stdout.isatty()
        self.step = max(1, (total or 10 * (16 << 20)) // 10)
        self.next_line = done + self.step
        self.next_time = 0.0
        self.text = ""

    def show(self, done: int) -> None:
        now = time.monotonic()
        rate = (done - self.start) / max(now - self.began, 1e-6)
        self.text = progress_text(done, self.total, rate)
        if self.live and now >= self.next_time:
            self.next_time = now + 0.1
            self._redraw()
        elif not self.live and done >= self.next_line:
            self.next_line = done + self.step
            print(self.text, flush=True)

    def end(self) -> None:
        if self.live and self.text:
            self._redraw()
            print(flush=True)

    def _redraw(self) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + self.text[:width].ljust(width), end="", flush=True)


# --- Download -------------------------------------------------------------------------------------


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a bounded number of redirects; the base class would also follow one to ftp."""

    max_redirections = 10

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class TooSlow(OSError):
    """A connection goes on, but not the download."""


class Wire(io.RawIOBase):
    """What a server sends, up to a moment that is put off only as the archive itself arrives.

    A socket's timeout ends a silence. It would wait for ever for a header of which now and then a
    byte comes, or for the last of headers without end.
    """

    def __init__(self, raw: io.RawIOBase, timeout: float) -> None:
        self.raw, self.timeout = raw, timeout
        self.wait()

    def wait(self) -> None:
        self.due = time.monotonic() + self.timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        if time.monotonic() > self.due:
            raise TooSlow(f"fewer than {SLOWEST} bytes arrive in a second")
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class Response(http.client.HTTPResponse):
    def __init__(self, sock, *args, **kwargs) -> None:
        super().__init__(sock, *args, **kwargs)
        self.wire = Wire(self.fp.detach(), sock.gettimeout())
        self.fp = io.BufferedReader(self.wire)
        self.arrived = 0

    def read1(self, n: int = -1) -> bytes:
        chunk = super().read1(n)
        self.arrived += len(chunk)
        if self.arrived >= SLOWEST * self.wire.timeout:
            self.arrived = 0
            self.wire.wait()
        return chunk


class Connection(http.client.HTTPConnection):
    response_class = Response


class SecureConnection(http.client.HTTPSConnection):
    response_class = Response


class Web(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def http_open(self, req):
        return self.do_open(Connection, req)

    def https_open(self, req):
        return self.do_open(SecureConnection, req)


def digest_of(path: Path, algorithm: str) -> Digest:
    digest = hashlib.new(algorithm, usedforsecurity=algorithm != "md5")
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return Digest(algorithm, digest.hexdigest())


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def describe(error: Exception) -> str:
    """A network error in a few words, on one line whatever the server put into it."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "nothing arrived within the --timeout"
    text = " ".join(str(reason).split()) or type(reason).__name__
    return errors.printable(text)[:200]


class Mirror:
    """One address of the archive, and what is known of the archive there between two tries."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout
        self.version = ""  # an ETag or a date, so that two versions are never spliced together

    def fetch(self, part: Path) -> None:
        """One try: completes `part`, from where it stands if the server can go on there."""
        have = size_of(part)
        with self._open(have) as response:
            status = response.status or 200  # a file:// address has none
            if status == 416 and response.headers.get("Content-Range") == f"bytes */{have}":
                return  # the earlier try had it all
            if status == 200:
                have = 0
                end = total = announced_length(response)
            elif status == 206 and (span := content_range(response)) and span[0] == have:
                _, end, total = span
            elif status in (206, 416):
                part.unlink(missing_ok=True)
                raise TryAgain(f"the server cannot go on at byte {have}, so it starts from zero")
            else:
                raise Refused(f"the server answers with HTTP status {status}")
            if total and total > MAX_ARCHIVE_BYTES:
                raise Refused(f"it announces {total} bytes, more than {MAX_ARCHIVE_BYTES}")
            self.version = version_of(response)
            copy_body(response, part, have, end, total)
        if total and size_of(part) < total:
            raise TryAgain(f"the connection ended after {size_of(part)} of {total} bytes")

    def _open(self, have: int):
        request = urllib.request.Request(self.url)
        if have:
            request.add_header("Range", f"bytes={have}-")
            if self.version:
                request.add_header("If-Range", self.version)
        try:
            opener = urllib.request.build_opener(Web, WebRedirects)
            return opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                return error
            error.close()
            if 300 <= error.code < 400:
                reason = "it redirects without end, or to something that is neither http nor https"
                raise Refused(reason) from error
            passing = error.code in (408, 425, 429) or error.code >= 500
            kind = TryAgain if passing else Refused
            raise kind(f"the server answers with HTTP status {error.code}") from error
        except (http.client.InvalidURL, ValueError) as error:
            raise Refused(describe(error)) from error
        except (OSError, http.client.HTTPException) as error:
            # What is wrong with a file will not pass by waiting, as a network's trouble may.
            kind = Refused if request.type == "file" else TryAgain
            raise kind(describe(error)) from error


def announced_length(response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def content_range(response) -> tuple[int, int, int] | None:
    """First byte, end and total of a 206 answer, or None where they make no sense."""
    header = response.headers.get("Content-Range", "")
    match = re.fullmatch("bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", header)
    if match is None:
        return None
    first, last, total = map(int, match.groups())
    return (first, last + 1, total) if first <= last < total else None


def version_of(response) -> str:
    etag = response.headers.get("ETag", "")
    weak = etag.startswith("W/")  # If-Range takes only an ETag that promises the same bytes
    return etag if etag and not weak else response.headers.get("Last-Modified", "")


def copy_body(response, part: Path, have: int, end: int | None, total: int | None) -> None:
    """Appends the body to `part`, never past `end`, and leaves on disk what came before a break."""
    progress = Progress(have, total)
    try:
        with open(part, "ab" if have else "wb") as file:
            while end is None or have < end:
                try:
                    # read1 returns what is there: a slow server's bytes are on disk as they come.
                    chunk = response.read1(min(CHUNK_BYTES, (end or MAX_ARCHIVE_BYTES + 1) - have))
                except (OSError, http.client.HTTPException) as error:
                    raise TryAgain(describe(error)) from error
                if not chunk:
                    break
                file.write(chunk)
                file.flush()
                have += len(chunk)
                if have > MAX_ARCHIVE_BYTES:
                    part.unlink()
                    raise Refused(f"it sends more than {MAX_ARCHIVE_BYTES} bytes")
                progress.show(have)
    finally:
        progress.end()


def download(mirror: Mirror, part: Path) -> None:
    """Completes `part` from one mirror, in a bounded number of tries with growing pauses."""
    furthest, tries = size_of(part), 0
    while True:
        try:
            return mirror.fetch(part)
        except TryAgain as problem:
            if size_of(part) >= furthest + PROGRESS_BYTES:
                furthest, tries = size_of(part), 0
            tries += 1
            if tries == TRIES:
                raise Refused(f"{problem} (tried {tries} times without getting further)") from None
            pause = RETRY_SECONDS * 2 ** (tries - 1)
            print(f"{problem}; trying again in {pause:g} seconds", flush=True)
            time.sleep(pause)


def download_verified(mirror: Mirror, part: Path, digest: Digest) -> None:
    resumed = size_of(part) > 0
    download(mirror, part)
    actual = digest_of(part, digest.algorithm)
    if actual == digest:
        return
    refusal = Refused(
        f"its archive has the {actual}, not the expected {digest.value} "
        f"(give --sha256={digest_of(part, 'sha256').value} if that archive is meant)"
    )
    part.unlink()
    if not resumed:
        raise refusal
    print("the resumed archive is not the expected one, so it starts from zero", flush=True)
    download_verified(mirror, part, digest)


def obtain_archive(flags: argparse.Namespace, part: Path, digest: Digest) -> None:
    """Brings the archive with this digest to `part`, from the first mirror that has it."""
    if part.exists() and digest_of(part, digest.algorithm) == digest:
        return
    problems = []
    for url in flags.url or [flags.file_format.archive.url]:
        print(f"downloading {url}", flush=True)
        try:
            return download_verified(Mirror(url, flags.timeout), part, digest)
        except Refused as problem:
            print(f"{url}: {problem}", flush=True)
            problems.append(f"{url}: {problem}")
    kept = f" (the {size_of(part)} bytes in {part} are kept)" if size_of(part) else ""
    raise errors.UserError(
        f"cannot download {flags.file_format.title}: {'; '.join(problems)}; check the address and "
        f"the network and run the same command again{kept}, name a mirror with --url, or make the "
        "generated stand-in with --synthetic."
    )


# --- Unpack ---------------------------------------------------------------------------------------


class BoundedReader:
    """Reads a decompressed stream and stops one that grows beyond any of these archives."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.left = stream, MAX_UNPACKED_BYTES

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise BadData(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        return data

    def copy(self, size: int, sink: BinaryIO | None) -> None:
        """Moves exactly `size` bytes to `sink`, or past them."""
        while size:
            chunk = self.read(min(size, CHUNK_BYTES))
            if not chunk:
                raise BadData("it ends in the middle of a file")
            if sink:
                sink.write(chunk)
            size -= len(chunk)


# What tar puts before a member to describe it further. Nothing in it is needed or believed here.
TAR_NOTES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
TAR_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
TAR_OTHERS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
}


def check_member(member: tarfile.TarInfo) -> None:
    name = ascii(member.name)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise BadData(f"it holds {name}, a path that leads out of the folder")
    if member.type not in (*TAR_FILES, *TAR_NOTES, tarfile.DIRTYPE):
        kind = TAR_OTHERS.get(member.type, "not a regular file")
        raise BadData(f"it holds {name}, which is {kind}")
    if member.size < 0 or (member.type in TAR_NOTES and member.size > MAX_TEXT_BYTES):
        raise BadData(f"it gives {name} a size of {member.size} bytes")


def unpack_member(
    member: tarfile.TarInfo, stream: BoundedReader, folder: Path, file_format: Format
) -> str | None:
    """Writes the member if it is one of the data set's files, else skips it; returns which."""
    if member.type == tarfile.DIRTYPE:
        return None  # no bytes follow a folder's header
    place, _, name = member.name.removeprefix("./").rpartition("/")
    is_ours = place == file_format.folder and name in (*file_format.files, README_FILE)
    wanted = is_ours and member.type in TAR_FILES
    limit = MAX_BATCH_BYTES if name.endswith(".bin") else MAX_TEXT_BYTES
    if not wanted:
        stream.copy(member.size, None)
    elif member.size > limit:
        raise BadData(f"{name} has {member.size} bytes, where up to {limit} are expected")
    elif (folder / name).exists():
        raise BadData(f"it holds {name} twice")
    else:
        with open(folder / name, "xb") as file:
            stream.copy(member.size, file)
    stream.read(-member.size % tarfile.BLOCKSIZE)
    return name if wanted else None


def unpack_tar(stream: BoundedReader, folder: Path, file_format: Format) -> None:
    # tarfile's own reader follows long names and sparse maps, and its extractors write what the
    # archive says. Here only the data set's own names can ever be written.
    unpacked = set()
    while (block := stream.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        check_member(member)
        unpacked.add(unpack_member(member, stream, folder, file_format))
    while rest := stream.read(CHUNK_BYTES):  # to the end, where gzip keeps its checksum
        if rest.strip(b"\0"):
            raise BadData("something follows the end of its tar")
    if missing := [name for name in file_format.files if name not in unpacked]:
        raise BadData(f"it holds no {file_format.folder}/{missing[0]}")


def unpack(archive: Path, file_format: Format, folder: Path) -> None:
    """Writes the data set's files from a .tar.gz into `folder`, and nothing else anywhere."""
    try:
        with gzip.open(archive) as stream:
            unpack_tar(BoundedReader(stream), folder, file_format)
    except (gzip.BadGzipFile, zlib.error, EOFError, tarfile.TarError) as error:
        raise BadData(f"it is damaged or not a .tar.gz at all ({describe(error)})") from error


# --- The data folder ------------------------------------------------------------------------------


def check_folder(folder: Path, file_format: Format) -> dict[str, str]:
    """Checks each file of a data folder, its size and labels; returns their SHA-256 digests."""
    for name in file_format.files:
        if not (folder / name).is_file():
            raise BadData(f"{name} is missing")
    try:
        counts = [len(file_format.read_names(str(folder), label)) for label in file_format.labels]
    except errors.UserError as error:
        raise BadData(str(error).rstrip(".")) from error
    return {name: check_file(folder / name, file_format, counts) for name in file_format.files}


def check_file(path: Path, file_format: Format, class_counts: Sequence[int]) -> str:
    has_records = path.suffix == ".bin"
    if has_records and (problem := file_format.size_problem(path.name, path.stat().st_size)):
        raise BadData(problem)
    digest, record = hashlib.sha256(), 0
    with open(path, "rb") as file:
        # whole records, so that every chunk starts with a label
        while chunk := file.read(CHUNK_RECORDS * file_format.record_bytes):
            digest.update(chunk)
            if has_records:
                columns = [chunk[i :: file_format.record_bytes] for i in range(len(class_counts))]
                if problem := file_format.label_problem(path.name, columns, class_counts, record):
                    raise BadData(problem)
                record += CHUNK_RECORDS
    return digest.hexdigest()


def write_manifest(folder: Path, source: str, digests: dict[str, str]) -> None:
    """Records where the data is from and its digests, in a form that `sha256sum -c` reads too."""
    lines = [f"# {source}", *(f"{digest}  {name}" for name, digest in digests.items())]
    (folder / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> tuple[str, dict[str, str]] | None:
    """The source and the digests of a data folder, or None where the user unpacked it himself."""
    if not (folder / MANIFEST).exists():
        return None
    with open(folder / MANIFEST, encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_TEXT_BYTES)
    source = re.match("# (.*)", text)
    entries = re.findall("^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)
    return source[1] if source else "", {name: digest for digest, name in entries}


def verify(folder: Path, file_format: Format, recorded: dict[str, str] | None) -> None:
    """Raises BadData unless every file is whole and, where digests are recorded, unchanged."""
    for name, digest in check_folder(folder, file_format).items():
        if recorded is not None and recorded.get(name) != digest:
            raise BadData(f"{name} differs from its SHA-256 in {MANIFEST}")


def own_files(file_format: Format) -> tuple[str, ...]:
    # The manifest comes last: a folder being emptied never passes for one without a manifest.
    return (*file_format.files, README_FILE, MANIFEST)


def refuse_foreign_files(folder: Path, file_format: Format) -> None:
    """Raises UserError where replacing the folder would delete something of the user's."""
    if folder.is_symlink() or not folder.is_dir():
        raise errors.UserError(
            f"{folder} is in the way and not a plain folder: move it away or give another "
            "--data_dir, then run the same command again."
        )
    for entry in folder.iterdir():
        if entry.name not in own_files(file_format) or (entry.is_dir() and not entry.is_symlink()):
            raise errors.UserError(
                f"{folder} holds no complete {file_format.title}, but it holds {entry.name!r}, "
                "which is not this program's to delete: move that folder away or give another "
                "--data_dir."
            )


def remove_folder(folder: Path, file_format: Format) -> None:
    if os.path.lexists(folder):
        refuse_foreign_files(folder, file_format)
        for name in own_files(file_format):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a crash cannot leave a hollow one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(
    folder: Path, file_format: Format, source: str, fill: Callable[[Path], None]
) -> None:
    """Makes the data folder with `fill`, beside its place, and moves it there once it is whole."""
    part = folder.with_name(f"{folder.name}.part")
    remove_folder(part, file_format)
    part.mkdir()
    try:
        fill(part)
        write_manifest(part, source, check_folder(part, file_format))
        for path in (*part.iterdir(), part):
            sync(path)
        remove_folder(folder, file_format)
        part.rename(folder)
        sync(folder.parent)
    finally:
        remove_folder(part, file_format)


def write_synthetic(folder: Path, train_images: int, test_images: int, seed: int) -> None:
    """Writes the stand-in in CIFAR-10's format: a label, then the red, green and blue planes."""
    # Only here, so that the download runs where nothing but Python is installed yet.
    import numpy as np

    from cifar10_resnet.data import synthetic

    file_format = FORMATS["cifar10"]
    for split, num_images in (("train", train_images), ("test", test_images)):
        names = file_format.split_files(split)
        images, labels = synthetic.make_split(split, num_images, seed)
        planes = images.transpose(0, 3, 1, 2).reshape(num_images, IMAGE_BYTES)
        records = np.concatenate([labels[:, np.newaxis], planes], axis=1)
        for name, batch in zip(names, np.split(records, len(names)), strict=True):
            (folder / name).write_bytes(batch.tobytes())
    meta = "".join(f"{name}\n" for name in synthetic.CLASS_NAMES)
    # CIFAR-10's ends in an empty line too
    (folder / file_format.labels[0].names_file).write_bytes(f"{meta}\n".encode())


# --- The program ----------------------------------------------------------------------------------


def address(text: str) -> str:
    scheme = text.partition(":")[0].lower()
    parts = urllib.parse.urlsplit(text)
    whole = parts.path and not parts.netloc if scheme == "file" else parts.hostname
    if scheme not in ("http", "https", "file") or not whole or re.search("[^!-~]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no http://, https:// or file:/// address")
    return text


def sha256(text: str) -> Digest:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no SHA-256, which has 64 hexadecimal digits")
    return Digest("sha256", text.lower())


def seconds(text: str) -> float:
    if not 0 < float(text) <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 3600")
    return float(text)


def whole_number(least: int, most: int, step: int = 1) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or int(text) not in range(least, most + 1, step):
            kind = f"a multiple of {step}" if step > 1 else "a whole number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {least} to {most}")
        return int(text)

    return convert


class FlagParser(argparse.ArgumentParser):
    """One whose complaints are sentences, as those of the other programs."""

    def error(self, message: str) -> NoReturn:
        raise errors.UserError(f"{message}; --help lists the flags.")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = FlagParser(
        description="Puts CIFAR-10, CIFAR-100 or a synthetic stand-in where run_trainer.py looks.",
        allow_abbrev=False,
    )
    train = whole_number(5, 5 * MAX_SYNTHETIC_BATCH, step=5)
    test = whole_number(1, MAX_SYNTHETIC_BATCH)
    seed = whole_number(0, 2**32 - 1)
    official = {name: file_format for name, file_format in FORMATS.items() if file_format.archive}
    folders = " or ".join(file_format.folder for file_format in official.values())
    add = parser.add_argument
    add("--dataset", choices=official, default="cifar10", help="data set (default: %(default)s)")
    add("--data_dir", metavar="DIR", default=".", help=f"gets {folders} (default: %(default)s)")
    add(
        "--url",
        action="append",
        type=address,
        help="address, repeated for mirrors (default: official)",
    )
    add("--sha256", type=sha256, help="expected of the archive (default: the official digest)")
    add("--keep_archive", action="store_true", help="keep the archive beside the data")
    add(
        "--timeout",
        metavar="S",
        type=seconds,
        default=30.0,
        help="seconds to wait for a silent server (default: %(default)g)",
    )
    add("--synthetic", action="store_true", help="write a generated stand-in; download nothing")
    of_stand_in = {
        "synthetic_train_images": (train, 10000, "number of synthetic training images "),
        "synthetic_test_images": (test, 2000, "number of synthetic test images "),
        "seed": (seed, 0, "random seed of the synthetic images "),
    }
    for name, (convert, default, what) in of_stand_in.items():
        add(f"--{name}", metavar="N", type=convert, help=f"{what}(default: {default})")
    flags = parser.parse_args(argv)
    for name, (_, default, _) in of_stand_in.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
        elif not flags.synthetic:
            parser.error(f"--{name} is of the generated stand-in: give --synthetic too")
    if flags.synthetic and (flags.url or flags.sha256 or flags.keep_archive):
        parser.error("--synthetic downloads nothing: leave out --url, --sha256 and --keep_archive")
    if flags.synthetic and flags.dataset != "cifar10":
        parser.error("--synthetic has ten classes and stands in for CIFAR-10: leave out --dataset")
    flags.file_format = official[flags.dataset]
    flags.data_dir = Path(flags.data_dir).expanduser()
    return flags


def synthetic_source(flags: argparse.Namespace) -> str:
    return (
        f"synthetic stand-in: {flags.synthetic_train_images} training images, "
        f"{flags.synthetic_test_images} test images, seed {flags.seed}"
    )


def archive_source(digest: Digest) -> str:
    return f"archive with the {digest}"


def refuse_other_data(folder: Path, source: str, flags: argparse.Namespace) -> None:
    """Raises UserError where the folder's data is not what was asked for."""
    if flags.synthetic:
        other = source != synthetic_source(flags) and any(folder.iterdir())
    elif source.startswith("synthetic"):
        other = True
    else:
        other = source and flags.sha256 and source != archive_source(flags.sha256)
    if other:
        raise errors.UserError(
            f"{folder} already holds other data ({source or 'of unknown origin'}): "
            "give another --data_dir, or move that folder away first."
        )


def already_there(folder: Path, flags: argparse.Namespace) -> bool:
    """Whether the wanted data is there and whole. Damaged data must be safe to replace."""
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        refuse_foreign_files(folder, flags.file_format)
    source, recorded = read_manifest(folder) or ("", None)
    refuse_other_data(folder, source, flags)
    try:
        verify(folder, flags.file_format, recorded)
    except BadData as problem:
        refuse_foreign_files(folder, flags.file_format)
        print(f"{folder} is not complete ({problem}) and will be replaced", flush=True)
        return False
    how = "its structure was" if recorded is None else "its structure and digests were"
    print(f"{folder} is already there and {how} verified, so there is nothing to do.")
    return True


def fetch_and_unpack(folder: Path, flags: argparse.Namespace) -> None:
    file_format = flags.file_format
    digest = flags.sha256 or file_format.archive.digest
    kept = flags.data_dir / file_format.archive.file
    part = kept.with_name(f"{kept.name}.part")
    # An archive that was there before this run is the user's: it is read and left alone.
    archive = kept if kept.exists() else part
    if archive == part:
        obtain_archive(flags, part, digest)
    elif (actual := digest_of(kept, digest.algorithm)) != digest:
        raise errors.UserError(
            f"{kept} has the {actual}, not the expected {digest.value}: move it away to download "
            "the archive again, or give its own SHA-256 as --sha256 if that archive is meant."
        )
    print(f"unpacking {archive}", flush=True)
    try:
        fill = functools.partial(unpack, archive, file_format)
        write_folder(folder, file_format, archive_source(digest), fill)
    except BadData as problem:
        part.unlink(missing_ok=True)
        raise errors.UserError(
            f"cannot unpack {archive}: {problem}; nothing of it was kept, so give the --url and "
            f"--sha256 of an archive that holds {file_format.title}'s binary version."
        ) from None
    if archive == part:
        part.replace(kept) if flags.keep_archive else part.unlink()


@contextlib.contextmanager
def only_run_in(data_dir: Path) -> Iterator[None]:
    """Keeps a second run out of the same folder, where it would write into the same files."""
    data_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(data_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.UserError(
                f"another run is at work in {data_dir}: wait for its end, or give another "
                "--data_dir."
            ) from None
        yield
    finally:
        os.close(handle)


def provide_data(flags: argparse.Namespace) -> None:
    folder = flags.data_dir / flags.file_format.folder
    with only_run_in(flags.data_dir):
        if already_there(folder, flags):
            pass
        elif flags.synthetic:
            sizes = flags.synthetic_train_images, flags.synthetic_test_images, flags.seed
            write_folder(
                folder,
                flags.file_format,
                synthetic_source(flags),
                lambda part: write_synthetic(part, *sizes),
            )
            print(f"wrote the synthetic stand-in to {folder}")
        else:
            fetch_and_unpack(folder, flags)
            print(f"{flags.file_format.title} is in {folder}")
    print(f"next: {command('run_trainer.py', f'--path={folder}')}", flush=True)


def terminate(signum: int, frame: object) -> None:
    raise Terminated


@exits_with_a_sentence
def main(argv: Sequence[str] | None = None) -> int:
    flags = parse_flags(argv)
    try:
        provide_data(flags)
    except KeyboardInterrupt as stop:
        print(
            f"{os.path.basename(sys.argv[0])}: stopped before the data was complete; run the same "
            "command again, and a download goes on where it stopped.",
            file=sys.stderr,
        )
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        raise  # it says nothing of the data
    except OSError as error:
        raise errors.UserError(
            f"cannot use {error.filename or flags.data_dir}: {error.strerror or error}; mend that "
            "or give another --data_dir, then run the same command again."
        ) from error
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
