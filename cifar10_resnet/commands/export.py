"""Exports a network as a SavedModel or for LiteRT.

python -m cifar10_resnet export --ckpt_path=runs/resnet20 --export_dir=savedmodels/resnet20
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.device import start_tensorflow
from cifar10_resnet.errors import UserError
from cifar10_resnet.options import Options, checkpoint
from cifar10_resnet.settings import Checked, same, setting

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

HOW = "Format"


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    ckpt_path: str = checkpoint(group="Network")
    export_dir: str = setting(help="New folder for the exported network", group="Network")
    format: str = setting(
        "saved_model",
        "saved_model for TensorFlow, tflite for LiteRT",
        HOW,
        choices=("saved_model", "tflite"),
    )
    data_format: str = same(
        Options,
        "data_format",
        default="channels_last",
        choices=("channels_last", "channels_first"),
        help="Data format inside the network (channels_first: for GPUs)",
        group=HOW,
    )
    dtype: str = same(Options, "dtype", group=HOW)


def main(flags: "Flags") -> int:
    """Writes the network of a checkpoint to a new folder."""
    if flags.format == "tflite" and (flags.data_format, flags.dtype) != ("channels_last", "fp32"):
        raise UserError("--format=tflite needs channels_last and fp32. Remove the other flags.")
    storage.refuse_patterns(flags.export_dir)
    storage.refuse_unwritable_folder(flags.export_dir)

    start_tensorflow("cpu")  # An export computes nothing large, whatever it is for.
    from cifar10_resnet import checkpoints
    from cifar10_resnet.serving import export

    saved = checkpoints.find(flags.ckpt_path)
    if flags.format == "tflite":
        export.export_tflite(saved, flags.export_dir)
    else:
        export.export_saved_model(saved, flags.export_dir, flags.data_format, flags.dtype)
    return 0


if __name__ == "__main__":
    app.run(main, Settings)
