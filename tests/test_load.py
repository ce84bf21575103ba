"""`load` returns a trained network in any program that imports the package."""

import numpy as np
import pytest
from programs import PROJECT, run_code

from cifar10_resnet import checkpoints, load
from cifar10_resnet.config import DataConfig, ModelConfig, RunConfig
from cifar10_resnet.data.photos import read_photo_file
from cifar10_resnet.errors import UserError
from cifar10_resnet.training.trainer import Trainer


def test_a_shipped_network_knows_a_cat():
    cat = read_photo_file(str(PROJECT / "files" / "cat.jpg"))
    found = load("resnet20").classify(np.stack([cat, cat[:, ::-1]]))
    assert [name for name, _ in found] == ["cat", "cat"]
    assert found[0][1] == pytest.approx(0.9726, abs=2e-3)


def test_a_run_folder_and_a_checkpoint_are_networks_too(tmp_path, monkeypatch):
    run = RunConfig(ModelConfig(8, num_classes=2), DataConfig(class_names=("yes", "no")))
    saved = checkpoints.save(Trainer(run).checkpoint, str(tmp_path), 3)
    images = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), np.uint8)
    monkeypatch.chdir(tmp_path)
    named = (str(tmp_path), saved, "model.ckpt-3")
    answers = [load(path).classify(images) for path in named]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 600
    assert all(name in ("yes", "no") and 0.5 <= share <= 1 for name, share in answers[0])


def test_what_is_no_network_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"^'resnet57' is not a network. .* plain20, .*resnet20"):
        load("resnet57")
    with pytest.raises(UserError, match="no checkpoint"):
        load(str(tmp_path))


def test_importing_the_package_imports_nothing_slow():
    code = "import cifar10_resnet, sys; sys.exit(bool({'tensorflow', 'numpy'} & set(sys.modules)))"
    run_code(code)
