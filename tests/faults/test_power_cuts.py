"""Output that is complete survives a power cut; `make drill` is the long form."""

import subprocess

import power_cuts
import pytest

from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.training.trainer import Trainer


@pytest.fixture(autouse=True)
def skip_without_loop_mounts(tmp_path):
    try:
        with power_cuts.new_disk(tmp_path / "probe"):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file can be mounted by loop here, which takes root: {error}")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return power_cuts.make_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("write", power_cuts.OUTPUTS, ids=lambda write: write.__name__)
def test_what_a_program_wrote_survives_a_power_cut_at_once(write, source, tmp_path):
    assert power_cuts.differences(write, source, tmp_path / "disks", delays=(0,)) == []


def test_a_power_cut_within_a_save_leaves_the_last_checkpoint_or_the_new_one(tmp_path):
    trainer = Trainer(RunConfig(ModelConfig(num_layers=8), training=TrainingConfig(batch_size=8)))
    steps = power_cuts.steps_after_cuts(trainer, tmp_path / "disks")
    assert len(steps) >= 12
    assert set(steps) == {10, 20}
    assert steps == sorted(steps)
    assert steps[-1] == 20
