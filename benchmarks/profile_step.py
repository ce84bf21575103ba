"""Where the time of one training step goes: the profiler's table of operations.

python benchmarks/profile_step.py --num_layers=20 --dtype=bf16
"""

import argparse
import collections
import glob
import os
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from cifar10_resnet.config import ModelConfig, RunConfig
from cifar10_resnet.training.trainer import Trainer

STEPS = 10
# what the profiler records beside single operations: the calls that contain them
AROUND = ("train_step", "Execute", "Run", "Process", "Done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_layers", type=int, default=20)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    flags = parser.parse_args()

    trainer = Trainer(RunConfig(ModelConfig(num_layers=flags.num_layers)), dtype=flags.dtype)
    images = tf.random.stateless_normal([128, 32, 32, 3], [0, 0], stddev=60)
    labels = tf.random.stateless_uniform([128], [0, 1], 0, 10, tf.int32)
    for _ in range(5):
        trainer.train_step(images, labels)
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        started = time.perf_counter()
        for _ in range(STEPS):
            trainer.train_step(images, labels)
        seconds = (time.perf_counter() - started) / STEPS
        tf.profiler.experimental.stop()
        times, counts = read_profile(folder)

    print(f"{seconds * 1e3:.1f} ms a step, profiled; operations may run side by side")
    for name, total in times.most_common(20):
        print(f"{total / STEPS:9.2f} ms {counts[name] / STEPS:6.0f}x  {name}")


def read_profile(folder: str) -> tuple[collections.Counter, collections.Counter]:
    """Milliseconds and calls of each kind of operation."""
    (file,) = glob.glob(os.path.join(folder, "plugins/profile/*/*.xplane.pb"))
    with open(file, "rb") as profile:
        space = xplane_pb2.XSpace.FromString(profile.read())
    times, counts = collections.Counter(), collections.Counter()
    for plane in space.planes:
        if "CPU" not in plane.name and "GPU" not in plane.name:
            continue
        for line in plane.lines:
            for event in line.events:
                # NAME:OPERATION
                name = plane.event_metadata[event.metadata_id].name.split(":")[-1]
                if not any(part in name for part in AROUND):
                    times[name] += event.duration_ps / 1e9
                    counts[name] += 1
    return times, counts


if __name__ == "__main__":
    main()
