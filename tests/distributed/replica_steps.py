"""Takes training steps on COUNT devices and writes the results to a file.

One process can have one number of replicas only, so this is a program:
replica_steps.py COUNT KIND FILE NETWORK...
The KIND is CPU or GPU. If there are too few GPUs, the devices are parts of the first one, as they
are parts of the CPU.
"""

import sys
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.data.synthetic import CLASS_NAMES
from cifar10_resnet.distributed import replicas as distributed
from cifar10_resnet.training.trainer import Trainer

BATCH_SIZE = 8
GPU_MIB = 4096
NETWORKS = {
    "momentum": ({}, {}, "channels_last"),
    "channels_first": ({"nesterov": True}, {}, "channels_first"),
    "muon": ({"optimizer": "muon"}, {"resnet_version": 1}, "channels_last"),
}


def batches() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.normal(30, 60, [2, BATCH_SIZE, 32, 32, 3]).astype(np.float32)
    return images, rng.integers(0, 10, [2, BATCH_SIZE]).astype(np.int32)


def make_trainer(name: str, replicas: distributed.Replicas, sync_batch_norm: bool):
    hyperparameters, shape, data_format = NETWORKS[name]
    run = RunConfig(
        ModelConfig(num_layers=8, batch_norm_decay=0.9, **shape),
        DataConfig("synthetic", CLASS_NAMES),
        TrainingConfig(batch_size=BATCH_SIZE, init_lr=0.05, average_weights=1.0, **hyperparameters),
    )
    return Trainer(run, data_format, replicas=replicas, sync_batch_norm=sync_batch_norm)


def take_steps(
    replicas: distributed.Replicas, networks: Sequence[str] = tuple(NETWORKS)
) -> dict[str, np.ndarray]:
    """Every variable of these networks, and of their averages, after two steps."""
    found = {}
    for name in networks:
        trainer = make_trainer(name, replicas, sync_batch_norm=True)
        data = tf.data.Dataset.from_tensor_slices(batches())
        trainer.train_steps(iter(data), 2)
        trainer.add_to_average(data)
        assert int(trainer.step.numpy()) == 2
        found[f"{name}/means"] = np.array(trainer.means())
        for variable in trainer.model.variables:
            copies = [
                copy.numpy() for copy in replicas.strategy.experimental_local_results(variable)
            ]
            assert all(np.array_equal(copy, copies[0]) for copy in copies), variable.name
            found[f"{name}/{variable.name}"] = copies[0]
        for variable in trainer.average.network.variables:
            found[f"{name}/average/{variable.name}"] = variable.numpy()
    trainer = make_trainer("momentum", replicas, sync_batch_norm=False)
    images, labels = (values[0] for values in batches())
    trainer.train_step(tf.constant(images), tf.constant(labels))
    for variable in trainer.model.variables:
        found[f"apart/{variable.name}"] = variable.numpy()

    shares = tf.function(
        lambda: replicas.strategy.run(lambda: replicas.own_share(tf.constant(labels)))
    )()
    found["shares"] = np.stack(replicas.strategy.experimental_local_results(shares))
    return found


def use_devices(count: int, kind: str) -> None:
    """Shows only COUNT devices of a kind to TensorFlow."""
    physical = tf.config.list_physical_devices(kind)
    if kind == "CPU":
        tf.config.set_visible_devices([], "GPU")
    elif len(physical) >= count:
        tf.config.set_visible_devices(physical[:count], kind)
        return
    else:
        tf.config.set_visible_devices(physical[:1], kind)
    limit = GPU_MIB if kind == "GPU" else None
    parts = [tf.config.LogicalDeviceConfiguration(memory_limit=limit)] * count
    tf.config.set_logical_device_configuration(physical[0], parts)


if __name__ == "__main__":
    count, kind, file, *names = sys.argv[1:]
    use_devices(int(count), kind)
    # TF32 would hide whether the replicas add up.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    chosen = distributed.choose("auto", None)
    assert chosen.count == int(count)
    assert distributed.choose("off", None).count == 1
    np.savez(file, **take_steps(chosen, names))
