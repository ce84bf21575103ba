"""ResNets on CIFAR-10 with TensorFlow: the code behind the programs in the folder above."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cifar10_resnet.serving.export import Classifier


def load(network: str) -> "Classifier":
    """Returns a trained network with its classes: `load("resnet56").classify(images)`.

    `network` is the name of a folder in files/pretrained, a run folder or a checkpoint.
    """
    import os

    from cifar10_resnet import checkpoints
    from cifar10_resnet.errors import UserError
    from cifar10_resnet.serving import export
    from cifar10_resnet.terminal import PROJECT

    pretrained = PROJECT / "files" / "pretrained"
    shipped = sorted(path.name for path in pretrained.iterdir() if path.is_dir())
    if network in shipped and not os.path.exists(network):
        network = str(pretrained / network)
    elif not any((os.path.dirname(network), *map(os.path.exists, (network, network + ".index")))):
        raise UserError(
            f"{network!r} is not a network. Pass a run folder, a checkpoint or one of "
            f"{', '.join(shipped)}."
        )
    return export.load_classifier(checkpoints.find(network))
