"""Defines, explains and reads the flags of a program's settings."""

import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_origin

from absl import flags

from cifar10_resnet.config import depends_on_recipe
from cifar10_resnet.errors import UserError
from cifar10_resnet.settings import Checked, check, type_of, valid_values

UNBROKEN = "\N{NO-BREAK SPACE}"  # It keeps a default's value on the line of "default:".


def items_of(settings: type[Checked]) -> list[Field]:
    """Returns the settings that have a flag."""
    return [item for item in fields(settings) if item.metadata["help"]]


def groups_of(settings: type[Checked]) -> dict[str, list[Field]]:
    """Returns the groups of flags by their titles, as --help shows them."""
    groups: dict[str, list[Field]] = {}
    for item in items_of(settings):
        groups.setdefault(item.metadata["group"], []).append(item)
    return {
        title: sorted(items, key=lambda item: not item.metadata.get("first"))
        for title, items in groups.items()
    }


def names_of(item: Field) -> list[str]:
    """Returns the name and the other names of a flag, as they are typed."""
    prefix = "--[no]" if type_of(item) is bool else "--"
    return [prefix + name for name in (item.name, *item.metadata["also"])]


def explanation(item: Field) -> str:
    """Returns what a flag does, its choices and its default. Notes on choices are lines below."""
    text, choices = item.metadata["help"], list(map(str, item.metadata.get("choices", ())))
    notes = item.metadata.get("notes", {})
    if not notes and not set(choices) <= set(re.findall(r"\w+", text)):
        text = f"<{' | '.join(choices)}>: {text}"
    shown = item.metadata.get("shown", _shown(item.default))
    if depends_on_recipe(item):
        shown = f"the recipe's; paper: {shown}"
    text = f"{text} (default:{UNBROKEN}{shown})" if shown else text
    return "\n".join([text, *(f"{choice}: {note}" for choice, note in notes.items())])


def _shown(value: Any) -> str:
    if value in (MISSING, None):
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


class _Parser(flags.ArgumentParser):
    """The parser of a flag. It refuses values that the flag's setting cannot have."""

    def __init__(self, item: Field):
        self.item, self.kind = item, type_of(item)
        self.is_repeatable = Ellipsis in get_args(self.kind)

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):  # a default
            return argument
        try:
            # Shells do not expand the ~ of --path=~/data.
            value = self._convert(os.path.expanduser(argument))
            check(self.item, (value,) if self.is_repeatable else value)
        except (ValueError, OverflowError, UserError) as error:
            why = f"is invalid: it must be {valid_values(self.item)}."
            raise UserError(why, self.item.name, argument) from error
        return value

    def _convert(self, text: str) -> Any:
        if text in self.item.metadata.get("words", ()):
            return text
        if self.kind is bool:
            return flags.BooleanParser().parse(text)
        if get_origin(self.kind) is not tuple:
            return self.kind(text)
        kind = get_args(self.kind)[0]
        return kind(text) if self.is_repeatable else tuple(map(kind, text.split(",")))


def define(settings: type[Checked], values: flags.FlagValues) -> None:
    """Defines a flag for each setting. Replaces flags that were defined before."""
    for item in items_of(settings):
        parser, is_bool = _Parser(item), type_of(item) is bool
        kind = flags.MultiFlag if parser.is_repeatable else flags.Flag
        is_plain = item.default is not MISSING and "shown" not in item.metadata
        default = item.default if is_plain and not depends_on_recipe(item) else None
        default = list(default) if isinstance(default, tuple) else default
        serializer = flags.ArgumentSerializer()
        for name in (item.name, *item.metadata["also"]):
            if name in values:
                delattr(values, name)
        flags.DEFINE_flag(
            kind(parser, serializer, item.name, default, explanation(item), boolean=is_bool), values
        )
        for name in item.metadata["also"]:
            flags.DEFINE_alias(name, item.name, values)


class Flags:
    """The values of a program's flags, and the names under which flags were typed."""

    def __init__(
        self, settings: type[Checked], argv: Sequence[str], values: flags.FlagValues | None = None
    ):
        self._items = {item.name: item for item in items_of(settings)}
        self._argv, self._values = argv[1:], flags.FlagValues() if values is None else values
        define(settings, self._values)

    def parse(self) -> "Flags":
        """Reads the command line. Words that are not flags become `arguments`."""
        self.arguments = self._values(["", *self._argv])[1:]
        for name, item in self._items.items():
            if item.default is MISSING and getattr(self, name) is None:
                text = item.metadata["help"]
                raise UserError(f"--{name} is missing. Pass a {text[0].lower()}{text[1:]}.")
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._items:
            raise AttributeError(name)
        value = self._values[name].value
        return tuple(value) if isinstance(value, list) else value

    def make(self, settings: type[Checked]) -> Any:
        """Returns the settings of one class with the values of these flags."""
        return settings(**{item.name: getattr(self, item.name) for item in items_of(settings)})

    def given(self, *kinds: type[Checked]) -> dict[str, Any]:
        """Returns the typed flags that are settings of these classes, with their values."""
        names = {item.name for kind in kinds for item in items_of(kind)} & self._items.keys()
        return {name: getattr(self, name) for name in sorted(names) if self._values[name].present}

    def in_common(self) -> dict[str, Any]:
        """Returns the flags that must be the same on all workers, with their values."""
        items = self._items.values()
        return {f"--{i.name}": getattr(self, i.name) for i in items if not i.metadata.get("own")}

    def worded(self, error: UserError) -> str:
        """Returns an error's sentence, with each flag under the name that was typed."""
        sentence, item = str(error), self._items.get(error.argument)
        if item:
            others = [name for name in item.metadata.get("implied_by", ()) if self._typed(name)]
            if self._typed(item.name) or not others:
                sentence = f"{'' if self._typed(item.name) else 'the default '}--{sentence}"
            else:
                sentence = f"--{others[0]}={getattr(self, others[0])} {error.why}"
        return re.sub(
            r"--(\w+)", lambda found: "--" + (self._typed(found[1]) or found[1]), sentence
        )

    def _typed(self, name: str) -> str | None:
        """Returns the name under which a flag was typed, if it was."""
        item = self._items.get(name)
        for each in (name, *item.metadata["also"]) if item else ():
            if any(re.match(rf"--?(no)?{each}(=|$)", argument) for argument in self._argv):
                return each
        return None
