"""How fast ResNet-20's step could be if all but its convolutions were free.

Times every convolution of the network alone, forward and both gradients, and one large matrix
product: python benchmarks/limits.py --dtype=bf16
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

BATCH, MULTIPLY_ADDS = 128, 3 * 40.55e6
# (channels in, channels out, side of the input, stride): how many of them
CONVOLUTIONS = {
    (3, 16, 32, 1): 1,
    (16, 16, 32, 1): 6,
    (16, 32, 32, 2): 1,
    (32, 32, 16, 1): 5,
    (32, 64, 16, 2): 1,
    (64, 64, 8, 1): 5,
}


def median_seconds(function: Callable[..., tf.Tensor], *arguments: tf.Tensor) -> float:
    compiled = tf.function(function, autograph=False)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        compiled(*arguments)
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:])


def convolution_seconds(depth_in: int, depth: int, side: int, stride: int, dtype: tf.DType) -> list:
    images = tf.cast(tf.random.normal([BATCH, side, side, depth_in]), dtype)
    kernel = tf.cast(tf.random.normal([3, 3, depth_in, depth]), dtype)
    gradient = tf.cast(tf.random.normal([BATCH, side // stride, side // stride, depth]), dtype)
    how = {"strides": [1, stride, stride, 1], "padding": "SAME"}
    return [
        median_seconds(lambda x, k: tf.raw_ops.Conv2D(input=x, filter=k, **how), images, kernel),
        median_seconds(
            lambda k, g: tf.raw_ops.Conv2DBackpropInput(
                input_sizes=images.shape, filter=k, out_backprop=g, **how
            ),
            *(kernel, gradient),
        )
        if depth_in > 3  # nobody asks for the gradient of the pictures
        else 0.0,
        median_seconds(
            lambda x, g: tf.raw_ops.Conv2DBackpropFilter(
                input=x, filter_sizes=kernel.shape, out_backprop=g, **how
            ),
            *(images, gradient),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    dtype = {"fp32": tf.float32, "bf16": tf.bfloat16}[parser.parse_args().dtype]

    matrix = tf.cast(tf.random.normal([4096, 4096]), dtype)
    rate = 4096**3 / median_seconds(tf.linalg.matmul, matrix, matrix)
    print(f"matrix product: {rate / 1e9:.0f} GMAC/s")
    total = 0.0
    print("in  out side stride  count   forward  to input  to kernel   (ms each)")
    for shape, count in CONVOLUTIONS.items():
        seconds = convolution_seconds(*shape, dtype)
        total += count * sum(seconds)
        columns = "".join(f"{1e3 * each:10.2f}" for each in seconds)
        print("{:2} {:4} {:4} {:5}".format(*shape), f"{count:7}{columns}")
    share = BATCH * MULTIPLY_ADDS / total / rate
    print(
        f"all convolutions of a step: {1e3 * total:.1f} ms, from a warm cache; with nothing beside "
        f"them a step would reach {share:.0%} of the matrix product's rate"
    )


if __name__ == "__main__":
    main()
