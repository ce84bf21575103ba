"""Contains the common code of all contenders: their work, and their answers to compare.py."""

import abc
import contextlib
import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 128
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 2e-4
BATCH_NORM_DECAY = 0.99
BATCH_NORM_EPSILON = 1e-3
BLOCK_DEPTHS = (16, 32, 64)
NUM_CLASSES = 10

# With this number of batches, none is still in a processor's cache from its last use.
BATCHES = 8
# The second step is the first step with an effect of momentum.
CHECKED_STEPS = 2


def memory_batches(batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the batches of the bare step: float32 images minus their mean, and labels."""
    from cifar10_resnet.data import synthetic

    pixels, labels = synthetic.make_split("train", BATCHES * batch_size, seed=0)
    images = pixels.astype(np.float32) - pixels.mean(axis=0, dtype=np.float64).astype("f4")
    parts = np.split(images, BATCHES), np.split(labels.astype(np.int32), BATCHES)
    return list(zip(*parts, strict=True))


def read_split(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8 [N, 32, 32, 3], and labels of a folder of CIFAR-10's binary files."""
    pattern = "data_batch_*.bin" if split == "train" else "test_batch.bin"
    files = sorted(Path(folder).glob(pattern))
    records = np.concatenate([np.fromfile(f, np.uint8).reshape(-1, 3073) for f in files])
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), records[:, 0].astype(np.int32)


class Contender(abc.ABC):
    """One way to train the network, with the requests that compare.py sends."""

    batch_size = BATCH_SIZE

    @abc.abstractmethod
    def prepare(
        self, layers: int, dtype: str, weight_decay: float = WEIGHT_DECAY, **options: Any
    ) -> dict[str, Any]:
        """Builds the network and returns `parameters`, `device` and other facts to record."""

    @abc.abstractmethod
    def train(self, count: int) -> float:
        """Takes `count` steps and, once they are done, returns their mean loss."""

    @abc.abstractmethod
    def load(self, variables: Mapping[str, np.ndarray]) -> None:
        """Loads all variables of this project's network, with its names and shapes."""

    @abc.abstractmethod
    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the network's logits in inference."""

    def timed(self, count: int) -> tuple[float, float]:
        """Returns the seconds that `count` steps take, and their loss."""
        self.train(1)  # After the others' turns, caches and memory are cold.
        started = time.perf_counter()
        loss = self.train(count)
        return time.perf_counter() - started, loss

    def steps(self, count: int) -> float:
        """Returns the images per second over `count` steps."""
        seconds, loss = self.timed(count)
        if not math.isfinite(loss):
            raise FloatingPointError("the loss is no longer finite")
        return count * self.batch_size / seconds

    def check(self, file: str) -> list[list[list[float]]]:
        """Returns one batch's logits with the variables in `file`, before and after a few steps."""
        with np.load(file) as variables:
            self.load(variables)
        images, _ = memory_batches(self.batch_size)[0]
        before = self.logits(images)
        self.train(CHECKED_STEPS)
        return [before.tolist(), self.logits(images).tolist()]

    def commands(self) -> dict[str, Callable[..., Any]]:
        return {"prepare": self.prepare, "steps": self.steps, "check": self.check}


def batches_per_second(batches: Iterator[Any], count: int) -> float:
    """Returns a pipeline's batches per second. Batches that were ready before do not count."""
    for _ in range(20):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - started)


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answers each line of JSON on stdin with one on stdout, until stdin ends."""
    # A library's output must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request.pop("do")](**request)
        _give_memory_back()
        print(json.dumps(answer), file=answers, flush=True)


def _give_memory_back() -> None:
    # All contenders are alive at once, so the free memory that allocators keep adds up.
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
