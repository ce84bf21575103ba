"""Unpacks a data set's archive, which may be damaged or hostile."""

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

from cifar10_resnet.errors import reason_of
from cifar10_resnet.formats import Format
from cifar10_resnet.storage import CHUNK_BYTES

README_FILE = "readme.html"  # CIFAR-10's archive has one.
MAX_UNPACKED_BYTES = 512 << 20
MAX_BATCH_BYTES = 256 << 20
MAX_TEXT_BYTES = 64 << 10
# These are the types of a tar's members, as in their headers.
FILES, FOLDER = (b"0", b"\0"), b"5"
# A note adds details on the member after it. Nothing here needs or trusts a note.
NOTES = (b"x", b"g", b"X", b"L", b"K")
OTHERS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


class BadData(Exception):
    """Data that is not in a data set's file format. The text states what is wrong, and where."""


def unpack(archive: Path, file_format: Format, folder: Path) -> None:
    """Writes the data set's files from a .tar.gz into `folder`, and nothing else anywhere."""
    try:
        with gzip.open(archive) as stream:
            Unpacker(stream, file_format, folder).run()
    except (gzip.BadGzipFile, zlib.error, EOFError, tarfile.TarError) as error:
        raise BadData(f"it is damaged or not a .tar.gz at all ({reason_of(error)})") from error


class Unpacker:
    """A reader that unpacks a tar member by member, and refuses one larger than these archives.

    The reader in `tarfile` follows long names and sparse maps. Its extractors write to any path in
    the archive. This class writes only files with the data set's own names.
    """

    def __init__(self, stream: BinaryIO, file_format: Format, folder: Path) -> None:
        self.stream, self.file_format, self.folder = stream, file_format, folder
        self.left = MAX_UNPACKED_BYTES

    def run(self) -> None:
        """Writes the data set's files, and refuses a tar that lacks one."""
        unpacked = set()
        while (block := self._read(tarfile.BLOCKSIZE)).strip(b"\0"):
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            self._check(member)
            if member.type != FOLDER:  # No bytes follow the header of a folder.
                unpacked.add(self._unpack(member))
                self._read(-member.size % tarfile.BLOCKSIZE)
        while rest := self._read(CHUNK_BYTES):  # to the end, where gzip keeps its checksum
            if rest.strip(b"\0"):
                raise BadData("something follows the end of its tar")
        if missing := [name for name in self.file_format.files if name not in unpacked]:
            raise BadData(f"it contains no {self.file_format.folder}/{missing[0]}")

    def _check(self, member: tarfile.TarInfo) -> None:
        name = ascii(member.name)
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise BadData(f"it contains {name}, a path that leads out of the folder")
        if member.type not in (*FILES, *NOTES, FOLDER):
            kind = OTHERS.get(member.type, "not a regular file")
            raise BadData(f"it contains {name}, which is {kind}")
        if member.size < 0 or (member.type in NOTES and member.size > MAX_TEXT_BYTES):
            raise BadData(f"it gives {name} a size of {member.size} bytes")

    def _unpack(self, member: tarfile.TarInfo) -> str | None:
        """Writes a member and returns its name, or skips it if it is not a file of the data set."""
        place, _, name = member.name.removeprefix("./").rpartition("/")
        is_ours = place == self.file_format.folder and member.type in FILES
        if not is_ours or name not in (*self.file_format.files, README_FILE):
            return self._copy(member.size, None)
        limit = MAX_BATCH_BYTES if name.endswith(".bin") else MAX_TEXT_BYTES
        if member.size > limit:
            raise BadData(f"{name} has {member.size} bytes, where up to {limit} are expected")
        if (self.folder / name).exists():
            raise BadData(f"it contains {name} twice")
        with open(self.folder / name, "xb") as file:
            self._copy(member.size, file)
        return name

    def _copy(self, size: int, sink: BinaryIO | None) -> None:
        """Moves exactly `size` bytes to the sink, or skips them."""
        while size:
            chunk = self._read(min(size, CHUNK_BYTES))
            if not chunk:
                raise BadData("it ends in the middle of a file")
            if sink:
                sink.write(chunk)
            size -= len(chunk)

    def _read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise BadData(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        return data
