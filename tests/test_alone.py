"""What can be lifted out of the project works where nothing else of it can be seen."""

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


def test_the_network_is_built_and_runs_alone(tmp_path):
    assert run_alone("resnet_model.py", BUILD, tmp_path) == "(1, 10)\n269722\n"
