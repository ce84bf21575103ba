"""The rules of import: which file of the project may import what."""

import ast
import graphlib
import json
import sys
from pathlib import Path

from programs import PROJECT, run_code

PACKAGE = "cifar10_resnet"
FRONT = (
    *("resnet_model", "cifar10_input"),
    *("run_trainer", "run_evaluator", "cifar10_download_and_extract"),
)
# A floor imports only from the floors above it in this list.
FLOORS = (
    ("resnet_model", "cifar10_input"),
    ("errors", "terminal", "storage", "formats", "settings", "config", "options", "device"),
    ("data", "distributed", "native", "checkpoints", "cli"),
    ("evaluation", "serving"),
    ("figures",),
    ("training",),
    ("commands", "run_trainer", "run_evaluator", "cifar10_download_and_extract"),
    ("__main__",),
)
# Within a floor, everyone may import the first two, and config the formats and the settings.
OPEN_TO_ALL = ("errors", "terminal")
NEIGHBOURS = {
    ("config", "formats"),
    ("config", "settings"),
    ("options", "config"),
    ("options", "formats"),
    ("options", "settings"),
}
PROGRAMS = ("cli", "commands", "__main__", *FRONT[2:])

LIFTED_OUT = {"numpy", "tensorflow"}
STANDARD_LIBRARY_ALONE = (
    *("errors", "terminal", "storage", "formats", "settings", "config", "options"),
    *("distributed.cluster", "distributed.meeting"),
    *("data.download", "data.archive", "data.data_folder", "training.signals"),
)
# These modules may import these packages. All modules may import NumPy, TensorFlow and protobuf.
OWNERS = {
    "absl": ("cli",),
    "matplotlib": ("figures",),
    "PIL": ("data.photos",),
    "tornado": ("serving.server", "commands.serve"),
    "tensorboard": ("training.summaries", "training.history"),
}
FREE = {"numpy", "tensorflow", "google"}
WITH_TENSORFLOW = (
    *("resnet_model", "cifar10_input", "data.splits", "checkpoints", "figures.trace"),
    *("distributed.replicas", "distributed.joining", "distributed.sync_batch_norm"),
    "evaluation.evaluator",
    *(
        "native.kernels",
        "serving.export",
        "serving.graph_check",
        "serving.saved_network",
        "serving.rest",
        "serving.server",
    ),
    *("training.machine", "training.optimizers", "training.trainer"),
    *("training.loop", "training.resume", "training.progress", "training.summaries"),
    *("training.loss_scale", "training.average", "training.mixup"),
)


def rooms() -> dict[str, Path]:
    """Each module of the project, by its name within the package or at the front."""
    inside = {
        ".".join(file.relative_to(PROJECT / PACKAGE).with_suffix("").parts): file
        for file in (PROJECT / PACKAGE).rglob("*.py")
        if file.name != "__init__.py"
    }
    return inside | {name: PROJECT / f"{name}.py" for name in FRONT}


ROOMS = rooms()


def module_of(room: str) -> str:
    return room if room in FRONT else f"{PACKAGE}.{room}"


def imports_of(room: str) -> set[str]:
    """The project's rooms and the packages that a room imports, within its functions too."""
    modules = set()
    for node in ast.walk(ast.parse(ROOMS[room].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            is_package = node.module.partition(".")[0] == PACKAGE
            found = {name for name in whole if is_package and strip(name) in ROOMS}
            modules.update(found or {node.module})
    return {name for name in map(strip, modules) if name not in sys.stdlib_module_names}


def strip(module: str) -> str:
    """A room's name, or a package's."""
    if module.startswith(f"{PACKAGE}."):
        return module.removeprefix(f"{PACKAGE}.")
    return module.partition(".")[0]


def is_in(room: str, names: tuple[str, ...]) -> bool:
    """Returns whether a module is one of these rooms, or is in one of these folders."""
    return room in names or room.partition(".")[0] in names


def floor_of(room: str) -> int:
    (floor,) = (n for n, names in enumerate(FLOORS) if room.partition(".")[0] in names)
    return floor


def may_import(room: str, other: str) -> bool:
    if room in FRONT[:2]:
        return other in LIFTED_OUT
    if other not in ROOMS:
        if is_in(room, STANDARD_LIBRARY_ALONE):
            return False
        return other in FREE or is_in(room, OWNERS.get(other, ()))
    if is_in(other, ("cli",)) and not is_in(room, PROGRAMS):
        return False
    if floor_of(other) != floor_of(room):
        return floor_of(other) < floor_of(room)
    same_folder = "." in room and room.split(".")[0] == other.split(".")[0]
    inside = same_folder and not room.startswith("commands.")
    return inside or other in OPEN_TO_ALL or (room, other) in NEIGHBOURS


def test_the_project_keeps_the_rules_of_import():
    arrows = [(room, other) for room in ROOMS for other in imports_of(room)]
    assert len(arrows) > 100
    broken = {f"{room} imports {other}" for room, other in arrows if not may_import(room, other)}
    assert broken == set()


def test_no_two_rooms_import_each_other_in_a_circle():
    graph = {room: imports_of(room) & ROOMS.keys() for room in ROOMS}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_no_folder_is_deeper_than_one_below_the_package():
    assert max(room.count(".") for room in ROOMS) == 1


IMPORT = """
import importlib, json, signal, sys, threading
from absl import flags
import absl.app, absl.logging  # which define flags of their own

def state():
    handlers = [str(signal.getsignal(number)) for number in signal.valid_signals()]
    return sorted(flags.FLAGS), handlers, threading.active_count()

for module in sys.argv[1:]:
    before = state()
    importlib.import_module(module)
    tensorflow = "tensorflow" in sys.modules
    print(json.dumps([module, tensorflow, state() != before]))
"""


def import_all(*rooms: str) -> dict[str, tuple[bool, bool]]:
    """Returns whether TensorFlow is loaded after each import, and whether the import acted."""
    lines = run_code(IMPORT, *map(module_of, rooms)).stdout.splitlines()
    return {
        strip(module): (tensorflow, acted) for module, tensorflow, acted in map(json.loads, lines)
    }


def test_importing_a_room_starts_nothing_and_tensorflow_only_where_it_is_needed():
    without = sorted(ROOMS.keys() - set(WITH_TENSORFLOW))
    with_it = sorted(WITH_TENSORFLOW, key=list(ROOMS).index)
    found = import_all(*without)
    assert found == dict.fromkeys(without, (False, False))
    # TensorFlow defines its own flags, and is first imported with the network.
    found = import_all("resnet_model", *with_it)
    assert found == dict.fromkeys(with_it, (True, False))
