"""The files that can be copied out of the project work without the rest of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from programs import PROJECT

# Sees this folder's files and the installed packages.
BEGIN = """
import importlib.util, sys
sys.path.insert(0, "")
assert importlib.util.find_spec("cifar10_resnet") is None
"""
BUILD = """
import tensorflow as tf
from resnet_model import ResNet

network = ResNet(num_layers=20)
print(network(tf.zeros([1, 32, 32, 3])).shape)
print(sum(variable.shape.num_elements() for variable in network.trainable_variables))
"""


def run_alone(file: str, code: str, folder: Path) -> str:
    """Returns what the code prints in a folder that contains one file of this project."""
    shutil.copy(PROJECT / file, folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", BEGIN + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_network_is_built_and_runs_without_the_project(tmp_path):
    assert run_alone("resnet_model.py", BUILD, tmp_path) == "(1, 10)\n269722\n"


BATCHES = """
import numpy as np
from cifar10_input import ImageSet, mean_image, read_records, training_batches

images, labels = read_records(["one.bin", "two.bin"])
print(images.shape, labels[:, 0].tolist(), images[:, 0, 0].tolist())
examples = ImageSet(images, labels[:, 0].astype(np.int32))
mean = mean_image(images)
for batch, numbers in training_batches(examples, mean, batch_size=4, num_steps=3):
    print(batch.shape, batch.dtype.name, sorted(set(numbers.numpy().tolist()) - {3, 7, 250}))
"""


def test_the_input_without_the_project_turns_binary_files_into_batches(tmp_path):
    records = []
    for i, label in enumerate((3, 7, 250)):
        red, green, blue = (bytes([10 * i + channel] * 1024) for channel in range(3))
        records.append(bytes([label]) + red + green + blue)
    assert {len(record) for record in records} == {3073}
    (tmp_path / "one.bin").write_bytes(records[0] + records[1])
    (tmp_path / "two.bin").write_bytes(records[2])
    assert run_alone("cifar10_input.py", BATCHES, tmp_path).splitlines() == [
        "(3, 32, 32, 3) [3, 7, 250] [[0, 1, 2], [10, 11, 12], [20, 21, 22]]",
        *["(4, 32, 32, 3) float32 []"] * 3,
    ]
