"""TensorFlow's start: its data format, and how it uses a GPU's memory and arithmetic."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_same_checkpoint
from programs import PROJECT, SMALL, run, run_code

import run_trainer
from cifar10_resnet import device
from cifar10_resnet.cli.flags import Flags
from cifar10_resnet.device import resolve_data_format
from cifar10_resnet.errors import UserError
from resnet_model import DTYPES, convolution


def test_layouts_are_chosen_for_the_device():
    for dtype in DTYPES:
        assert resolve_data_format("auto", dtype, "cpu") == "channels_last"
        assert resolve_data_format("auto", dtype, "gpu") == "channels_first"
        assert resolve_data_format("channels_last", dtype, "cpu") == "channels_last"
        assert resolve_data_format("channels_last", dtype, "gpu") == "channels_last"
        assert resolve_data_format("channels_first", dtype, "gpu") == "channels_first"


@pytest.fixture
def every_kernel(monkeypatch) -> None:
    """A CPU with channels_first in every precision, whatever this one has."""

    def by_way_of_channels_last(kernel: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
        def compute(x: tf.Tensor, *arguments, data_format: str) -> tf.Tensor:
            if data_format == "NHWC":
                return kernel(x, *arguments, data_format="NHWC")
            y = kernel(tf.transpose(x, [0, 2, 3, 1]), *arguments, data_format="NHWC")
            return tf.transpose(y, [0, 3, 1, 2])

        return compute

    # Clears what `device` has found out about this processor, before and after a test.
    monkeypatch.setattr(device, "_cpu_trains", device._cpu_trains.__wrapped__)
    for name in ("conv2d", "avg_pool2d"):
        monkeypatch.setattr(tf.nn, name, by_way_of_channels_last(getattr(tf.nn, name)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_first_is_accepted_on_a_cpu_that_has_every_kernel(every_kernel, dtype):
    assert resolve_data_format("channels_first", dtype, "cpu") == "channels_first"


# TensorFlow raises UnimplementedError; an error of oneDNN becomes AbortedError.
@pytest.mark.parametrize("error", [tf.errors.UnimplementedError, tf.errors.AbortedError])
@pytest.mark.parametrize("only_its_gradient", [False, True])
# A processor with AVX-512 FP16 has the convolution in fp16, but not the average pooling.
@pytest.mark.parametrize("missing", ["conv2d", "avg_pool2d"])
def test_channels_first_is_refused_on_a_cpu_that_lacks_one_kernel_of_a_training_step(
    every_kernel, monkeypatch, missing, only_its_gradient, error
):
    kernel = getattr(tf.nn, missing)

    @tf.custom_gradient
    def without_gradient(x: tf.Tensor):
        def gradient(upstream: tf.Tensor):
            raise error(None, None, "only supports NHWC on device type CPU")

        return tf.identity(x), gradient

    def lacking(*arguments, **keywords) -> tf.Tensor:
        if only_its_gradient:
            return without_gradient(kernel(*arguments, **keywords))
        raise error(None, None, "only supports NHWC on device type CPU")

    monkeypatch.setattr(tf.nn, missing, lacking)
    sentence = r"channels_first is not possible in fp16 .* Use --data_format=channels_last\.$"
    with pytest.raises(UserError, match=sentence):
        resolve_data_format("channels_first", "fp16", "cpu")


def test_without_onednn_channels_first_is_refused_on_a_cpu_in_every_precision():
    code = f"""
from cifar10_resnet.device import resolve_data_format
from cifar10_resnet.errors import UserError

for dtype in {tuple(DTYPES)}:
    try:
        print(dtype, "accepted", resolve_data_format("channels_first", dtype, "cpu"))
    except UserError as refusal:
        print(dtype, "refused", "--data_format=channels_last" in str(refusal))
"""
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": ""}
    output = run_code(code, env=environment).stdout
    assert output.splitlines() == [f"{dtype} refused True" for dtype in DTYPES]


@pytest.mark.parametrize(
    ("device_name", "num_gpus", "used"),
    [("auto", None, ["a", "b", "c"]), ("gpu", 2, ["a", "b"]), ("cpu", None, []), ("auto", 0, [])],
)
def test_each_gpu_in_use_takes_memory_as_it_needs_it(monkeypatch, device_name, num_gpus, used):
    seen = {"visible": None, "growing": []}

    def show(gpus: list[str], kind: str) -> None:
        seen["visible"] = gpus

    def grow(gpu: str, enable: bool) -> None:
        assert enable
        assert seen["visible"] is not None  # TensorFlow grows only the memory of visible GPUs.
        seen["growing"].append(gpu)

    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["a", "b", "c"])
    monkeypatch.setattr(tf.config, "set_visible_devices", show)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", grow)
    monkeypatch.setattr(tf.config.optimizer, "set_experimental_options", lambda options: None)
    found = device.start_tensorflow(device_name, num_gpus=num_gpus)
    assert seen == {"visible": used, "growing": used}
    assert found == ("gpu" if used else "cpu")


@pytest.mark.parametrize(
    ("processor", "slow"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16", {"fp16"}),
        ("flags : fpu avx512f amx_bf16", {"fp16"}),
        ("Features : fp asimd bf16", {"fp16"}),
        ("flags : fpu avx2", {"bf16", "fp16"}),
        ("Features : fp asimd", {"bf16", "fp16"}),
        ("arm64 arm", {"fp16"}),  # Other systems do not list instructions.
    ],
)
def test_a_precision_that_the_processor_emulates_is_called_slow(monkeypatch, processor, slow):
    monkeypatch.setattr(device, "processor", lambda: processor)
    told = {dtype for dtype in DTYPES if device.slowness(dtype, "cpu")}
    assert told == slow
    assert {dtype for dtype in DTYPES if device.convolve_in(dtype) is not convolution} == slow
    assert not any(device.slowness(dtype, "gpu") for dtype in DTYPES)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_convolution_in_fp32_rounds_as_one_in_the_precision(monkeypatch, dtype):
    monkeypatch.setattr(device, "processor", lambda: "flags : fpu avx2")
    rng = np.random.default_rng(0)
    x = tf.cast(rng.normal(size=(2, 8, 8, 4)), DTYPES[dtype])
    kernel = tf.Variable(rng.normal(size=(3, 3, 4, 5)), dtype=tf.float32)
    found = []
    for convolve in (device.convolve_in(dtype), convolution):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = convolve(x, kernel, 2, "NHWC")
        found.append([y, *tape.gradient(y, [x, kernel])])
    epsilon = {"bf16": 2**-8, "fp16": 2**-11}[dtype]
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        scale = np.abs(theirs.numpy().astype(np.float64)).max()
        np.testing.assert_allclose(ours, theirs, rtol=2 * epsilon, atol=2 * epsilon * scale)


def started(*arguments: str) -> list[str]:
    """Returns whether TF32 and determinism are on after a start in a separate process."""
    code = f"""
from cifar10_resnet.device import start_tensorflow

start_tensorflow("cpu", {", ".join(arguments)})
import tensorflow as tf
from tensorflow.python.framework.config import is_op_determinism_enabled

print(tf.config.experimental.tensor_float_32_execution_enabled(), is_op_determinism_enabled())
"""
    return run_code(code).stdout.split()


def test_tf32_and_determinism_are_on_only_if_a_program_asks_for_them():
    assert started() == ["False", "False"]
    assert started("tf32=True", "deterministic='off'") == ["True", "False"]
    assert started("deterministic='ops'") == ["False", "True"]
    assert started("deterministic='strict'") == ["False", "True"]


def test_the_garbage_collector_passes_over_what_an_import_made_and_works_afterwards():
    code = """
import gc
from cifar10_resnet.device import start_tensorflow

start_tensorflow("cpu")
print(gc.isenabled(), gc.get_freeze_count() > 10 * len(gc.get_objects()))
"""
    assert run_code(code).stdout.split() == ["True", "True"]


def test_determinism_reaches_what_xla_compiles(tmp_path):
    code = """
import sys
from cifar10_resnet.device import start_tensorflow

start_tensorflow("cpu", deterministic=sys.argv[1])
import tensorflow as tf

tf.function(lambda x: tf.sin(x) @ x, jit_compile=True)(tf.ones([2, 2]))
"""
    for deterministic in ("off", "ops"):
        folder = tmp_path / deterministic
        environment = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={folder}"}
        run_code(code, deterministic, env=environment)
        (options,) = folder.glob("*.debug_options")
        # XLA writes only the options that differ from their defaults.
        written = "xla_gpu_deterministic_ops: true" in options.read_text()
        assert written == (deterministic == "ops")


def test_a_run_with_deterministic_operations_repeats_and_resumes_bit_identically(data, tmp_path):
    def train(folder: str, *more: str) -> str:
        return run(
            *("run_trainer.py", f"--path={data}", f"--ckpt_path={tmp_path / folder}", *SMALL),
            *("--num_iterations=30", "--recipe=fast", "--deterministic=ops"),
            *("--epochs_between_evals=1", "--native=off", *more),
        ).stdout

    assert "channels_last, deterministic operations." in train("whole")
    train("resumed", "--max_train_steps=12")
    train("resumed")
    assert_same_checkpoint(tmp_path / "whole/model.ckpt-30", tmp_path / "resumed/model.ckpt-30")


@pytest.mark.parametrize(
    ("words", "tf32", "deterministic"),
    [
        ((), True, "off"),
        (("--notf32", "--deterministic=ops"), False, "ops"),
        (("--eval_only",), False, "off"),
        (("--eval_only", "--tf32"), False, "off"),
    ],
)
def test_training_uses_tf32_unless_it_is_turned_off_and_an_evaluation_never_does(
    tmp_path, monkeypatch, words, tf32, deterministic
):
    class Reached(Exception):
        pass

    def start_tensorflow(*arguments: object, **keywords: object) -> None:
        raise Reached(keywords)

    monkeypatch.setattr(device, "start_tensorflow", start_tensorflow)
    argv = ["run_trainer.py", "--use_synthetic_data", f"--ckpt_path={tmp_path}", *words]
    with pytest.raises(Reached) as reached:
        run_trainer.main(Flags(run_trainer.Settings, argv).parse())
    assert reached.value.args == ({"tf32": tf32, "deterministic": deterministic},)


# --- Read-only systems ----------------------------------------------------------------------------

# All of the system is read-only, except the folder of the run. Nothing that is mounted stays.
READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount --bind / /mnt
mount -o remount,ro,bind /mnt
mount --rbind /dev /mnt/dev
mount -t proc proc /mnt/proc
mount --bind "$1" "/mnt$1"
if [ "$2" = "without shared memory" ]; then mount -t tmpfs -o ro none /mnt/dev/shm; fi
shift 2
exec chroot /mnt "$@"
"""


def on_read_only_system(folder: Path, memory: str, *command: object):
    unshare = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", folder, memory]
    environment = {**os.environ, "TMPDIR": "/nowhere"}
    return subprocess.run(
        list(map(str, unshare + list(command))), capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("memory", ["with shared memory", "without shared memory"])
def test_a_read_only_system_without_temporary_folders_trains_and_evaluates(tmp_path, memory):
    if on_read_only_system(tmp_path, memory, "true").returncode:
        pytest.skip("file systems cannot be mounted here, which takes root")
    folder = tmp_path / "run"
    program = [sys.executable, PROJECT / "run_trainer.py", "--use_synthetic_data", *SMALL]
    flags = [f"--ckpt_path={folder}", "--max_train_steps=2", "--epochs_between_evals=1"]
    export = f"--export_dir={tmp_path / 'exported'}"
    trained = on_read_only_system(tmp_path, memory, *program, *flags, "--batch_size=5000", export)
    assert trained.returncode == 0, trained.stderr
    assert (folder / "model.ckpt-2.index").exists()
    assert (tmp_path / "exported" / "saved_model.pb").exists()
    reason = "No plots are written: Matplotlib has no writable folder for its cache."
    assert (reason in trained.stdout) == (memory == "without shared memory")


def test_messages_are_held_back_in_memory_without_a_temporary_folder(monkeypatch, capfd):
    def refuse(*arguments: object, **keywords: object) -> None:
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with device.stderr_held_back():
        os.write(2, b"noise")

    def fail() -> None:
        with device.stderr_held_back():
            os.write(2, b"reason")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    monkeypatch.delattr(os, "memfd_create")
    with device.stderr_held_back():
        os.write(2, b", and shown")
    assert capfd.readouterr().err == "reason, and shown"
