"""Prints where the time of a training step goes, and how fast the step could be.

python benchmarks/where_time_goes.py --num_layers=20 --dtype=bf16

It prints the operations that take longest, as TensorFlow's profiler records them. On a CPU, it then
times each convolution of the network separately, forward and both gradients, and one large matrix
product. This shows how long the step would take if everything else were free.
"""

import argparse
import collections
import glob
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from cifar10_resnet.config import ModelConfig, RunConfig
from cifar10_resnet.native import kernels
from cifar10_resnet.options import Options
from cifar10_resnet.training.trainer import Trainer
from resnet_model import DTYPES

BATCH = 128
STEPS = 10
MATRIX_SIDE = 4096
# The profiler also records these calls, which contain the operations.
AROUND = ("train_step", "Execute", "Run", "Process", "Done")


def convolutions(num_layers: int) -> dict[tuple[int, int, int, int], int]:
    """Returns the count for each (channels in, channels out, side of the input, stride)."""
    pairs = (num_layers - 2) // 3
    return {
        (3, 16, 32, 1): 1,
        (16, 16, 32, 1): pairs,
        (16, 32, 32, 2): 1,
        (32, 32, 16, 1): pairs - 1,
        (32, 64, 16, 2): 1,
        (64, 64, 8, 1): pairs - 1,
    }


# --- The step -------------------------------------------------------------------------------------


def show_operations(num_layers: int, dtype: str, native: str) -> None:
    """Prints the operations that take longest in a step."""
    options = Options(native=native, data_format="channels_last", dtype=dtype)
    run = RunConfig(ModelConfig(num_layers=num_layers))
    trainer = Trainer(run, dtype=dtype, native_library=kernels.library(options))
    images = tf.random.stateless_normal([BATCH, 32, 32, 3], [0, 0], stddev=60)
    labels = tf.random.stateless_uniform([BATCH], [0, 1], 0, 10, tf.int32)
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
    """Returns the milliseconds and the calls of each kind of operation."""
    (file,) = glob.glob(os.path.join(folder, "plugins/profile/*/*.xplane.pb"))
    with open(file, "rb") as profile:
        space = xplane_pb2.XSpace.FromString(profile.read())
    times, counts = collections.Counter(), collections.Counter()
    for plane in space.planes:
        if "CPU" not in plane.name and "GPU" not in plane.name:
            continue
        for line in plane.lines:
            for event in line.events:
                # The name is NAME:OPERATION.
                name = plane.event_metadata[event.metadata_id].name.split(":")[-1]
                if not any(part in name for part in AROUND):
                    times[name] += event.duration_ps / 1e9
                    counts[name] += 1
    return times, counts


# --- The convolutions -----------------------------------------------------------------------------


def show_convolutions(num_layers: int, dtype: tf.DType) -> None:
    """Prints each convolution's time, and their share of a matrix product's rate."""
    matrix = tf.cast(tf.random.normal([MATRIX_SIDE, MATRIX_SIDE]), dtype)
    rate = MATRIX_SIDE**3 / median_seconds(tf.linalg.matmul, matrix, matrix)
    print(f"\nmatrix product: {rate / 1e9:.0f} GMAC/s")
    seconds_of_all, multiply_adds = 0.0, 0
    print("in  out side stride  count   forward  to input  to kernel   (ms each)")
    for shape, count in convolutions(num_layers).items():
        depth_in, depth, side, stride = shape
        seconds = convolution_seconds(*shape, dtype)
        seconds_of_all += count * sum(seconds)
        multiply_adds += 3 * count * BATCH * 9 * depth_in * depth * (side // stride) ** 2
        columns = "".join(f"{1e3 * each:10.2f}" for each in seconds)
        print("{:2} {:4} {:4} {:5}".format(*shape), f"{count:7}{columns}")
    share = multiply_adds / seconds_of_all / rate
    print(
        f"all convolutions of a step: {1e3 * seconds_of_all:.1f} ms, from a warm cache; a step of "
        f"these alone would reach {share:.0%} of the matrix product's rate"
    )


def convolution_seconds(depth_in: int, depth: int, side: int, stride: int, dtype: tf.DType) -> list:
    """Returns the seconds of a convolution and of its gradients to the input and to the kernel."""
    images = tf.cast(tf.random.normal([BATCH, side, side, depth_in]), dtype)
    kernel = tf.cast(tf.random.normal([3, 3, depth_in, depth]), dtype)
    gradient = tf.cast(tf.random.normal([BATCH, side // stride, side // stride, depth]), dtype)
    how = {"strides": [1, stride, stride, 1], "padding": "SAME"}

    def forward(x: tf.Tensor, k: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.Conv2D(input=x, filter=k, **how)

    def to_input(k: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
        sizes = images.shape
        return tf.raw_ops.Conv2DBackpropInput(input_sizes=sizes, filter=k, out_backprop=g, **how)

    def to_kernel(x: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
        sizes = kernel.shape
        return tf.raw_ops.Conv2DBackpropFilter(input=x, filter_sizes=sizes, out_backprop=g, **how)

    return [
        median_seconds(forward, images, kernel),
        # The first convolution does not need the gradient to the images.
        median_seconds(to_input, kernel, gradient) if depth_in > 3 else 0.0,
        median_seconds(to_kernel, images, gradient),
    ]


def median_seconds(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> float:
    """Returns the median time of 25 calls, after five warm-up calls."""
    compiled = tf.function(function, autograph=False)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        compiled(*arguments)
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_layers", type=int, default=20)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--native", choices=("auto", "on", "off"), default="auto")
    flags = parser.parse_args()
    show_operations(flags.num_layers, flags.dtype, flags.native)
    if not tf.config.list_physical_devices("GPU"):
        show_convolutions(flags.num_layers, DTYPES[flags.dtype])


if __name__ == "__main__":
    main()
