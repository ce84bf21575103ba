"""Builds the native kernels, once for this TensorFlow and processor, and finds them again.

The library is in the user's cache folder. Nobody else may write there, because a library is a
program.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cifar10_resnet import storage
from cifar10_resnet.device import processor
from cifar10_resnet.errors import UserError, reason_of

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "kernels.cc"
COMPILERS = ("c++", "g++", "clang++")
# TensorFlow's headers include Eigen, whose code for AVX-512 FP16 does not compile with GCC 12.
FLAGS = ("-O3", "-march=native", "-DEIGEN_DONT_VECTORIZE", "-shared", "-fPIC", "-w")
TIMEOUT = 600  # seconds; on an idle machine it takes ten


class CannotBuild(Exception):
    """The kernels cannot be built here. The text says why.

    `is_new` is true if no earlier start failed.
    """

    def __init__(self, why: str, is_new: bool = False):
        super().__init__(why)
        self.is_new = is_new


def library() -> str:
    """Returns the file of the built kernels. Builds it if it is missing."""
    compiler = _compiler()
    try:
        folder = _own_folder()
        name = _digest(compiler)
        built, failed = folder / f"{name}.so", folder / f"{name}.failed"
        # A start that finds the library needs no lock: the library is complete when it appears.
        with contextlib.nullcontext() if built.exists() else _locked(folder):
            if not built.exists() and not failed.exists():
                print("Building the native kernels for this processor, once …", flush=True)
                if why := _compile(compiler, built):
                    with contextlib.suppress(UserError):  # Then the next start tries again.
                        storage.new_file(failed, why.encode())
                    raise CannotBuild(why, is_new=True)
        if built.exists():
            return str(built)
        raise CannotBuild(f"{failed.read_text('utf-8')} (delete {failed} to try again)")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder.
        raise CannotBuild(f"the cache folder is not usable: {reason_of(error)}") from error


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise CannotBuild(f"there is no C++ compiler ({', '.join(names)})")


def _own_folder() -> Path:
    """Returns the cache folder, which only the user may use."""
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache if cache else Path.home() / ".cache") / "cifar10_resnet"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise CannotBuild(f"{folder} is not a folder that only you may use (chmod 700)")
    return folder


def _digest(compiler: str) -> str:
    """Returns a name that changes with everything that the library depends on."""
    # TensorFlow is not imported for this: a start of some seconds would become longer.
    tensorflow = importlib.util.find_spec("tensorflow").origin
    files = [
        (file, os.stat(file).st_size, os.stat(file).st_mtime) for file in (compiler, tensorflow)
    ]
    sources = [file.read_bytes() for file in sorted(FOLDER.glob("*.[ch]*"))]
    parts = [*files, *FLAGS, processor(), *sources]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, library: Path) -> str | None:
    """Writes the library, and never a half of it. Returns why it failed, or None."""
    import tensorflow as tf

    include, link = tf.sysconfig.get_compile_flags(), tf.sysconfig.get_link_flags()
    part = library.with_suffix(".part")
    try:
        done = subprocess.run(
            [compiler, *FLAGS, *include, str(SOURCE), "-o", str(part), *link],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason"]
            return f"{compiler} failed: {lines[0].strip():.200}"
        os.chmod(part, 0o600)
        storage.move(part, library)
        return None
    except subprocess.TimeoutExpired:
        return f"{compiler} took more than {TIMEOUT} seconds"
    finally:
        storage.remove(part)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process builds, and keeps others waiting."""
    with open(folder / storage.LOCK, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # The system drops it when the process ends.
        yield
