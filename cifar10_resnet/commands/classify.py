"""Classifies photos and prints the most likely classes with their probabilities.

python -m cifar10_resnet classify --ckpt_path=runs/resnet20 cat.jpg dog.png

A SavedModel is a program that runs with your rights. The command refuses a SavedModel that can do
more than classify images. Pass --trust to load it if you trust its source.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import tell
from cifar10_resnet.device import start_tensorflow
from cifar10_resnet.errors import UserError, printable
from cifar10_resnet.options import Options, checkpoint, saved_model, trust
from cifar10_resnet.settings import Checked, same, setting
from cifar10_resnet.terminal import table

BATCH_SIZE = 500

if TYPE_CHECKING:
    import numpy as np

    from cifar10_resnet.cli.flags import Flags

    Answer = Callable[[np.ndarray], dict[str, Any]]


@dataclass(frozen=True)
class Settings(Checked):
    ckpt_path: str | None = checkpoint(None, group="Network")
    saved_model: str | None = saved_model(None)
    trust: bool = trust()
    device: str = same(Options, "device", group="Network")
    top: int = setting(5, "Number of classes to print per photo", "Output", least=1)
    json: bool = setting(False, "Print JSON instead of a table", "Output")


def main(flags: "Flags") -> int:
    """Prints the most likely classes of each photo."""
    if (flags.ckpt_path is None) == (flags.saved_model is None):
        raise UserError("One network is needed. Use either --ckpt_path or --saved_model.")
    if not flags.arguments:
        raise UserError("No photos given. Pass photo files, or folders of photos.")
    if flags.saved_model is not None:
        storage.refuse_without_saved_model(flags.saved_model)
    from cifar10_resnet.data.photos import read_photos  # It imports Pillow, which may be missing.

    answer, classes = _load(flags)
    names, images, all_read = [], [], True
    for name, photo in read_photos(flags.arguments):
        if isinstance(photo, UserError):
            tell(photo)
            all_read = False
        else:
            names.append(name)
            images.append(photo)
    results = _classify(answer, classes, names, images, flags.top)
    if flags.json:
        print(json.dumps(results, indent=2))
    elif results:
        print(_table(results))
    return 0 if all_read else 1


def _load(flags: "Flags") -> "tuple[Answer, list[str]]":
    """Returns the network as a function of pixels, and its classes."""
    start_tensorflow(flags.device)
    from cifar10_resnet import checkpoints
    from cifar10_resnet.serving import export
    from cifar10_resnet.serving.saved_network import SavedNetwork

    if flags.saved_model is None:
        saved = checkpoints.find(flags.ckpt_path)
        return export.load_classifier(saved).from_pixels, list(saved.run.data.class_names)
    network = SavedNetwork(flags.saved_model, flags.trust)
    return network, network.class_names


def _classify(
    answer: "Answer",
    classes: list[str],
    names: list[str],
    images: "list[np.ndarray]",
    top: int,
) -> list[dict[str, Any]]:
    """Returns the most likely classes of each photo."""
    import numpy as np

    from cifar10_resnet.serving.saved_network import best_classes

    probabilities: list[np.ndarray] = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = np.stack(images[start : start + BATCH_SIZE])
        probabilities.extend(np.asarray(answer(batch)["probabilities"]))
    return [
        {"picture": name, "classes": best_classes(shares, classes, top)}
        for name, shares in zip(names, probabilities, strict=True)
    ]


def _table(results: list[dict[str, Any]]) -> str:
    """Returns a line for each class. The photo's name is on its first line."""
    rows = [
        (
            printable(result["picture"]) if i == 0 else "",
            guess["name"],
            f"{guess['probability']:.2%}",
        )
        for result in results
        for i, guess in enumerate(result["classes"])
    ]
    return table(rows, "<<>", indent="")


if __name__ == "__main__":
    app.run(main, Settings, arguments="anywhere")  # photos and flags in any order
