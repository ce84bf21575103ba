"""How programs end: in a sentence on stderr and with exit status 1, without a traceback."""

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from cifar10_resnet.errors import UserError, printable, reason_of
from cifar10_resnet.terminal import RED, emphasised


class Terminated(SystemExit):
    """SIGTERM has arrived. The program ends as by Ctrl-C: its `finally` blocks tidy up."""


ENVIRONMENT = "Enter the environment: . .venv/bin/activate (`make demo` creates it)."
# What to do about a package that is not there.
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
    """Wraps a program's `main`: an error or a signal ends it in a sentence, a bug does not."""

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
            # whoever read the output has gone, as in `… | head`: end as quietly as other programs
            _silence_stdout()
            return 128 + signal.SIGPIPE
        except OSError as error:
            # What a program writes to it tells of by itself; what is left is its output.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            _silence_stdout()
            tell(UserError(f"cannot write {error.filename or 'the output'}: {error.strerror}."))
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
            advice = "a smaller --batch_size needs less."
            tell(UserError(f"out of memory: {reason_of(error)}; {advice}"))
            return 1

    return guarded


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM raises Terminated."""

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
    """Whether it is Python's or TensorFlow's; this module does not import TensorFlow."""
    text = f"{type(error).__name__}: {error}"
    return bool(re.match("MemoryError|ResourceExhaustedError.*(OOM|[Oo]ut of memory)", text, re.S))


def _silence_stdout() -> None:
    """Lets Python's last flush go nowhere: it would fail as the one before it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(error: UserError) -> None:
    """Writes an error's sentence to stderr, in one line, whatever a file put into it."""
    label = emphasised("error:", sys.stderr, RED)
    print(f"{os.path.basename(sys.argv[0])}: {label} {printable(str(error))}", file=sys.stderr)


def open_closed_streams() -> None:
    """Lets what is printed go nowhere if a standard stream is closed, as by `2>&-`.

    The next file that is opened would get its number, and with it what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
