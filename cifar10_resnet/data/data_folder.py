"""Checks and replaces a data folder, and reads where its data is from."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cifar10_resnet import storage
from cifar10_resnet.data.archive import README_FILE, BadData
from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import Format

MANIFEST = ".sha256"


@dataclass(frozen=True)
class DataFolder:
    """A folder for the files of a data set, with a list of their digests."""

    path: Path
    file_format: Format

    def holds(self, wanted: str | None) -> bool:
        """Returns whether the folder contains the wanted data undamaged. Refuses other data.

        `wanted` is the source that the list of digests must name. None stands for any archive.
        """
        if not os.path.lexists(self.path):
            return False
        if not self.path.is_dir():
            self._refuse_foreign_files()
        source, recorded = self._read_manifest()
        self._refuse_other_data(source, wanted)
        try:
            for name, digest in self._check().items():
                if recorded is not None and recorded.get(name) != digest:
                    raise BadData(f"{name} differs from its SHA-256 in {MANIFEST}")
        except BadData as problem:
            self._refuse_foreign_files()
            print(f"{self.path} is not complete ({problem}) and will be replaced", flush=True)
            return False
        how = "its structure was" if recorded is None else "its structure and digests were"
        print(f"{self.path} is already there and {how} verified, so there is nothing to do.")
        return True

    @contextlib.contextmanager
    def replacing(self, source: str) -> Iterator[Path]:
        """Yields a folder to fill, which replaces this one if its data is complete at the end."""
        part = DataFolder(self.path.with_name(f"{self.path.name}.part"), self.file_format)
        part._remove()  # An earlier start that was killed may have left it.
        part.path.mkdir()
        try:
            yield part.path
            lines = [f"{digest}  {name}\n" for name, digest in part._check().items()]
            # `sha256sum -c` reads this too.
            (part.path / MANIFEST).write_text("".join([f"# {source}\n", *lines]), "utf-8")
            storage.sync_folder(part.path)
            self._remove()
            part.path.rename(self.path)
            storage.sync(self.path.parent)
        finally:
            part._remove()

    def _check(self) -> dict[str, str]:
        """Checks all files, their sizes and labels, and returns their SHA-256 digests."""
        if problem := self.file_format.problem_in(self.path):
            raise BadData(problem)
        return {name: storage.digest(self.path / name) for name in self.file_format.files}

    def _read_manifest(self) -> tuple[str, dict[str, str] | None]:
        """Returns the source and the digests, or "" and None if the user unpacked the archive."""
        if not (self.path / MANIFEST).exists():
            return "", None
        text = (self.path / MANIFEST).read_text("utf-8", errors="replace")
        source = re.match("# (.*)", text)
        entries = re.findall("^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)
        return source[1] if source else "", {name: digest for digest, name in entries}

    def _refuse_other_data(self, source: str, wanted: str | None) -> None:
        # If one of the two is unknown, synthetic images are still certain to be other data.
        is_other = (source or wanted or "").startswith("synthetic")
        if source and wanted:
            is_other = source != wanted
        if is_other and any(self.path.iterdir()):
            raise UserError(
                f"{self.path} already contains other data ({source or 'of unknown origin'}). "
                "Use another --data_dir, or move that folder away."
            )

    def _remove(self) -> None:
        if os.path.lexists(self.path):
            self._refuse_foreign_files()
            for name in self._own_files():
                storage.remove(self.path / name)
            self.path.rmdir()

    def _refuse_foreign_files(self) -> None:
        """Refuses a folder if replacing it would delete something of the user's."""
        advice = "Move it away, or use another --data_dir."
        if self.path.is_symlink() or not self.path.is_dir():
            raise UserError(f"{self.path} cannot be replaced: it is not a plain folder. {advice}")
        for entry in self.path.iterdir():
            is_folder = entry.is_dir() and not entry.is_symlink()
            if is_folder or entry.name not in self._own_files():
                raise UserError(f"{entry} would be lost: this program did not write it. {advice}")

    def _own_files(self) -> tuple[str, ...]:
        # The list of digests is deleted last, so a half-emptied folder still has it.
        return (*self.file_format.files, README_FILE, MANIFEST)
