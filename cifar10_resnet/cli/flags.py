"""The flags that the trainer's and the evaluator's command lines share."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from absl import flags

from cifar10_resnet.cli.app import define_device
from cifar10_resnet.formats import FORMATS

FOLDERS = [file_format.folder for file_format in FORMATS.values() if file_format.folder]

flags.DEFINE_string(
    "path",
    None,
    f"Folder of the binary files, or the folder above it (default: {' or '.join(FOLDERS)}).",
)
flags.DEFINE_alias("data_dir", "path")
flags.DEFINE_enum("dataset", None, list(FORMATS), "Data set (default: the one that --path holds).")
flags.DEFINE_bool("coarse_labels", False, "Learn CIFAR-100's 20 coarse labels, not its 100 fine.")
flags.DEFINE_integer(
    "num_layers",
    20,
    "Depth: 6n + 2 layers (20, 32, 44, 56, 110 …), or 9n + 2 with --bottleneck (29, 164 …).",
    lower_bound=1,
)
flags.DEFINE_alias("resnet_size", "num_layers")
flags.DEFINE_bool("shortcut_connections", True, "Whether to build shortcuts; without, a plain net.")
flags.DEFINE_alias("shortcut_connection", "shortcut_connections")
flags.DEFINE_bool(
    "bottleneck", False, "Units of three convolutions (1x1, 3x3, 1x1), four times as deep."
)
flags.DEFINE_enum(
    "resnet_version", "2", ["1", "2"], "Units with ReLU after (1) or before (2) the convolutions."
)
flags.DEFINE_enum(
    "data_format",
    "auto",
    ["auto", "channels_first", "channels_last"],
    "Layout inside the network; auto is channels_first on a GPU, channels_last on a CPU.",
)
flags.DEFINE_enum("dtype", "fp32", ["fp32", "bf16", "fp16"], "What the network computes in.")
flags.DEFINE_float(
    "loss_scale", 128, "With fp16, the loss is multiplied by this against underflow.", lower_bound=1
)
define_device()
flags.DEFINE_bool("quiet", False, "Print nothing but errors and the result.")
flags.DEFINE_bool("verbose", False, "Print all settings, and TensorFlow's own messages.")


def refuse_infinite(*names: str) -> None:
    """Refuses "nan", which lies within all bounds, and "inf", within those without an upper one."""
    for name in names:
        flags.register_validator(
            name, lambda value: value is None or math.isfinite(value), "must be a finite number"
        )


refuse_infinite("loss_scale")

# those that say which network it is, and which data, under the names of config.py's dataclasses
DATA_FLAGS = ("dataset", "coarse_labels")
NETWORK_FLAGS = ("num_layers", "shortcut_connections", "bottleneck", "resnet_version")


@flags.multi_flags_validator(["quiet", "verbose"], "give --quiet or --verbose, not both")
def _one_loudness(values: dict[str, bool]) -> bool:
    return not all(values.values())


@contextlib.contextmanager
def quiet_work() -> Iterator[TextIO]:
    """While entered, what goes to stdout is dropped if --quiet is given; yields the real stdout."""
    stdout = sys.stdout
    if not flags.FLAGS.quiet:
        yield stdout
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield stdout


def given_flags(names: tuple[str, ...]) -> dict[str, Any]:
    """The values of those flags that were given on the command line; None for the others."""
    return {name: flags.FLAGS[name].value if flags.FLAGS[name].present else None for name in names}


def given_network() -> dict[str, Any]:
    """The network's flags that were given, under the names of config.ModelConfig."""
    given = given_flags(NETWORK_FLAGS)
    if given["resnet_version"] is not None:
        given["resnet_version"] = int(given["resnet_version"])
    return given
