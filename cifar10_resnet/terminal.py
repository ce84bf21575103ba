"""Formats text for a terminal: tables, one live line, commands to type, emphasis."""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

PROJECT = Path(__file__).resolve().parent.parent

BOLD, RED = "1", "1;31"


def emphasised(text: str, stream: TextIO, style: str = BOLD) -> str:
    """Returns the text in a style, or plain for files, pipes, dumb terminals and NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def table(rows: Iterable[Sequence[object]], align: str = "", indent: str = "  ") -> str:
    """Returns rows of cells as aligned columns. The first row may be a header.

    `align` has a "<" or ">" for each column, "<" by default. A row that is shorter than the first
    widens only the first column, so its last cell may be a sentence.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    whole = [row for row in cells if len(row) == len(cells[0])]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    widths[0] = max(len(row[0]) for row in cells)
    lines = []
    for row in cells:
        columns = [f"{cell:{align[i : i + 1]}{widths[i]}}" for i, cell in enumerate(row)]
        if len(row) < len(widths):
            columns[-1] = row[-1]
        lines.append((indent + "  ".join(columns)).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def fitting(parts: Sequence[str], separator: str, room: int) -> str:
    """Returns the first parts, joined: as many as fit into `room` characters, at least one."""
    count = len(parts)
    while count > 1 and len(separator.join(parts[:count])) > room:
        count -= 1
    return separator.join(parts[:count])


def transfer(done: int, total: int | None, rate: float) -> tuple:
    """Returns a transfer's share or None, then as text its bytes, its speed and the time left."""
    speed = f"{rate / 1e6:.1f} MB/s"
    if not total:
        return None, f"{done / 1e6:.1f} MB", speed
    left = duration((total - done) / max(rate, 1e-6))
    return done / total, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB", speed, f"{left} left"


class LiveLine:
    """A progress line at the bottom of a terminal.

    Files and pipes get no moving line. With `plain` they get a line for each tenth of the work. At
    the end of the `with` block, the line disappears. Lines that were written above it stay.
    """

    SECONDS = 0.5  # between two drawings, and before the first

    def __init__(self, plain: bool = False):
        self.is_live = sys.stdout.isatty()
        self._plain, self._tenth = plain, 0
        self._shown, self._shown_at = "", time.monotonic()

    def __enter__(self) -> "LiveLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the line."""
        self._draw("")

    @property
    def columns(self) -> int:
        """Returns how many characters fit into a line."""
        with contextlib.suppress(OSError, ValueError):  # a terminal of unknown size
            return (os.get_terminal_size(sys.stdout.fileno()).columns or 80) - 1
        return 79

    def is_due(self) -> bool:
        """Returns whether to draw the line again: rarely, so the work does not wait for it."""
        return self.is_live and time.monotonic() - self._shown_at > self.SECONDS

    def update(self, share: float | None, *facts: str) -> None:
        """Shows the progress, if a terminal's line or a file's next tenth is due."""
        if self.is_due():
            self.show(share, *facts)
        elif self._plain and not self.is_live and int(10 * (share or 0)) > self._tenth:
            self._tenth = int(10 * share)
            print(f"{share:4.0%}  {', '.join(facts)}", flush=True)

    def show(self, share: float | None, *facts: str) -> None:
        """Draws the line: a bar, then the facts. If they do not fit, the last ones are omitted."""
        least, most = 4, 20  # characters of the bar
        around = len("100%  ")
        text = fitting(facts, ", ", self.columns - around - least)
        if share is not None:
            width = min(most, max(least, self.columns - around - len(text)))
            text = f"{share:4.0%} {bar(share, width)} {text}"
        self._draw(text)
        self._shown_at = time.monotonic()

    def write(self, line: str) -> None:
        """Prints a line, above the live line if there is one."""
        shown = self._shown
        self._draw("")
        print(line)
        self._draw(shown)

    def _draw(self, text: str) -> None:
        if text or self._shown:
            # This clears the whole line, because an evaluation draws over the trainer's line.
            print(f"\r{' ' * self.columns}\r{text}", end="", flush=True)
        self._shown = text


def bar(share: float, width: int) -> str:
    """Returns a bar of `width` characters, filled up to `share`."""
    return ("#" * int(width * min(share, 1))).ljust(width, ".")


def command(program: str, *arguments: str) -> str:
    """Returns the line that starts one of the project's programs from the user's folder.

    `program` is a file in the project's folder ("run_trainer.py") or a command ("export").
    """
    python = sys.executable
    for name in ("python3", "python"):
        if shutil.which(name) == sys.executable:
            python = name
    if program.endswith(".py"):
        words = [python, in_project(program)]
    elif in_project() == ".":
        words = [python, "-m", "cifar10_resnet", program]
    else:
        words = [python, in_project("cifar10_resnet"), program]
    return shlex.join([*words, *arguments])


def in_project(*parts: str) -> str:
    """Returns the path of one of the project's files, as a user types it in the current folder."""
    path = PROJECT.joinpath(*parts)
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.path.join("..", "..")) else relative


@contextlib.contextmanager
def quietly(is_quiet: bool) -> Iterator[TextIO]:
    """Drops what the block prints to stdout, if `is_quiet`. Yields the real stdout."""
    stdout = sys.stdout
    if not is_quiet:
        yield stdout
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield stdout
