"""Archives that are hostile or damaged: each is refused, and nothing is written elsewhere."""

import os
import subprocess
import sys
import tarfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from downloads import (
    FOLDER,
    GOOD,
    SCRIPT,
    batch,
    good_members,
    member,
    replacing,
    sha256,
    tar_of,
    tree,
    with_member,
    without,
    zipped,
)

# Zeros may follow the end of a tar. Only the bound stops this: 640 MiB in under 1 MiB.
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
    "names of other classes": (
        replacing("batches.meta.txt", b"cat\ndog\n"),
        "contains 2 class names",
    ),
    "half a record": (replacing("test_batch.bin", batch(6)[:-1]), "not a multiple of"),
    "label out of range": (replacing("data_batch_2.bin", b"\x0a" + bytes(3072)), "label 10"),
    "missing batch": (without("data_batch_4.bin"), "contains no"),
    "missing meta": (without("batches.meta.txt"), "contains no"),
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
    "empty": (b"", "contains no"),
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
import cifar10_download_and_extract as script
from cifar10_resnet.cli import app
from cifar10_resnet.data import download
download.MAX_ARCHIVE_BYTES = 64 << 20
app.run(script.main, script.Settings)
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
