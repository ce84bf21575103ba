"""How the fuzzing goes: how many examples, and what counts as well refused."""

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

from cifar10_resnet.cli import guard
from cifar10_resnet.errors import UserError

LONG = os.environ.get("FUZZ_EXAMPLES")
fuzzed = settings(
    max_examples=int(LONG) if LONG else 150,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def result_or_sentence(function: Callable[..., Any], *arguments: object) -> Any:
    """Returns the result of a function, or its one-line error."""
    said = io.StringIO()
    try:
        return function(*arguments)
    except UserError as error:
        with contextlib.redirect_stderr(said):
            guard.tell(error)
    line = said.getvalue()
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert len(line) < 1000
    return line
