"""Runs one of the project's programs by its name: python -m cifar10_resnet NAME.

`python PATH/cifar10_resnet NAME` does the same from any folder.
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

if not __package__:  # Python put the package's own folder on the path, not the project's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cifar10_resnet.cli.guard import exits_with_a_sentence, prepare_streams
from cifar10_resnet.errors import UserError
from cifar10_resnet.terminal import PROJECT, command, table

COMMANDS = {
    "download": "cifar10_download_and_extract",
    "train": "run_trainer",
    "evaluate": "run_evaluator",
    "classify": "cifar10_resnet.commands.classify",
    "import": "cifar10_resnet.commands.import_photos",
    "plot": "cifar10_resnet.commands.plot",
    "export": "cifar10_resnet.commands.export",
    "serve": "cifar10_resnet.commands.serve",
    "launch": "cifar10_resnet.commands.launch",
    "draw": "cifar10_resnet.commands.draw",
}


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    name, *flags = argv or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        (near,) = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0)
        raise UserError(f"{name!r} is not a command. Did you mean {near}?")
    sys.argv = [f"cifar10_resnet {name}", *flags]
    runpy.run_module(COMMANDS[name], run_name="__main__")
    return 0


def overview() -> str:
    """Returns how to start a command, and a line for each command."""
    lines = {name: first_line(module) for name, module in COMMANDS.items()}
    return "\n".join(
        [
            f"Usage: {command('COMMAND')} [FLAGS]",
            "",
            table(lines.items()),
            "",
            f"{command('COMMAND')} --help lists the flags of a command.",
        ]
    )


def first_line(module: str) -> str:
    """Returns the first line of a module's docstring, without the slow import of its libraries."""
    file = PROJECT.joinpath(*module.split(".")).with_suffix(".py")
    return ast.get_docstring(ast.parse(file.read_text("utf-8"))).splitlines()[0]


if __name__ == "__main__":
    sys.argv[0] = "cifar10_resnet"
    prepare_streams()
    sys.exit(main(sys.argv[1:]))
