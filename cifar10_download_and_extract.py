"""Puts CIFAR-10 in its binary layout where the trainer looks for it: fetch, verify, unpack.

    python cifar10_download_and_extract.py                      # into ./cifar-10-batches-bin
    python cifar10_download_and_extract.py --data_dir=~/data    # into ~/data/cifar-10-batches-bin
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
import os
import re
import shlex
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
from typing import BinaryIO

import errors

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
META_FILE = "batches.meta.txt"
README_FILE = "readme.html"
MANIFEST = ".sha256"
DATA_FILES = (*TRAIN_FILES, TEST_FILE, META_FILE)
# The manifest comes last so that a folder being emptied never passes for one without a manifest.
OWN_FILES = (*DATA_FILES, README_FILE, MANIFEST)

RECORD_BYTES = 1 + 3 * 32 * 32
CLASSES = 10
CHUNK_BYTES = 256 * RECORD_BYTES  # whole records, so that every chunk starts with a label

MAX_ARCHIVE_BYTES = 1 << 30
MAX_UNPACKED_BYTES = 512 << 20
MAX_BATCH_BYTES = 64 << 20
MAX_TEXT_BYTES = 64 << 10
MAX_BATCH_IMAGES = MAX_BATCH_BYTES // RECORD_BYTES

TRIES = 5
RETRY_SECONDS = 1.0  # before the second try; doubled before each further one
# A try that gets this much further is progress: a long download may break more often than TRIES.
PROGRESS_BYTES = 1 << 20


class TryAgain(Exception):
    """The download broke in a way that may pass."""


class Refused(Exception):
    """This address will not give the archive, however often it is asked."""


class BadData(Exception):
    """The data is not CIFAR-10's binary layout. The text says where."""


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


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def describe(error: Exception) -> str:
    """A network error in a few words, on one line whatever the server put into it."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "nothing arrived within the --timeout"
    text = " ".join(str(reason).split()) or type(reason).__name__
    return "".join(char if char.isprintable() else "?" for char in text)[:200]


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
            opener = urllib.request.build_opener(WebRedirects)
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


def download_verified(mirror: Mirror, part: Path, sha256: str) -> None:
    resumed = size_of(part) > 0
    download(mirror, part)
    actual = sha256_of(part)
    if actual == sha256:
        return
    part.unlink()
    if not resumed:
        raise Refused(
            f"its archive has the SHA-256 {actual}, not the expected {sha256} "
            f"(give --sha256={actual} if that archive is meant)"
        )
    print("the resumed archive has the wrong SHA-256, so it starts from zero", flush=True)
    download_verified(mirror, part, sha256)


def obtain_archive(urls: Sequence[str], part: Path, sha256: str, timeout: float) -> None:
    """Brings the archive with this digest to `part`, from the first mirror that has it."""
    if part.exists() and sha256_of(part) == sha256:
        return
    problems = []
    for url in urls:
        print(f"downloading {url}", flush=True)
        try:
            return download_verified(Mirror(url, timeout), part, sha256)
        except Refused as problem:
            print(f"{url}: {problem}", flush=True)
            problems.append(f"{url}: {problem}")
    kept = f" (the {size_of(part)} bytes in {part} are kept)" if size_of(part) else ""
    raise errors.UserError(
        f"cannot download CIFAR-10: {'; '.join(problems)}; check the address and the network and "
        f"run the same command again{kept}, name a mirror with --url, or make the generated "
        "stand-in with --synthetic."
    )


# --- Unpack ---------------------------------------------------------------------------------------


def size_problem(name: str, size: int) -> str | None:
    """What is wrong with the size of one of the data files, if anything is."""
    limit = MAX_BATCH_BYTES if name.endswith(".bin") else MAX_TEXT_BYTES
    if not 0 < size <= limit:
        return f"{name} has {size} bytes, where 1 to {limit} are expected"
    if name.endswith(".bin") and size % RECORD_BYTES:
        return f"{name} has {size} bytes, which is no whole number of {RECORD_BYTES}-byte records"
    return None


class BoundedReader:
    """Reads a decompressed stream and stops one that grows beyond any CIFAR-10 archive."""

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


def unpack_member(member: tarfile.TarInfo, stream: BoundedReader, folder: Path) -> str | None:
    """Writes the member if it is one of CIFAR-10's files, passes over it if not; returns which."""
    if member.type == tarfile.DIRTYPE:
        return None  # no bytes follow a folder's header
    place, _, name = member.name.removeprefix("./").rpartition("/")
    wanted = member.type in TAR_FILES and place == FOLDER and name in (*DATA_FILES, README_FILE)
    if not wanted:
        stream.copy(member.size, None)
    elif problem := size_problem(name, member.size):
        raise BadData(problem)
    elif (folder / name).exists():
        raise BadData(f"it holds {name} twice")
    else:
        with open(folder / name, "xb") as file:
            stream.copy(member.size, file)
    stream.read(-member.size % tarfile.BLOCKSIZE)
    return name if wanted else None


def unpack_tar(stream: BoundedReader, folder: Path) -> None:
    # tarfile's own reader follows long names and sparse maps, and its extractors write what the
    # archive says. Here only the eight names above can ever be written.
    unpacked = set()
    while (block := stream.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        check_member(member)
        unpacked.add(unpack_member(member, stream, folder))
    while rest := stream.read(CHUNK_BYTES):  # to the end, where gzip keeps its checksum
        if rest.strip(b"\0"):
            raise BadData("something follows the end of its tar")
    if missing := [name for name in DATA_FILES if name not in unpacked]:
        raise BadData(f"it holds no {FOLDER}/{missing[0]}")


def unpack(archive: Path, folder: Path) -> None:
    """Writes CIFAR-10's files from a .tar.gz into `folder`, and nothing else anywhere."""
    try:
        with gzip.open(archive) as stream:
            unpack_tar(BoundedReader(stream), folder)
    except (gzip.BadGzipFile, zlib.error, EOFError, tarfile.TarError) as error:
        raise BadData(f"it is damaged or not a .tar.gz at all ({describe(error)})") from error


# --- The data folder ------------------------------------------------------------------------------


def check_labels(name: str, first_record: int, chunk: bytes) -> None:
    labels = chunk[::RECORD_BYTES]
    if (worst := max(labels)) >= CLASSES:
        record = first_record + labels.index(worst)
        raise BadData(f"{name} has the label {worst} in record {record}, where 0 to 9 are expected")


def check_file(path: Path) -> str:
    """Checks one data file's size and labels and returns its SHA-256."""
    if not path.is_file():
        raise BadData(f"{path.name} is missing")
    if problem := size_problem(path.name, path.stat().st_size):
        raise BadData(problem)
    digest, record = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if path.suffix == ".bin":
                check_labels(path.name, record, chunk)
                record += len(chunk) // RECORD_BYTES
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


def verify(folder: Path, recorded: dict[str, str] | None) -> None:
    """Raises BadData unless every file is whole and, where digests are recorded, unchanged."""
    for name in DATA_FILES:
        digest = check_file(folder / name)
        if recorded is not None and recorded.get(name) != digest:
            raise BadData(f"{name} differs from its SHA-256 in {MANIFEST}")


def refuse_foreign_files(folder: Path) -> None:
    """Raises UserError where replacing the folder would delete something of the user's."""
    if folder.is_symlink() or not folder.is_dir():
        raise errors.UserError(
            f"{folder} is in the way and not a plain folder: move it away or give another "
            "--data_dir, then run the same command again."
        )
    for entry in folder.iterdir():
        if entry.name not in OWN_FILES or (entry.is_dir() and not entry.is_symlink()):
            raise errors.UserError(
                f"{folder} holds no complete CIFAR-10, but it holds {entry.name!r}, which is not "
                "this program's to delete: move that folder away or give another --data_dir."
            )


def remove_folder(folder: Path) -> None:
    if os.path.lexists(folder):
        refuse_foreign_files(folder)
        for name in OWN_FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a crash cannot leave a hollow one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(folder: Path, source: str, fill: Callable[[Path], None]) -> None:
    """Makes the data folder with `fill`, beside its place, and moves it there once it is whole."""
    part = folder.with_name(f"{FOLDER}.part")
    remove_folder(part)
    part.mkdir()
    try:
        fill(part)
        write_manifest(part, source, {name: check_file(part / name) for name in DATA_FILES})
        for path in (*part.iterdir(), part):
            sync(path)
        remove_folder(folder)
        part.rename(folder)
        sync(folder.parent)
    finally:
        remove_folder(part)


def write_synthetic(folder: Path, train_images: int, test_images: int, seed: int) -> None:
    """Writes the stand-in in CIFAR-10's layout: a label, then the red, green and blue planes."""
    # Only here, so that the download runs where nothing but Python is installed yet.
    import numpy as np

    import synthetic_data

    splits = (("train", train_images, TRAIN_FILES), ("test", test_images, (TEST_FILE,)))
    for split, num_images, names in splits:
        images, labels = synthetic_data.make_split(split, num_images, seed)
        planes = images.transpose(0, 3, 1, 2).reshape(num_images, -1)
        records = np.concatenate([labels[:, np.newaxis], planes], axis=1)
        for name, batch in zip(names, np.split(records, len(names)), strict=True):
            (folder / name).write_bytes(batch.tobytes())
    meta = "".join(f"{name}\n" for name in synthetic_data.CLASS_NAMES)
    (folder / META_FILE).write_bytes(f"{meta}\n".encode())  # CIFAR-10's ends in an empty line too


# --- The program ----------------------------------------------------------------------------------


def address(text: str) -> str:
    scheme = text.partition(":")[0].lower()
    parts = urllib.parse.urlsplit(text)
    whole = parts.path and not parts.netloc if scheme == "file" else parts.hostname
    if scheme not in ("http", "https", "file") or not whole or re.search("[^!-~]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no http://, https:// or file:/// address")
    return text


def hex_digest(text: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no SHA-256, which has 64 hexadecimal digits")
    return text.lower()


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


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Puts CIFAR-10, or a synthetic stand-in, where run_trainer.py reads it.",
        allow_abbrev=False,
    )
    train = whole_number(5, 5 * MAX_BATCH_IMAGES, step=5)
    test = whole_number(1, MAX_BATCH_IMAGES)
    seed = whole_number(0, 2**32 - 1)
    add = parser.add_argument
    add("--data_dir", metavar="DIR", default=".", help=f"gets {FOLDER} (default: %(default)s)")
    add("--url", action="append", type=address, help=f"repeat it for mirrors (default: {URL})")
    add("--sha256", type=hex_digest, help="of the archive (default: the official archive's)")
    add("--keep_archive", action="store_true", help=f"keep {ARCHIVE} beside the data")
    add(
        "--timeout",
        metavar="S",
        type=seconds,
        default=30.0,
        help="seconds to wait for a silent server (default: %(default)g)",
    )
    add("--synthetic", action="store_true", help="write a generated stand-in; download nothing")
    add(
        "--synthetic_train_images",
        metavar="N",
        type=train,
        default=10000,
        help="(default: %(default)s)",
    )
    add(
        "--synthetic_test_images",
        metavar="N",
        type=test,
        default=2000,
        help="(default: %(default)s)",
    )
    add("--seed", metavar="N", type=seed, default=0, help="of the stand-in (default: %(default)s)")
    flags = parser.parse_args(argv)
    if flags.synthetic and (flags.url or flags.sha256 or flags.keep_archive):
        parser.error("--synthetic downloads nothing: leave out --url, --sha256 and --keep_archive")
    flags.data_dir = Path(flags.data_dir).expanduser()
    return flags


def synthetic_source(flags: argparse.Namespace) -> str:
    return (
        f"synthetic stand-in: {flags.synthetic_train_images} training images, "
        f"{flags.synthetic_test_images} test images, seed {flags.seed}"
    )


def archive_source(sha256: str) -> str:
    return f"archive with the SHA-256 {sha256}"


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
        refuse_foreign_files(folder)
    source, recorded = read_manifest(folder) or ("", None)
    refuse_other_data(folder, source, flags)
    try:
        verify(folder, recorded)
    except BadData as problem:
        refuse_foreign_files(folder)
        print(f"{folder} is not complete ({problem}) and will be replaced", flush=True)
        return False
    how = "its structure was" if recorded is None else "its structure and digests were"
    print(f"{folder} is already there and {how} verified, so there is nothing to do.")
    return True


def fetch_and_unpack(folder: Path, flags: argparse.Namespace) -> None:
    sha256 = flags.sha256 or SHA256
    kept = flags.data_dir / ARCHIVE
    part = flags.data_dir / f"{ARCHIVE}.part"
    # An archive that was there before this run is the user's: it is read and left alone.
    archive = kept if kept.exists() else part
    if archive == part:
        obtain_archive(flags.url or [URL], part, sha256, flags.timeout)
    elif (actual := sha256_of(kept)) != sha256:
        raise errors.UserError(
            f"{kept} has the SHA-256 {actual}, not the expected {sha256}: move it away to download "
            f"the archive again, or give --sha256={actual} if that archive is meant."
        )
    print(f"unpacking {archive}", flush=True)
    try:
        write_folder(folder, archive_source(sha256), functools.partial(unpack, archive))
    except BadData as problem:
        part.unlink(missing_ok=True)
        raise errors.UserError(
            f"cannot unpack {archive}: {problem}; nothing of it was kept, so give the --url and "
            "--sha256 of an archive that holds CIFAR-10's binary version."
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
    folder = flags.data_dir / FOLDER
    with only_run_in(flags.data_dir):
        if already_there(folder, flags):
            pass
        elif flags.synthetic:
            sizes = flags.synthetic_train_images, flags.synthetic_test_images, flags.seed
            write_folder(
                folder, synthetic_source(flags), lambda part: write_synthetic(part, *sizes)
            )
            print(f"wrote the synthetic stand-in to {folder}")
        else:
            fetch_and_unpack(folder, flags)
            print(f"CIFAR-10 is in {folder}")
    print(f"next: python run_trainer.py --path={shlex.quote(str(folder))}", flush=True)


def terminate(signum: int, frame: object) -> None:
    raise Terminated


@errors.exits_with_a_sentence
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
    except OSError as error:
        raise errors.UserError(
            f"cannot use {error.filename or flags.data_dir}: {error.strerror or error}; mend that "
            "or give another --data_dir, then run the same command again."
        ) from error
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
