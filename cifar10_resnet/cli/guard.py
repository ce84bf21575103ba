"""Ends programs with a one-line error on stderr and exit status 1, without a traceback."""

import contextlib
import errno
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from cifar10_resnet.errors import UserError, printable, reason_of, unwritable
from cifar10_resnet.terminal import RED, emphasised


class Terminated(SystemExit):
    """The exception for SIGTERM. The program ends as after Ctrl-C: its `finally` blocks run."""


ENVIRONMENT = "Enter the environment: . .venv/bin/activate (`make demo` creates it)."
# This is the advice for each package that may be missing.
PACKAGES = {
    "absl": ENVIRONMENT,
    "numpy": ENVIRONMENT,
    "tensorflow": ENVIRONMENT,
    "PIL": "Run: pip install pillow",
    "matplotlib": "Run: pip install matplotlib",
    "tensorboard": "Run: pip install tensorboard",
    "tornado": "Run: pip install tornado",
}


def exits_with_a_sentence(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Makes errors and signals end `main` with one line. A bug ends it with a traceback."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            with _terminable():
                status = main(*args, **kwargs)
                if sys.stdout:
                    sys.stdout.flush()
                return status
        except UserError as error:
            tell(error)
            return 1
        except (KeyboardInterrupt, Terminated) as stop:
            # Programs with unsaved work, such as the training loop, handle signals themselves.
            sentence = "interrupted before any work was lost. Run the same command again."
            print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)
            return stop.code if isinstance(stop, Terminated) else 128 + signal.SIGINT
        except BrokenPipeError:
            # The output was closed, as in `… | head`. End as quietly as other programs.
            _silence_stdout()
            return 128 + signal.SIGPIPE
        except OSError as error:
            # Programs handle errors of the files that they write. This error is about their output.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            _silence_stdout()
            tell(unwritable(error.filename or "the output", error))
            return 1
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in PACKAGES:
                raise
            tell(UserError(f"{package} is not installed. {PACKAGES[package]}"))
            return 1
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            advice = "Stop other programs. If there is a --batch_size, use a smaller one."
            tell(UserError(f"The memory is full: {reason_of(error)}. {advice}"))
            return 1

    return guarded


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM raise Terminated in the block."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Only it can handle signals.
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether Python or TensorFlow ran out of memory. Does not import TensorFlow."""
    text = f"{type(error).__name__}: {error}"
    return bool(re.match("MemoryError|ResourceExhaustedError.*(OOM|[Oo]ut of memory)", text, re.S))


def _silence_stdout() -> None:
    """Sends stdout to /dev/null, because Python's last flush would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(error: UserError) -> None:
    """Writes an error to stderr in one line, without control characters."""
    label = emphasised("error:", sys.stderr, RED)
    print(f"{os.path.basename(sys.argv[0])}: {label} {printable(str(error))}", file=sys.stderr)


def prepare_streams() -> None:
    """Makes every text printable, and opens /dev/null for each closed stream, as by `2>&-`.

    Otherwise the next file that is opened gets the stream's number, and what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It takes the lowest free number, which is this one.
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Names of files and classes may contain characters that the output's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
