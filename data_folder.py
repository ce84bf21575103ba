"""A data folder on the disk: it appears whole or not at all, and its own digests verify it."""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_layout import Layout
from errors import UserError

README_FILE = "readme.html"  # CIFAR-10's archive has one
MANIFEST = ".sha256"
MAX_MANIFEST_BYTES = 64 << 10
CHUNK_RECORDS = 256


class BadData(Exception):
    """Files are not those of a data set. The text says which and where."""


def check_folder(folder: Path, layout: Layout) -> dict[str, str]:
    """Checks each file of a data folder, its size and labels; returns their SHA-256 digests."""
    for name in layout.files:
        if not (folder / name).is_file():
            raise BadData(f"{name} is missing")
    try:
        counts = [len(layout.read_names(str(folder), label)) for label in layout.labels]
    except UserError as error:
        raise BadData(str(error).rstrip(".")) from error
    return {name: _check_file(folder / name, layout, counts) for name in layout.files}


def _check_file(path: Path, layout: Layout, class_counts: Sequence[int]) -> str:
    has_records = path.suffix == ".bin"
    if has_records and (problem := layout.size_problem(path.name, path.stat().st_size)):
        raise BadData(problem)
    digest, record = hashlib.sha256(), 0
    with open(path, "rb") as file:
        # whole records, so that every chunk starts with a label
        while chunk := file.read(CHUNK_RECORDS * layout.record_bytes):
            digest.update(chunk)
            if has_records:
                columns = [chunk[i :: layout.record_bytes] for i in range(len(class_counts))]
                if problem := layout.label_problem(path.name, columns, class_counts, record):
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
        text = file.read(MAX_MANIFEST_BYTES)
    source = re.match("# (.*)", text)
    entries = re.findall("^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)
    return source[1] if source else "", {name: digest for digest, name in entries}


def verify(folder: Path, layout: Layout, recorded: dict[str, str] | None) -> None:
    """Raises BadData unless every file is whole and, where digests are recorded, unchanged."""
    for name, digest in check_folder(folder, layout).items():
        if recorded is not None and recorded.get(name) != digest:
            raise BadData(f"{name} differs from its SHA-256 in {MANIFEST}")


def _own_files(layout: Layout) -> tuple[str, ...]:
    # The manifest comes last: a folder being emptied never passes for one without a manifest.
    return (*layout.files, README_FILE, MANIFEST)


def refuse_foreign_files(folder: Path, layout: Layout) -> None:
    """Raises UserError where replacing the folder would delete something of the user's."""
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(
            f"{folder} is in the way and not a plain folder: move it away or give another "
            "--data_dir, then run the same command again."
        )
    for entry in folder.iterdir():
        if entry.name not in _own_files(layout) or (entry.is_dir() and not entry.is_symlink()):
            raise UserError(
                f"{folder} does not hold the whole of {layout.title}, but it holds {entry.name!r}, "
                "which is not this program's to delete: move that folder away or give another "
                "--data_dir."
            )


def remove_folder(folder: Path, layout: Layout) -> None:
    if os.path.lexists(folder):
        refuse_foreign_files(folder, layout)
        for name in _own_files(layout):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, so that a crash cannot leave a hollow one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(folder: Path, layout: Layout, source: str, fill: Callable[[Path], None]) -> None:
    """Makes the data folder with `fill`, beside its place, and moves it there once it is whole."""
    part = folder.with_name(f"{folder.name}.part")
    remove_folder(part, layout)
    part.mkdir()
    try:
        fill(part)
        write_manifest(part, source, check_folder(part, layout))
        for path in (*part.iterdir(), part):
            sync(path)
        remove_folder(folder, layout)
        part.rename(folder)
        sync(folder.parent)
    finally:
        remove_folder(part, layout)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the same folder, where it would write into the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is at work in {folder}: wait for its end, or give another --data_dir."
            ) from None
        yield
    finally:
        os.close(handle)
