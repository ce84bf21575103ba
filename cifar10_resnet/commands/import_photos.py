"""Imports a folder of photos as a data set.

    python -m cifar10_resnet import --image_dir=photos --data_dir=photos-bin

The classes have the names of the sub-folders. Each photo's centre square is scaled to 32x32. A
share of every class becomes the test images. The data folder appears only once it is complete.
"""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar10_resnet.cli import app
from cifar10_resnet.settings import Checked, setting
from cifar10_resnet.terminal import command, in_project

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags

BATCH_SIZE = 128  # The trainer's default.
LEAST_STEPS = 100

FOLDERS = "Folders"


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    image_dir: str = setting(help="Folder with one sub-folder of photos per class", group=FOLDERS)
    data_dir: str = setting(help="New folder for the data set", group=FOLDERS)
    test_share: float = setting(
        0.2, "Fraction of each class used as test images", "Split", above=0, below=1
    )
    seed: int = setting(0, "Random seed for the split and the order", "Split", least=0)


def main(flags: "Flags") -> int:
    """Imports the photos, and prints the command that trains on them."""
    # Imported late, because it imports Pillow and NumPy.
    from cifar10_resnet.data.photo_folder import import_photos

    count = import_photos(flags.image_dir, flags.data_dir, flags.test_share, flags.seed)
    pretrained = in_project("files", "pretrained", "resnet20")
    train = command(
        "run_trainer.py",
        f"--path={flags.data_dir}",
        f"--pretrained_model_checkpoint_path={pretrained}",
        *training_flags(count),
        f"--ckpt_path={os.path.join('runs', os.path.basename(os.path.normpath(flags.data_dir)))}",
    )
    print(f"next: {train}", flush=True)
    return 0


def training_flags(num_images: int) -> list[str]:
    """Returns the flags that train a pretrained network on `num_images` photos."""
    batch_size = min(BATCH_SIZE, num_images)  # The trainer reduces its default batch in this way.
    # Few images need many epochs, or the network takes too few steps to learn the new classes.
    epochs = max(20, math.ceil(LEAST_STEPS * batch_size / num_images))
    flags = ["--recipe=fast", f"--train_epochs={epochs}"]
    if epochs * num_images / batch_size < 1000:
        # The default, 0.99, averages over more steps than so short a run has.
        flags.append("--batch_norm_decay=0.9")
    return flags


if __name__ == "__main__":
    app.run(main, Settings)
