"""How every command starts: --help, with the flags in groups, and wrong flags told in a line.

A program defines absl flags as usual, sorts their names into groups and ends in
`app.run(main, FLAG_GROUPS)`.
"""

import difflib
import inspect
import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import app as absl_app
from absl import flags, logging

from cifar10_resnet.cli.guard import exits_with_a_sentence, open_closed_streams
from cifar10_resnet.errors import UserError
from cifar10_resnet.terminal import emphasised

FLAGS = flags.FLAGS
# titles of groups, as --help shows them, and the names of the flags in each
Groups = Mapping[str, Sequence[str]]

NAMES_WIDTH = 28
MAX_WIDTH = 100
UNBROKEN = "\N{NO-BREAK SPACE}"


# What is defined by a function below is a flag of the program that calls it.
flags.disclaim_key_flags()


def define_device() -> None:
    """Defines the flag --device."""
    text = "Device to use (auto: a GPU if TensorFlow finds one)"
    flags.DEFINE_enum("device", "auto", ["auto", "cpu", "gpu"], text)


def run(
    main: Callable[[list[str]], int | None], groups: Groups, takes_arguments: bool = False
) -> None:
    """Parses the flags and runs `main`, as `absl.app.run` does."""

    def parse(argv: list[str]) -> list[str]:
        flags.DEFINE_flag(_HelpFlag(inspect.unwrap(main).__globals__["__doc__"], groups))
        try:
            arguments = FLAGS([_at_home(argument) for argument in argv])
        except flags.Error as error:
            raise _sentence(error, groups) from error
        if len(arguments) > 1 and not takes_arguments:
            raise UserError(
                f"{arguments[1]!r} is not a flag. Write --flag=value, for example "
                "--shortcut_connections=False."
            )
        if not FLAGS["verbosity"].present and not ("verbose" in FLAGS and FLAGS.verbose):
            logging.set_verbosity(logging.WARNING)
        return arguments

    open_closed_streams()
    # absl ends the process itself; what goes wrong before `main` comes back.
    sys.exit(exits_with_a_sentence(absl_app.run)(main, flags_parser=parse))


def _at_home(argument: str) -> str:
    """A flag such as --path=~/data as it is meant: shells leave a ~ alone behind a = sign."""
    flag, equals, value = argument.partition("=")
    return flag + equals + os.path.expanduser(value) if value.startswith("~") else argument


class _HelpFlag(absl_app.HelpFlag):
    """--help, in place of absl's: in groups, and asking for help is no failure."""

    def __init__(self, description: str, groups: Groups):
        super().__init__()
        self.allow_override = True
        self._description, self._groups = description, groups

    def parse(self, argument: str) -> None:
        if self._parse(argument):
            width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
            # Flushed here, where it is noticed that the reader has gone, as in `--help | head -3`.
            print(help_text(self._description, self._groups, width), flush=True)
            sys.exit(0)


def help_text(description: str, groups: Groups, width: int) -> str:
    """What --help prints."""
    lines = [inspect.cleandoc(description)]
    for title, names in groups.items():
        lines += ["", emphasised(title, sys.stdout)]
        for name in names:
            lines += _flag_lines(name, width)
    lines += ["", "--helpfull lists the flags of the libraries too."]
    return "\n".join(lines)


def _flag_lines(name: str, width: int) -> list[str]:
    names = ", ".join(names_of(name))
    # where the terminal is narrow, or the names are long, the text goes below them
    indent = NAMES_WIDTH if width >= 80 else 6
    below = len(names) + 3 >= indent
    text = textwrap.fill(
        explanation(name),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    text = text.replace(UNBROKEN, " ")
    return [f"  {names}", text] if below else [f"  {names}".ljust(indent) + text[indent:]]


def names_of(name: str) -> list[str]:
    """Returns a flag and its aliases, as they are typed."""
    prefix = "--[no]" if FLAGS[name].boolean else "--"
    return [prefix + each for each in (name, *_aliases(name))]


def _aliases(name: str) -> list[str]:
    return [other for other in FLAGS if FLAGS[other].help == f"Alias for --{name}."]


def explanation(name: str) -> str:
    """Returns what a flag does, its choices and its default."""
    flag = FLAGS[name]
    text = _help_of(name).rstrip(".")
    # with spaces, long lists of choices can be broken
    text = re.sub(r"^<.*?>", lambda choices: choices[0].replace("|", " | "), text)
    if flag.default is None or "default" in text.lower():
        return text
    values = flag.default if isinstance(flag.default, list) else [flag.default]
    default = ", ".join(str(value).lower() if flag.boolean else str(value) for value in values)
    return f"{text} (default:{UNBROKEN}{default})"


def _help_of(name: str) -> str:
    """Returns a flag's help, without what absl adds if the flag may be repeated."""
    return FLAGS[name].help.partition(";\n    repeat this option")[0]


def _all_names(groups: Groups) -> Iterator[str]:
    for name in itertools.chain.from_iterable(groups.values()):
        for each in (name, *_aliases(name)):
            yield from (each, f"no{each}") if FLAGS[name].boolean else (each,)


def _sentence(error: flags.Error, groups: Groups) -> UserError:
    """absl's complaint about the flags, in words for people."""
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, _all_names(groups), 1)
        advice = f"did you mean --{near[0]}?" if near else "--help lists those there are."
        return UserError(f"there is no flag --{error.flagname}: {advice}")
    complaint = re.fullmatch(r"flag (--(\w+))=(.*?): (.*?)\.?", str(error).splitlines()[0])
    if complaint is None:
        # about several flags, or none of them
        return UserError(re.sub(r"^flags .*?: |\.$", "", str(error).splitlines()[0]) + ".")
    flag, name, value, reason = complaint.groups()
    parser, text = FLAGS[name].parser, _help_of(name)
    if reason == f"Flag {flag} must have a value other than None":
        return UserError(f"{flag} is missing: {text[0].lower()}{text[1:]}")
    if isinstance(error.__context__, TypeError | ValueError):
        choices = " or ".join(getattr(parser, "enum_values", []))
        reason = f"it must be {choices or parser.syntactic_help or 'true or false'}"
    return UserError(f"{flag}={value} will not do: {reason}.")
