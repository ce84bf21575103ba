"""Handles signals to stop, and output that nobody reads any more."""

import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator


class StopSignals:
    """A context in which Ctrl-C, SIGTERM and a closed terminal request a tidy end.

    A second Ctrl-C or SIGTERM ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it.
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        # A closed terminal sends SIGHUP twice. A second SIGHUP must not force an exit.
        if self.signal is not None and number != signal.SIGHUP:
            raise SystemExit(128 + number)
        self.signal = self.signal or number


@contextlib.contextmanager
def saving_on_closed_output(check: Callable[[], None], save: Callable[[], str]) -> Iterator[None]:
    """Saves the run if its output is closed: the terminal, or the `| tee`, has ended."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            check()
            print(f"Nobody reads the output any more; saved as {save()}.", file=sys.stderr)
        raise
