"""On paper: up to how many GPUs a training stays 80 % efficient.

The model of a step: a GPU starts so many kernels, however few images it has, and computes; then all
gradients travel around a ring of N in one piece, as 2 (N - 1) messages of 1/N of their bytes from
each. Nothing overlaps, for the sum waits until the last gradient is there.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from this_project import multiply_adds

from cifar10_resnet.config import ModelConfig
from resnet_model import ResNet

IMAGES = 128  # of each GPU, or of all together
EFFICIENT = 0.8
MOST = 10_000
# of a large GPU, on layers as small as these
FLOPS = 20e12
KERNEL_SECONDS = 4e-6
KERNELS = 12  # a layer: convolution, batch norm, ReLU and their gradients, decay and momentum
BYTES = 4


class Link(NamedTuple):
    """What joins the GPUs: bytes a second each way, and seconds that a message takes at least."""

    name: str
    bandwidth: float
    latency: float


LINKS = (
    Link("NVLink, 200 GB/s", 200e9, 3e-6),
    Link("PCIe, 20 GB/s", 20e9, 6e-6),
    Link("network, 10 GB/s", 10e9, 15e-6),
    Link("network, 1 GB/s", 1e9, 30e-6),
)


class Network(NamedTuple):
    parameters: int
    multiply_adds: int  # forward, an image
    layers: int

    def step(self, images: float) -> float:
        """Seconds of one GPU's work."""
        computing = 3 * 2 * self.multiply_adds * images / FLOPS
        return KERNELS * self.layers * KERNEL_SECONDS + computing

    def summing(self, gpus: int, link: Link) -> float:
        """Seconds that the gradients travel."""
        message = link.latency + BYTES * self.parameters / gpus / link.bandwidth
        return 2 * (gpus - 1) * message

    def most(self, link: Link, split: bool) -> int:
        """The most GPUs that are efficient, with the one batch split or one batch for each."""

        def is_efficient(gpus: int) -> bool:
            here = IMAGES / gpus if split else IMAGES
            step = self.step(here) + self.summing(gpus, link)
            return self.step(IMAGES) / (gpus if split else 1) / step >= EFFICIENT

        return max((n for n in range(1, MOST) if is_efficient(n)), default=1)


def main() -> None:
    print("| network | ms a step | MB of gradients | " + " | ".join(n.name for n in LINKS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(LINKS))
    for depth in (20, 56, 110):
        config = ModelConfig(num_layers=depth)
        parameters = sum(v.shape.num_elements() for v in ResNet(config).trainable_variables)
        network = Network(parameters, multiply_adds(config), depth)
        most = [f"{network.most(n, False)} ({network.most(n, True)})" for n in LINKS]
        step, size = 1000 * network.step(IMAGES), BYTES * parameters / 1e6
        print(f"| ResNet-{depth} | {step:.1f} | {size:.1f} | {' | '.join(most)} |")


if __name__ == "__main__":
    main()
