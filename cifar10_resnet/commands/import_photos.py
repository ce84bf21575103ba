"""Imports a folder of photos as a data set.

    python -m cifar10_resnet import --image_dir=photos --data_dir=photos-bin

The classes have the names of the sub-folders. Each photo's middle square is resized to 32x32. A
share of every class becomes the test images. The data folder appears only once it is complete.
"""

import math
import os

from absl import flags

from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.data.photo_folder import import_photos
from cifar10_resnet.terminal import command, in_project

FLAGS = flags.FLAGS

flags.DEFINE_string("image_dir", None, "Folder with a sub-folder of photos for each class.")
flags.DEFINE_string("data_dir", None, "New folder for the binary files.")
flags.DEFINE_float("test_share", 0.2, "Share of each class that becomes test images.")
flags.DEFINE_integer("seed", 0, "Of the split and the order.", lower_bound=0)
flags.mark_flags_as_required(["image_dir", "data_dir"])
flags.register_validator("test_share", lambda share: 0 < share < 1, "it is between 0 and 1")

BATCH_SIZE = 128  # The trainer's default.
LEAST_STEPS = 100

FLAG_GROUPS = {"Where from and where to": ("image_dir", "data_dir"), "How": ("test_share", "seed")}


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    count = import_photos(FLAGS.image_dir, FLAGS.data_dir, FLAGS.test_share, FLAGS.seed)
    pretrained = in_project("files", "pretrained", "resnet20")
    train = command(
        "run_trainer.py",
        f"--path={FLAGS.data_dir}",
        f"--pretrained_model_checkpoint_path={pretrained}",
        *training_flags(count),
        f"--ckpt_path={os.path.join('runs', os.path.basename(os.path.normpath(FLAGS.data_dir)))}",
    )
    print(f"next: {train}", flush=True)
    return 0


def training_flags(num_images: int) -> list[str]:
    """Returns the recipe that teaches a pretrained network the classes of so many images."""
    # Few images need many epochs, or the network takes too few steps to learn the new classes.
    epochs = max(20, math.ceil(LEAST_STEPS * BATCH_SIZE / num_images))
    flags = ["--recipe=fast", f"--train_epochs={epochs}"]
    if epochs * num_images / BATCH_SIZE < 1000:
        # The default, 0.99, averages over more steps than so short a run has to spare.
        flags.append("--batch_norm_decay=0.9")
    return flags


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS)
