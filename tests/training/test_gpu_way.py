"""The way a GPU trains (several steps in one XLA loop, images made on the device), on a CPU."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import run_trainer
from cifar10_resnet import device
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data.synthetic import CLASS_NAMES
from cifar10_resnet.errors import UserError
from cifar10_resnet.options import Options
from cifar10_resnet.training.trainer import Chunks, Trainer

RUN = RunConfig(
    ModelConfig(num_layers=8),
    DataConfig("synthetic", CLASS_NAMES),
    TrainingConfig(
        batch_size=8,
        num_iterations=9,
        alternate_flips=True,
        cutout=6,
        init_lr=1e-3,
        average_weights=1.0,
    ),
)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr("cifar10_resnet.data.dataset.SYNTHETIC_IMAGES", {"train": 80, "test": 40})


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Makes the trainer take the way of a GPU. TensorFlow then runs it on the CPU."""
    monkeypatch.setattr(device, "visible_device", lambda: "gpu")


def train(folder, stops: list[int], **changes) -> list[np.ndarray]:
    """Trains in several starts, and returns the run's state at the end."""
    options = Options(ckpt_path=str(folder), data_format="channels_last", native="off")
    checkpoint = None
    for stop in stops:
        settings = dataclasses.replace(options, max_train_steps=stop, **changes)
        checkpoint = run_trainer.train(RUN, settings, resume_from=checkpoint).checkpoint
    trainer = Trainer(RUN)
    trainer.restore(checkpoint)
    assert trainer.steps_done == stops[-1]
    networks = [*trainer.model.variables, *trainer.average.network.variables]
    return [v.numpy() for v in [*networks, *trainer.optimizer.slots.values()]]


def test_the_way_of_a_gpu_resumes_bit_identically_and_trains_as_a_cpu_does(
    tmp_path, as_on_a_gpu, monkeypatch
):
    whole = train(tmp_path / "whole", [9], steps_per_call=4)
    resumed = train(tmp_path / "resumed", [3, 9], steps_per_call=4, log_per_iterations=2)
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    # Images that are too large for the device stay on the host.
    monkeypatch.setattr("cifar10_input.DeviceAugmentation.MOST_BYTES", 1)
    for one, other in zip(whole, train(tmp_path / "host", [9], jit_compile=False), strict=True):
        assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(other) + 1e-3


def test_a_gpu_gets_xla_and_several_steps_a_call_unless_they_are_set():
    auto = Options()
    settled = auto.settled("gpu", "channels_first", 1)
    assert (settled.jit_compile, settled.steps_per_call) == (True, 100)
    settled = auto.settled("gpu", "channels_first", 2)  # XLA compiles the step of one device only.
    assert (settled.jit_compile, settled.steps_per_call) == (False, 100)
    assert settled.steps_per_log(RunConfig()) == 1000
    settled = auto.settled("cpu", "channels_last", 1)
    assert (settled.jit_compile, settled.steps_per_call) == (False, 1)
    typed = Options(jit_compile=False, steps_per_call=3).settled("gpu", "channels_first", 1)
    assert (typed.jit_compile, typed.steps_per_call) == (False, 3)
    assert typed.settled("gpu", "channels_first", 1) == typed
    with pytest.raises(UserError, match="--jit_compile works on one device only"):
        Options(jit_compile=True).settled("gpu", "channels_first", 2)


def test_chunks_give_every_batch_once_and_in_order_however_they_are_taken():
    chunks = Chunks(tf.data.Dataset.range(100), 4)
    taken = [
        [[int(n) for n in chunk.numpy()[first:end]] for chunk, first, end in chunks.take(count)]
        for count in (1, 4, 3, 9, 4)
    ]
    assert taken == [
        [[0]],
        [[1, 2, 3], [4]],
        [[5, 6, 7]],
        [[8, 9, 10, 11], [12, 13, 14, 15], [16]],
        [[17, 18, 19], [20]],
    ]
