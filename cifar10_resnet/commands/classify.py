"""Classifies photos and prints the most likely classes with their probabilities.

python -m cifar10_resnet classify --ckpt_path=runs/resnet20 cat.jpg dog.png
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import exits_with_a_sentence, tell
from cifar10_resnet.data.photos import EXTENSIONS, read_photo_file
from cifar10_resnet.device import start_tensorflow
from cifar10_resnet.errors import UserError, printable
from cifar10_resnet.terminal import table

FLAGS = flags.FLAGS
BATCH_SIZE = 500

app.define_device()
flags.DEFINE_string("ckpt_path", None, "A checkpoint's prefix, or a folder: its newest checkpoint.")
flags.DEFINE_alias("model_dir", "ckpt_path")
flags.DEFINE_string("saved_model", None, "Folder that the export command wrote, instead.")
flags.DEFINE_integer("top", 5, "Classes to name for each picture.", lower_bound=1)
flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


@flags.multi_flags_validator(
    ["ckpt_path", "saved_model"], "Pass a network: either --ckpt_path or --saved_model"
)
def _one_network(values: dict[str, object]) -> bool:
    return (values["ckpt_path"] is None) != (values["saved_model"] is None)


FLAGS.set_gnu_getopt()  # pictures and flags may come in any order

FLAG_GROUPS = {
    "The network": ("ckpt_path", "saved_model", "device"),
    "Output": ("top", "json"),
}


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    if len(argv) == 1:
        raise UserError("No photos given. Pass photo files, or folders of photos.")
    folder = FLAGS.saved_model
    if folder is not None and not os.path.isfile(os.path.join(folder, "saved_model.pb")):
        raise UserError(f"{folder} is not a SavedModel: name the folder that holds saved_model.pb.")
    answer, classes = _load()
    names, images, all_read = [], [], True
    for name, picture in itertools.chain.from_iterable(map(_read, argv[1:])):
        if isinstance(picture, UserError):
            tell(picture)
            all_read = False
        else:
            names.append(name)
            images.append(picture)
    results = _classify(answer, classes, names, images)
    # a file's name may hold characters that the terminal's encoding lacks
    sys.stdout.reconfigure(errors="backslashreplace")
    if FLAGS.json:
        print(json.dumps(results, indent=2))
    elif results:
        print(_table(results))
    return 0 if all_read else 1


def _read(path: str) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """The picture or the folder of pictures at `path`: pixels, or why there are none."""
    try:
        if os.path.isdir(path):
            for name in _pictures_in(path):
                yield from _read(os.path.join(path, name))
        else:
            yield path, read_photo_file(path)
    except UserError as error:
        yield path, error


def _pictures_in(folder: str) -> list[str]:
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(EXTENSIONS)]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}.") from error
    if not names:
        raise UserError(f"there is no picture in {folder} ({', '.join(EXTENSIONS)}).")
    return sorted(names)


def _load() -> tuple[Callable[[np.ndarray], dict[str, Any]], list[str]]:
    """The network as a function of pixels, and its classes."""
    start_tensorflow(FLAGS.device)
    from cifar10_resnet import checkpoints
    from cifar10_resnet.serving import export
    from cifar10_resnet.serving.saved_network import SavedNetwork

    if FLAGS.saved_model is None:
        network = export.load_classifier(checkpoints.find(FLAGS.ckpt_path))
        return network.from_pixels, [name.decode() for name in network.class_names.numpy()]
    network = SavedNetwork(FLAGS.saved_model)
    return network, network.class_names


def _classify(
    answer: Callable[[np.ndarray], dict[str, Any]],
    classes: list[str],
    names: list[str],
    images: list[np.ndarray],
) -> list[dict[str, Any]]:
    """The likeliest classes of each picture."""
    probabilities: list[np.ndarray] = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = np.stack(images[start : start + BATCH_SIZE])
        probabilities.extend(np.asarray(answer(batch)["probabilities"]))
    return [
        {
            "picture": name,
            "classes": [
                {"name": classes[i], "probability": float(shares[i])}
                for i in np.argsort(-shares, kind="stable")[: FLAGS.top]
            ],
        }
        for name, shares in zip(names, probabilities, strict=True)
    ]


def _table(results: list[dict[str, Any]]) -> str:
    """A line for each class; the picture's name stands on the first of its lines."""
    rows = [
        (
            printable(result["picture"]) if i == 0 else "",
            guess["name"],
            f"{guess['probability']:.4f}",
        )
        for result in results
        for i, guess in enumerate(result["classes"])
    ]
    return table(rows, indent="")


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS, takes_arguments=True)
