"""Starts every program: reads its flags, prints --help, and refuses wrong flags in one line.

A program defines its settings in a dataclass and ends with `app.run(main, Settings)`.
"""

import difflib
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from cifar10_resnet.cli.guard import Terminated, exits_with_a_sentence, prepare_streams
from cifar10_resnet.errors import UserError
from cifar10_resnet.settings import Checked
from cifar10_resnet.terminal import emphasised

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

NAMES_WIDTH = 28
MAX_WIDTH = 100


def run(
    main: "Callable[[Flags], int | None]", settings: type[Checked], arguments: str = ""
) -> None:
    """Reads the flags and runs `main`.

    If a program takes arguments other than flags, `arguments` is "anywhere" or "last".
    """
    prepare_streams()
    sys.exit(exits_with_a_sentence(_run)(main, settings, arguments))


def _run(
    main: "Callable[[Flags], int | None]", settings: type[Checked], arguments: str
) -> int | None:
    # Imported late, so a missing absl, or Ctrl-C meanwhile, ends with a one-line error.
    from absl import app, flags, logging

    from cifar10_resnet.cli.flags import Flags

    given = Flags(settings, sys.argv, flags.FLAGS)

    class Help(app.HelpFlag):
        """The --help flag, instead of absl's. It prints groups, and the exit status is 0."""

        def parse(self, argument: str) -> None:
            if self._parse(argument):
                width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
                # Flushed here, where an error is handled if the reader has gone.
                print(help_text(main.__globals__["__doc__"], settings, width), flush=True)
                sys.exit(0)

    def parse(argv: list[str]) -> list[str]:
        help_flag = Help()
        help_flag.allow_override = True
        flags.DEFINE_flag(help_flag)
        flags.FLAGS.set_gnu_getopt(arguments == "anywhere")
        try:
            given.parse()
        except flags.Error as error:
            raise _sentence(error, settings) from error
        if given.arguments and not arguments:
            raise UserError(
                f"{given.arguments[0]!r} is not a flag. Write --flag=value, for example "
                "--shortcut_connections=False."
            )
        if not flags.FLAGS["verbosity"].present and not getattr(given, "verbose", False):
            logging.set_verbosity(logging.WARNING)
        return argv

    try:
        app.run(lambda argv: main(given), argv=sys.argv, flags_parser=parse)
    except UserError as error:
        raise UserError(given.worded(error)) from error
    except Terminated:
        raise
    except SystemExit as end:  # absl would end the process before all of its output is written.
        return end.code


def help_text(description: str, settings: type[Checked], width: int) -> str:
    """Returns what --help prints."""
    from cifar10_resnet.cli.flags import explanation, groups_of, names_of

    lines = [inspect.cleandoc(description or "")]  # Python keeps no docstrings with -OO.
    for title, items in groups_of(settings).items():
        lines += ["", emphasised(title, sys.stdout)]
        for item in items:
            lines += _flag_lines(", ".join(names_of(item)), explanation(item), width)
    lines += ["", "--helpfull lists the flags of the libraries too."]
    return "\n".join(lines)


def _flag_lines(names: str, meaning: str, width: int) -> list[str]:
    # If the terminal is narrow or the names are long, the text goes below the names.
    indent = NAMES_WIDTH if width >= 80 else 6
    below = len(names) + 3 >= indent
    wrapper = textwrap.TextWrapper(
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    text = "\n".join(map(wrapper.fill, meaning.split("\n")))
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    return [f"  {names}", text] if below else [f"  {names}".ljust(indent) + text[indent:]]


def _sentence(error: Exception, settings: type[Checked]) -> UserError:
    """Returns absl's error about the flags in plain words."""
    from cifar10_resnet.cli.flags import items_of, names_of

    if unknown := getattr(error, "flagname", None):
        typed = [name.lstrip("-") for item in items_of(settings) for name in names_of(item)]
        names = [prefix + name.removeprefix("[no]") for name in typed for prefix in _prefixes(name)]
        near = difflib.get_close_matches(unknown, names, 1)
        near += [name for name in names if unknown in name.split("_")]  # --lr: --init_lr
        advice = f"Did you mean --{near[0]}?" if near else "--help lists the flags."
        for item in items_of(settings):
            advice = item.metadata.get("elsewhere", {}).get(unknown, advice)
        return UserError(f"--{unknown} is not a flag. {advice}")
    if missing := re.match(r"Missing value for flag (--\S+)", str(error)):
        return UserError(f"{missing[1]} needs a value. Write {missing[1]}=value.")
    return UserError(re.sub(r"\.$", "", str(error).splitlines()[0]) + ".")


def _prefixes(name: str) -> tuple[str, ...]:
    return ("", "no") if name.startswith("[no]") else ("",)
