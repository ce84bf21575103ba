"""Defines a setting: a field of a dataclass, with the values that it can have."""

import re
import sys
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from cifar10_resnet.errors import UserError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "not empty"}
BOUNDS = {
    "least": ("{:,} or more", lambda value, bound: value >= bound),
    "above": ("above {:,}", lambda value, bound: value > bound),
    "most": ("up to {:,}", lambda value, bound: value <= bound),
    "below": ("and below {:,}", lambda value, bound: value < bound),
    "multiple": ("and a multiple of {:,}", lambda value, bound: value % bound == 0),
}
MAX_INTEGER = 2**63 - 1


def setting(
    default: Any = MISSING, help: str = "", group: str = "", *, also: tuple[str, ...] = (), **more
) -> Any:
    """Returns the field of a setting. It has a flag if it has a help text.

    A setting without a default must be given. `group` is its group's title in --help, and `also`
    has other names of its flag. `more` may contain bounds (`least`, `most`, `above`, `below`,
    `multiple`), `choices`, or a `pattern` with its `meaning` in words. `words` has the words that a
    number may be instead. `notes` has a line of help for each choice. `shown` is the default as
    --help shows it. `implied_by` contains the flags that set it too. With `own`, each of several
    workers may have its own value. With `first`, --help shows it first in its group. `elsewhere`
    has other programs' flags for the same, and what to do instead.
    """
    return field(default=default, metadata={"help": help, "group": group, "also": also, **more})


def same(kind: type, name: str, **changes: Any) -> Any:
    """Returns the field of a setting that another class has, with changes."""
    (item,) = (item for item in fields(kind) if item.name == name)
    default = changes.pop("default", item.default)
    return field(default=default, metadata={**item.metadata, **changes})


def type_of(item: Field) -> type:
    """Returns a setting's type: int, float, bool, str or one of the tuples."""
    if isinstance(item.type, UnionType):  # ... | None, or a number | a word
        return next(kind for kind in get_args(item.type) if kind is not NoneType)
    return item.type


def valid_values(item: Field) -> str:
    """Returns what a setting's value must be, in words."""
    kind, more = type_of(item), item.metadata
    if choices := [str(choice) for choice in more.get("choices", ())]:
        return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
    if meaning := more.get("meaning"):
        return meaning
    bounds = [word.format(more[name]) for name, (word, _) in BOUNDS.items() if name in more]
    if "least" in more and "most" in more:
        bounds[:2] = [f"{more['least']:,} to {more['most']:,}"]
    return ", ".join(filter(None, (WORDS.get(kind, "text"), " ".join(bounds))))


def check(item: Field, value: Any) -> None:
    """Refuses a value that a setting cannot have."""
    if value is None and (NoneType in get_args(item.type) or item.default is None):
        return
    if isinstance(value, str) and value in item.metadata.get("words", ()):
        return
    kind, values = type_of(item), (value,)
    if get_origin(kind) is tuple:
        kind, last = get_args(kind)
        values = value if isinstance(value, tuple) else (None,)
        if last is not Ellipsis and (len(values) != 2 or values[0] > values[1]):
            values = (None,)  # Not a first and a last value: None fails the check below.
    if not all(_is_possible(item, kind, each) for each in values):
        raise UserError(f"is invalid: it must be {valid_values(item)}.", item.name, value)


def _is_possible(item: Field, kind: type, value: Any) -> bool:
    more = item.metadata
    if type(value) not in ((float, int) if kind is float else (kind,)):
        return False
    if kind is str:
        # An empty value is often a variable that a shell script did not set.
        return (
            (value or item.default == "")
            and value in more.get("choices", (value,))
            and bool(re.fullmatch(more.get("pattern", "(?s).*"), value))
        )
    is_sound = abs(value) <= (sys.float_info.max if kind is float else MAX_INTEGER)  # false for NaN
    bounds = (holds(value, more[name]) for name, (_, holds) in BOUNDS.items() if name in more)
    return is_sound and value in more.get("choices", (value,)) and all(bounds)


class Checked:
    """The base of all dataclasses of settings. It checks the values of each new object."""

    def __post_init__(self) -> None:
        for item in fields(self):
            check(item, getattr(self, item.name))
