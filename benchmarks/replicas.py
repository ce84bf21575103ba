"""Measures and computes the cost of spreading one batch over replicas and workers.

`python benchmarks/replicas.py` times the same steps in one process, over virtual CPU devices in one
process, and over processes on loopback. It counts the bytes that pass through loopback. Nothing
gets faster on shared cores, so the lost time is the cost of spreading.

`python benchmarks/replicas.py --on_paper` computes how many GPUs stay 80% efficient. A step starts
the same number of kernels for any number of images, and computes. Then all gradients travel around
a ring of N GPUs in one piece: each GPU sends 2 (N - 1) messages of 1/N of their bytes. Nothing
overlaps, because the sum waits for the last gradient.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks" / "contenders")]

from cifar10_resnet.terminal import table  # noqa: E402

# Each name has its number of processes, and of devices in each process.
LAYOUTS = {
    "one process": (1, 1),
    "2 replicas, one process": (1, 2),
    "2 workers": (2, 1),
    "4 workers": (4, 1),
}


def measure(layers: int, batch_size: int, steps: int, devices: int, sync: bool) -> dict[str, float]:
    """Trains in this process, one worker if TF_CONFIG lists several, and returns time and bytes."""
    import numpy as np
    import tensorflow as tf

    from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig
    from cifar10_resnet.distributed import cluster
    from cifar10_resnet.distributed import replicas as distributed
    from cifar10_resnet.training.trainer import Trainer

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * devices,
    )
    replicas = distributed.choose("auto", cluster.from_environment())
    run = RunConfig(ModelConfig(num_layers=layers), training=TrainingConfig(batch_size=batch_size))
    trainer = Trainer(run, replicas=replicas, sync_batch_norm=sync)
    rng = np.random.default_rng(replicas.worker)
    here = batch_size // replicas.num_workers
    images = tf.constant(rng.normal(0, 60, [here, 32, 32, 3]).astype(np.float32))
    labels = tf.constant(rng.integers(0, 10, here).astype(np.int32))
    times, bytes_before = [], 0
    for step in range(2 + steps):
        if step == 2:  # The step is traced, and the workers are connected.
            replicas.largest(0)
            bytes_before = loopback_bytes()
        started = time.perf_counter()
        trainer.train_step(images, labels)
        trainer.means()
        times.append(time.perf_counter() - started)
    sent = loopback_bytes() - bytes_before
    replicas.largest(0)
    values = [*trainer.optimizer.variables, *trainer._statistics]
    return {
        "milliseconds": 1000 * float(np.median(times[2:])),
        "sent": sent / steps,
        "values": 4 * sum(int(np.prod(v.shape)) for v in values),
    }


def loopback_bytes() -> int:
    """Returns the bytes that this machine has sent to itself since it started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def run_layout(processes: int, devices: int, arguments: list[str]) -> dict[str, float]:
    from cifar10_resnet.distributed import cluster

    addresses = [f"127.0.0.1:{port}" for port in cluster.free_ports(processes)]
    running = []
    for index in range(processes):
        config = cluster.to_tf_config(addresses, index) if processes > 1 else "{}"
        running.append(
            subprocess.Popen(
                [sys.executable, __file__, *arguments, f"--devices={devices}"],
                env=os.environ | {"TF_CONFIG": config, "TF_CPP_MIN_LOG_LEVEL": "2"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    answers = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit("a process failed: its own words are above")
    return json.loads(answers[0].splitlines()[-1])


# --- On paper -------------------------------------------------------------------------------------

IMAGES = 128  # per GPU, or for all GPUs together
EFFICIENT = 0.8
MOST = 10_000
# A large GPU reaches these values on layers as small as these.
FLOPS = 20e12
KERNEL_SECONDS = 4e-6
KERNELS = 12  # per layer: convolution, batch norm, ReLU and their gradients, decay and momentum
BYTES = 4


class Link(NamedTuple):
    """A link between GPUs: bytes per second each way, and the least seconds of a message."""

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
    multiply_adds: int  # per image, in the forward pass
    layers: int

    def step(self, images: float) -> float:
        """Returns the seconds of one GPU's work."""
        computing = 3 * 2 * self.multiply_adds * images / FLOPS
        return KERNELS * self.layers * KERNEL_SECONDS + computing

    def summing(self, gpus: int, link: Link) -> float:
        """Returns the seconds that the gradients travel."""
        message = link.latency + BYTES * self.parameters / gpus / link.bandwidth
        return 2 * (gpus - 1) * message

    def most(self, link: Link, split: bool) -> int:
        """Returns the most GPUs that are efficient, with one batch split or one batch per GPU."""

        def is_efficient(gpus: int) -> bool:
            here = IMAGES / gpus if split else IMAGES
            step = self.step(here) + self.summing(gpus, link)
            return self.step(IMAGES) / (gpus if split else 1) / step >= EFFICIENT

        return max((n for n in range(1, MOST) if is_efficient(n)), default=1)


def show_on_paper() -> None:
    """Prints the most GPUs that train efficiently, for each network and link."""
    from cifar10_resnet.config import ModelConfig
    from resnet_model import ResNet
    from this_project import multiply_adds

    print("| network | ms a step | MB of gradients | " + " | ".join(n.name for n in LINKS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(LINKS))
    for depth in (20, 56, 110):
        config = ModelConfig(num_layers=depth)
        weights = ResNet(**config.arguments()).trainable_variables
        parameters = sum(variable.shape.num_elements() for variable in weights)
        network = Network(parameters, multiply_adds(config), depth)
        most = [f"{network.most(n, False)} ({network.most(n, True)})" for n in LINKS]
        step, size = 1000 * network.step(IMAGES), BYTES * parameters / 1e6
        print(f"| ResNet-{depth} | {step:.1f} | {size:.1f} | {' | '.join(most)} |")


# --- The program ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sync_batch_norm", action="store_true")
    parser.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--on_paper", action="store_true", help="measure nothing: compute")
    options = parser.parse_args()
    if options.on_paper:
        show_on_paper()
        return
    if options.devices:
        what = (options.layers, options.batch_size, options.steps, options.devices)
        print(json.dumps(measure(*what, options.sync_batch_norm)))
        return
    rounds = [
        {name: run_layout(*layout, sys.argv[1:]) for name, layout in LAYOUTS.items()}
        for _ in range(options.rounds)
    ]
    rows = [("", "ms a step", "of one", "MB sent", "MB expected")]
    for name, (processes, _) in LAYOUTS.items():
        times = [found[name]["milliseconds"] for found in rounds]
        ratios = [
            found[name]["milliseconds"] / found["one process"]["milliseconds"] for found in rounds
        ]
        found = rounds[-1][name]
        # Around the ring, each worker sends all parts except one, twice.
        expected = 2 * (processes - 1) * found["values"] / 1e6
        figures = (median(ratios), found["sent"] / 1e6, expected)
        rows.append((name, f"{median(times):.1f}", *(f"{figure:.2f}" for figure in figures)))
    print(table(rows, "<>>>>"))


if __name__ == "__main__":
    main()
