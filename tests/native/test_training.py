"""Training with native kernels and without: resumed, with workers, and exported."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_same_checkpoint, values_in, write_random_cifar10
from programs import Workers, run

from cifar10_resnet.native import build

SHORT = ("--num_layers=8", "--batch_size=12", "--num_iterations=20", "--log_per_iterations=1")


@pytest.fixture(scope="module", autouse=True)
def library() -> str:
    try:
        return build.library()
    except build.CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    return write_random_cifar10(tmp_path_factory.mktemp("data"))


def train(data: Path, folder: Path, *flags: str) -> str:
    return run("run_trainer.py", f"--path={data}", f"--ckpt_path={folder}", *SHORT, *flags).stdout


def losses(shown: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step .* loss ([\d.]+)", shown, re.M)]


@pytest.mark.parametrize("native", ["on", "off"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_bit_identical_with_native_kernels_and_without(
    small_data, tmp_path, native, dtype
):
    flags = (f"--native={native}", f"--dtype={dtype}")
    shown = train(small_data, tmp_path / "whole", *flags)
    assert ("native kernels" in shown) == (native == "on")
    train(small_data, tmp_path / "halves", *flags, "--max_train_steps=9")
    train(small_data, tmp_path / "halves", *flags)
    assert_same_checkpoint(tmp_path / "whole/model.ckpt-20", tmp_path / "halves/model.ckpt-20")


def test_a_run_may_change_between_them_when_it_resumes(small_data, tmp_path):
    flags = ("--init_lr=0.001",)
    whole = losses(train(small_data, tmp_path / "whole", *flags, "--native=on"))
    first = losses(
        train(small_data, tmp_path / "run", *flags, "--native=on", "--max_train_steps=9")
    )
    rest = losses(train(small_data, tmp_path / "run", *flags, "--native=off"))
    np.testing.assert_allclose(first + rest, whole, rtol=2e-3)


def test_workers_agree_and_train_without_if_one_of_them_has_no_compiler(small_data, tmp_path):
    command = ["run_trainer.py", f"--path={small_data}", *SHORT]
    with_all, without = tmp_path / "all", tmp_path / "without"
    for folder, environments in ((with_all, [{}, {}]), (without, [{}, {"CXX": "no-compiler"}])):
        workers = Workers(2, [*command, f"--ckpt_path={folder}"], environments=environments)
        shown = workers.processes[0].stdout.read()
        assert [status for status, _ in workers.ends()] == [0, 0]
        assert ("native kernels" in shown) == (folder == with_all)


def test_an_exported_network_needs_no_native_kernels(small_data, tmp_path):
    train(small_data, tmp_path / "run", "--native=on", f"--export_dir={tmp_path / 'exported'}")
    saved = (tmp_path / "exported" / "saved_model.pb").read_bytes()
    assert b"FusedBatchNormV3" in saved
    assert b"AddBatchNormRelu" not in saved
    assert tf.saved_model.load(str(tmp_path / "exported")) is not None


def test_a_checkpoint_is_the_same_file_format_with_them_and_without(small_data, tmp_path):
    for native in ("on", "off"):
        train(small_data, tmp_path / native, f"--native={native}", "--max_train_steps=1")
    ours, theirs = (values_in(tmp_path / native / "model.ckpt-1") for native in ("on", "off"))
    assert ours.keys() == theirs.keys()
    assert {n: np.shape(v) for n, v in ours.items()} == {n: np.shape(v) for n, v in theirs.items()}
