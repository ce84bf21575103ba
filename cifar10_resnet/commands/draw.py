"""Draws the diagram of a network, as TensorFlow computes it.

python -m cifar10_resnet draw --num_layers=56 --shortcut_connections=False
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.config import ModelConfig, with_given
from cifar10_resnet.device import start_tensorflow
from cifar10_resnet.settings import Checked, same, setting

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags


@dataclass(frozen=True)
class Settings(Checked):
    num_layers: int = same(ModelConfig, "num_layers")
    shortcut_connections: bool = same(ModelConfig, "shortcut_connections")
    bottleneck: bool = same(ModelConfig, "bottleneck")
    resnet_version: int = same(ModelConfig, "resnet_version")
    output: tuple[str, ...] = setting(
        (),
        "File to write: .png or .pdf (repeatable)",
        "Output",
        pattern=r"(?is)[^,]*\.(png|pdf)",
        meaning="a file that ends in .png or .pdf",
        shown="ResNet20_CIFAR10.pdf, .png and so on",
    )


def main(flags: "Flags") -> int:
    """Draws the network that the flags describe."""
    config = with_given(ModelConfig(), flags.given(ModelConfig))
    stem = config.name.replace("resnet", "ResNet").replace("plain", "Plain") + "_CIFAR10"
    files = flags.output or [f"{stem}.{kind}" for kind in ("pdf", "png")]
    for file in files:
        storage.refuse_unwritable_file(file)

    start_tensorflow("cpu")
    from cifar10_resnet.figures import network
    from cifar10_resnet.figures.trace import trace

    network.draw(trace(config), files)
    return 0


if __name__ == "__main__":
    app.run(main, Settings)
