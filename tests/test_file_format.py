"""Checks the file format of checkpoints: keys, shapes and the description of a run, by hand.

Users keep checkpoints for years. A key that gets another name or shape makes them unreadable, so
every expected value below is a literal. A later version may add optional parts. It must still read
a checkpoint without them.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from programs import PROJECT

from cifar10_resnet import checkpoints
from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.training.trainer import Trainer

Shape = tuple[int, ...]


class Network(NamedTuple):
    """The convolutions (kernel shapes) and batch norms (channels) of a network, from end to end.

    A unit is called `BLOCK/UNIT`, counted from 0 as in the keys.
    """

    units: dict[str, tuple[list[Shape], list[int]]]
    outer_norm: tuple[str, int]  # The batch norm outside all units.
    features: int = 64


KERNELS = {
    "0/0": [(3, 3, 16, 16), (3, 3, 16, 16)],
    "1/0": [(3, 3, 16, 32), (3, 3, 32, 32)],
    "2/0": [(3, 3, 32, 64), (3, 3, 64, 64)],
}
BOTTLENECK_KERNELS = {
    "0/0": [(1, 1, 16, 16), (3, 3, 16, 16), (1, 1, 16, 64)],
    "1/0": [(1, 1, 64, 32), (3, 3, 32, 32), (1, 1, 32, 128)],
    "2/0": [(1, 1, 128, 64), (3, 3, 64, 64), (1, 1, 64, 256)],
}
RESNET8 = Network(
    {
        "0/0": (KERNELS["0/0"], [16, 16]),
        "1/0": (KERNELS["1/0"], [16, 32]),
        "2/0": (KERNELS["2/0"], [32, 64]),
    },
    ("final_norm", 64),
)
RESNET8_V1 = Network(
    {
        "0/0": (KERNELS["0/0"], [16, 16]),
        "1/0": (KERNELS["1/0"], [32, 32]),
        "2/0": (KERNELS["2/0"], [64, 64]),
    },
    ("init_norm", 16),
)
BOTTLENECK11 = Network(
    {
        "0/0": (BOTTLENECK_KERNELS["0/0"], [16, 16, 16]),
        "1/0": (BOTTLENECK_KERNELS["1/0"], [64, 32, 32]),
        "2/0": (BOTTLENECK_KERNELS["2/0"], [128, 64, 64]),
    },
    ("final_norm", 256),
    features=256,
)
BOTTLENECK11_V1 = Network(
    {
        "0/0": (BOTTLENECK_KERNELS["0/0"], [16, 16, 64]),
        "1/0": (BOTTLENECK_KERNELS["1/0"], [32, 32, 128]),
        "2/0": (BOTTLENECK_KERNELS["2/0"], [64, 64, 256]),
    },
    ("init_norm", 16),
    features=256,
)
RESNET20 = Network(
    {
        **RESNET8.units,
        "0/1": ([(3, 3, 16, 16), (3, 3, 16, 16)], [16, 16]),
        "0/2": ([(3, 3, 16, 16), (3, 3, 16, 16)], [16, 16]),
        "1/1": ([(3, 3, 32, 32), (3, 3, 32, 32)], [32, 32]),
        "1/2": ([(3, 3, 32, 32), (3, 3, 32, 32)], [32, 32]),
        "2/1": ([(3, 3, 64, 64), (3, 3, 64, 64)], [64, 64]),
        "2/2": ([(3, 3, 64, 64), (3, 3, 64, 64)], [64, 64]),
    },
    RESNET8.outer_norm,
)
PLAIN = {"shortcut_connections": False}
V1, BOTTLENECK = {"resnet_version": 1}, {"num_layers": 11, "bottleneck": True}
MUON, TRANSFER = {"optimizer": "muon"}, {"pretrained": "runs/old/model.ckpt-9"}
FINE_TUNE = {**TRANSFER, "fine_tune": True}
# Each kind of run: its network's settings, its training's settings, the network that it has.
KINDS = {
    "residual": ({}, {}, RESNET8),
    "plain": (PLAIN, {}, RESNET8),
    "version 1": (V1, {}, RESNET8_V1),
    "bottleneck": (BOTTLENECK, {}, BOTTLENECK11),
    "bottleneck, version 1": (BOTTLENECK | V1, {}, BOTTLENECK11_V1),
    "muon": ({}, MUON, RESNET8),
    "muon, bottleneck": (BOTTLENECK, MUON, BOTTLENECK11),
    "transfer": ({}, TRANSFER, RESNET8),
    "transfer, new mean": ({}, {**TRANSFER, "recompute_mean": True}, RESNET8),
    "fine-tuned": ({}, FINE_TUNE, RESNET8),
    "fine-tuned, new mean": ({}, {**FINE_TUNE, "recompute_mean": True}, RESNET8),
}
STATISTICS = ("moving_mean", "moving_variance")

# The description of a run with the paper's recipe: in the first version, and today.
CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
OLDEST = {
    "model": {
        "num_layers": 20,
        "shortcut_connections": True,
        "bottleneck": False,
        "resnet_version": 2,
        "num_classes": 10,
        "batch_norm_decay": 0.99,
        "batch_norm_epsilon": 0.001,
    },
    "data": {"dataset": "cifar10", "class_names": CLASSES, "holdout": 0},
    "training": {
        "recipe": "paper",
        "num_iterations": 64000,
        "batch_size": 128,
        "init_lr": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0002,
        "label_smoothing": 0.0,
        "seed": 0,
    },
}
TODAY = {
    "model": OLDEST["model"],
    "data": OLDEST["data"] | {"coarse_labels": False},
    "training": OLDEST["training"]
    | {
        "optimizer": "momentum",
        "scale_lr": False,
        "alternate_flips": False,
        "cutout": 0,
        "pretrained": "",
        "fine_tune": False,
        "recompute_mean": False,
    },
}


def variables_of(network: Network) -> list[tuple[str, str, Shape]]:
    """Returns each variable of a network: its key below `model/`, its name and its shape."""
    found = [
        ("image_mean", "image_mean", (32, 32, 3)),
        ("init_conv/kernel", "init_conv/kernel", (3, 3, 3, 16)),
        ("logits_kernel", "logits/kernel", (network.features, 10)),
        ("logits_bias", "logits/bias", (10,)),
    ]
    norm, channels = network.outer_norm
    norms = [(norm, norm, channels)]
    for unit, (kernels, depths) in network.units.items():
        block, place = map(int, unit.split("/"))
        name = f"block{block + 1}/unit{place + 1}"
        for i, shape in enumerate(kernels):
            conv = f"blocks/{unit}/convs/{i}/kernel"
            found.append((conv, f"{name}/conv{i + 1}/kernel", shape))
        for i, depth in enumerate(depths):
            norms.append((f"blocks/{unit}/norms/{i}", f"{name}/norm{i + 1}", depth))
    for key, name, depth in norms:
        for part in ("gamma", "beta", *STATISTICS):
            found.append((f"{key}/{part}", f"{name}/{part}", (depth,)))
    return found


def keys_of(network: Network, fine_tune: bool, has_data_mean: bool) -> dict[str, Shape]:
    """Returns the keys of a checkpoint, without TensorFlow's ending, and their shapes."""
    keys = {"step": (), "description": ()}
    if has_data_mean:
        keys["data_mean"] = (32, 32, 3)
    for key, name, shape in variables_of(network):
        keys[f"model/{key}"] = shape
        trained = not name.endswith(("image_mean", *STATISTICS))
        if name.startswith("logits/") or (trained and not fine_tune):
            keys["momentum/" + name.replace("/", "_")] = shape
    return keys


def expected_keys(kind: str) -> dict[str, Shape]:
    _, training, network = KINDS[kind]
    # Only a run that subtracts a pretrained network's mean keeps a second one.
    has_data_mean = "pretrained" in training and "recompute_mean" not in training
    return keys_of(network, "fine_tune" in training, has_data_mean)


def new_trainer(kind: str) -> Trainer:
    model, training, _ = KINDS[kind]
    return Trainer(
        RunConfig(ModelConfig(**({"num_layers": 8} | model)), training=TrainingConfig(**training))
    )


def saved_in(prefix: str | Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """Returns the shapes and the types in a checkpoint, by key without TensorFlow's ending."""
    reader = tf.train.load_checkpoint(str(prefix))
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    shapes = reader.get_variable_to_shape_map()
    del shapes["_CHECKPOINTABLE_OBJECT_GRAPH"]
    assert all(key.endswith(ending) for key in shapes)
    types = reader.get_variable_to_dtype_map()
    return (
        {key.removesuffix(ending): tuple(shape) for key, shape in shapes.items()},
        {key.removesuffix(ending): types[key].name for key in shapes},
    )


def assert_has_keys(prefix: str | Path, expected: dict[str, Shape]) -> None:
    """Checks all keys below `model/` and `momentum/`. Other parts may exist too.

    Another variable of a known network would be missing in all older checkpoints.
    """
    shapes, types = saved_in(prefix)
    inner = ("model/", "momentum/")
    known = {k: v for k, v in shapes.items() if k in expected or k.startswith(inner)}
    assert known == expected
    special = {"step": "int64", "description": "string"}
    assert {k: types[k] for k in expected} == {k: special.get(k, "float32") for k in expected}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_the_keys_and_shapes_of_its_kind(kind, tmp_path):
    trainer = new_trainer(kind)
    checkpoints.save(trainer.checkpoint, str(tmp_path), 3)
    assert_has_keys(tmp_path / "model.ckpt-3", expected_keys(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_variables_of_a_network_have_their_names(kind):
    names = {v.name: tuple(v.shape) for v in new_trainer(kind).model.variables}
    expected = variables_of(KINDS[kind][2])
    assert names == {f"{name}:0": shape for _, name, shape in expected}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_only_todays_keys_is_restored(kind, tmp_path):
    trainer = new_trainer(kind)
    model, training, network = KINDS[kind]
    description = {
        "model": OLDEST["model"] | {"num_layers": 8} | model,
        "data": OLDEST["data"],
        "training": OLDEST["training"] | training,
    }
    values = write_checkpoint(tmp_path / "model.ckpt-3", expected_keys(kind), description)
    prefix = checkpoints.find(str(tmp_path)).prefix

    saved = checkpoints.read(prefix)
    assert (saved.run, saved.step) == (trainer.run, 3)
    trainer.restore(prefix)
    assert trainer.steps_done == 3
    for restored in (trainer.model, checkpoints.load(checkpoints.read(prefix))):
        found = {v.name: v.numpy() for v in restored.variables}
        for key, name, _ in variables_of(network):
            np.testing.assert_array_equal(found[f"{name}:0"], values[f"model/{key}"], name)
    for name, slot in trainer.optimizer.slots.items():
        np.testing.assert_array_equal(slot.numpy(), values[f"momentum/{name}"], name)


def write_checkpoint(
    prefix: Path, keys: dict[str, Shape], description: dict[str, object]
) -> dict[str, np.ndarray]:
    """Writes a checkpoint of step 3 with plain TensorFlow, and returns its random values by key."""
    rng = np.random.default_rng(0)
    values = {key: rng.normal(size=shape).astype(np.float32) for key, shape in keys.items()}
    values["step"], values["description"] = np.int64(3), json.dumps(description)
    # Dictionaries in dictionaries: TensorFlow joins their keys with slashes.
    root: dict[str, object] = {}
    for key, value in values.items():
        *folders, last = key.split("/")
        place = root
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = tf.Variable(value)
    tf.train.Checkpoint(**root).write(str(prefix))
    return values


def test_a_saved_description_has_these_names_and_values(tmp_path):
    trainer = Trainer(RunConfig())
    prefix = checkpoints.save(trainer.checkpoint, str(tmp_path), 0)
    reader = tf.train.load_checkpoint(prefix)
    text = reader.get_tensor("description/.ATTRIBUTES/VARIABLE_VALUE").decode()
    saved = json.loads(text)
    assert saved.keys() >= TODAY.keys()
    for part, expected in TODAY.items():
        known = {name: saved[part].get(name, "missing") for name in expected}
        # As text, because 0 and 0.0 and False are equal but not the same in a file.
        assert json.dumps(known) == json.dumps(expected)


@pytest.mark.parametrize("description", [OLDEST, TODAY], ids=["oldest", "today"])
def test_a_description_is_read_and_newer_settings_take_their_defaults(description):
    assert RunConfig.from_json(json.dumps(description)) == RunConfig()


def test_the_machine_in_a_description_is_optional_and_identifies_no_run(tmp_path):
    trainer = Trainer(RunConfig(ModelConfig(num_layers=8)))
    checkpoints.save(trainer.checkpoint, str(tmp_path), 1)
    trainer.record_machine({"device": "cpu", "threads": "2"})
    checkpoints.save(trainer.checkpoint, str(tmp_path), 2)

    without, having = (checkpoints.read(str(tmp_path / f"model.ckpt-{step}")) for step in (1, 2))
    assert without.machine == {}
    assert having.machine == {"device": "cpu", "threads": "2"}
    assert having.run == without.run == trainer.run
    reader = tf.train.load_checkpoint(having.prefix)
    text = reader.get_tensor("description/.ATTRIBUTES/VARIABLE_VALUE").decode()
    assert json.loads(text)["machine"] == {"device": "cpu", "threads": "2"}
    # A network without its training does not depend on a machine.
    alone = checkpoints.save_network(having, str(tmp_path / "network"))
    assert checkpoints.read(alone).machine == {}


@pytest.mark.parametrize("machine", [None, 7, "x", [], ["threads"]])
def test_a_machine_that_is_not_understood_is_ignored(machine, tmp_path):
    keys = expected_keys("residual")
    description = TODAY | {"model": TODAY["model"] | {"num_layers": 8}, "machine": machine}
    write_checkpoint(tmp_path / "model.ckpt-3", keys, description)
    assert checkpoints.find(str(tmp_path)).machine == {}


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "num_layers", 32),
        ("model", "shortcut_connections", False),
        ("model", "resnet_version", 1),
        ("model", "batch_norm_decay", 0.9),
        ("model", "batch_norm_epsilon", 1e-5),
        ("data", "dataset", "pictures"),
        ("data", "holdout", 5000),
        ("data", "coarse_labels", True),
        ("training", "recipe", "fast"),
        ("training", "num_iterations", 16000),
        ("training", "optimizer", "muon"),
        ("training", "scale_lr", True),
        ("training", "cutout", 9),
        ("training", "alternate_flips", True),
        ("training", "pretrained", "runs/old/model.ckpt-9"),
        ("training", "fine_tune", True),
        ("training", "recompute_mean", True),
        ("training", "seed", 2**40),
    ],
)
def test_a_setting_in_a_description_is_not_ignored(part, name, value):
    changed = TODAY | {part: TODAY[part] | {name: value}}
    run = RunConfig.from_json(json.dumps(changed))
    assert run.settings() == RunConfig().settings() | {name: value}


def test_a_shipped_network_has_these_keys_and_is_restored():
    prefix = PROJECT / "files/pretrained/resnet20/model.ckpt-16000"
    keys = keys_of(RESNET20, fine_tune=False, has_data_mean=False)
    # A shipped network lacks what only training needs.
    alone = {key: shape for key, shape in keys.items() if not key.startswith("momentum/")}
    assert saved_in(prefix)[0] == alone

    saved = checkpoints.read(str(prefix))
    run, step = saved.run, saved.step
    assert (run.model, step) == (ModelConfig(num_layers=20), 16000)
    assert (run.training.recipe, run.training.optimizer) == ("fast", "muon")
    model = checkpoints.load(checkpoints.read(str(prefix)))
    reader = tf.train.load_checkpoint(str(prefix))
    saved_mean = reader.get_tensor("model/image_mean/.ATTRIBUTES/VARIABLE_VALUE")
    assert 100 < saved_mean.mean() < 140
    np.testing.assert_array_equal(model.image_mean.numpy(), saved_mean)
