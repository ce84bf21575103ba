"""The device of these tests: a GPU, or the CPU if TensorFlow finds no GPU."""

import functools
import os

# This process and the programs that it starts share the GPU.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


@functools.cache
def find() -> str:
    """Returns "gpu" or "cpu". On a CPU, a test compares the CPU with itself."""
    import tensorflow as tf

    return "gpu" if tf.config.list_physical_devices("GPU") else "cpu"


def count() -> int:
    """Returns the number of GPUs."""
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))
