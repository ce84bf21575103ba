"""What text for people looks like: tables, and emphasis where a terminal shows it."""

import os
from collections.abc import Mapping
from typing import TextIO

BOLD, RED = "1", "1;31"


def emphasised(text: str, stream: TextIO, style: str = BOLD) -> str:
    """The text as it should be written to the stream: plain in files, pipes and under NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def table(rows: Mapping[str, object]) -> str:
    """Names and values, a line for each."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:<{width}}{value}" for name, value in rows.items())
