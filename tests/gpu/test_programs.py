"""The programs on a GPU: runs resume there, start there, and reach there what they reach on a CPU.

The programs start together, because each takes seconds to import TensorFlow. Without a GPU, these
tests are skipped. GPU_TESTS_ON_CPU=1 runs them on the CPU, to try the tests.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import gpu_device
import numpy as np
import pytest
from conftest import assert_same_checkpoint
from programs import environment, run

from cifar10_resnet.options import Options

ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
pytestmark = pytest.mark.skipif(
    gpu_device.find() == "cpu" and not ON_CPU, reason="TensorFlow finds no GPU"
)
STEPS, HALF = 12, 6
# With a learning rate this small, the losses of the steps depend on the batches. The network stays.
SMALL = (
    *("--use_synthetic_data", "--num_layers=8", "--batch_size=32", "--init_lr=0.001"),
    *("--log_per_iterations=1", f"--num_iterations={STEPS}"),
)
# Few steps that reach a useful accuracy. The averages of the batch norms follow in time.
LEARN = (
    *("--use_synthetic_data", "--num_layers=8", "--recipe=one_cycle", "--batch_norm_decay=0.9"),
    *("--batch_size=64", "--num_iterations=8" if ON_CPU else "--num_iterations=600"),
    "--epochs_between_evals=1000",
)
LEARNED, MARGIN = (0.0, 1.0) if ON_CPU else (0.65, 0.05)


class Programs:
    """Programs that run together, by their names. A program may wait for an earlier one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pool = ThreadPoolExecutor(1 if ON_CPU else 6)
        self._started: dict[str, Future] = {}

    def submit(self, name: str, do: Callable[[], object]) -> None:
        self._started[name] = self._pool.submit(do)

    def train(self, name: str, device: str, *flags: str, after: str | None = None) -> None:
        """Trains in the run folder `name`. If another run comes before it, continues a copy."""

        def do() -> subprocess.CompletedProcess:
            where = self.folder / name
            if after:
                self.result(after)
                shutil.copytree(self.folder / after, where)
            return run("run_trainer.py", f"--ckpt_path={where}", f"--device={device}", *flags)

        self.submit(name, do)

    def evaluate(self, name: str, device: str) -> None:
        """Evaluates the run `name` on a device, after the run."""
        file = self.folder / f"{name}-on-{device}.json"

        def do() -> dict:
            self.result(name)
            where = f"--ckpt_path={self.folder / name}"
            run("run_evaluator.py", where, f"--device={device}", f"--output_json={file}")
            return json.loads(file.read_text())

        self.submit(file.stem, do)

    def take_steps(self, count: int, device: str) -> None:
        """Takes steps with `count` replicas, and writes the variables to steps-COUNT.npz."""
        file = self.folder / f"steps-{count}.npz"
        networks = ("momentum", "channels_first") if device == "gpu" else ("momentum",)
        words = ("tests/distributed/replica_steps.py", count, device.upper(), file, *networks)

        def do() -> dict[str, np.ndarray]:
            run(*words, env=environment(TF_CPP_MIN_LOG_LEVEL="2"))
            return dict(np.load(file))

        self.submit(file.stem, do)

    def result(self, name: str):
        return self._started[name].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def device() -> str:
    return gpu_device.find()


@pytest.fixture(scope="module")
def programs(device, tmp_path_factory) -> Iterator[Programs]:
    """Starts all programs of this file. The programs that others wait for come first."""
    started = Programs(tmp_path_factory.mktemp("gpu"))
    for dtype in ("fp32", "fp16"):
        started.train(dtype, device, *LEARN, f"--dtype={dtype}")
    started.train("on-cpu", "cpu", *SMALL)
    started.train("half-on-cpu", "cpu", *SMALL, f"--max_train_steps={HALF}")
    started.train("half", device, *SMALL, f"--max_train_steps={HALF}")
    started.train("resumed", device, *SMALL, after="half")
    started.train("from-cpu", device, *SMALL, after="half-on-cpu")
    started.train("back-on-cpu", "cpu", *SMALL, after="half")
    for number in ("one", "two"):
        if has_deterministic_ops():
            flags = ("--recipe=fast", "--num_iterations=20", "--deterministic=ops")
            started.train(f"ops-{number}", device, *SMALL[:-3], *flags)
    for count in (1, 2):
        started.take_steps(count, device)
    for where in dict.fromkeys((device, "cpu")):
        started.evaluate("fp32", where)
    yield started
    started.close()


def has_deterministic_ops() -> bool:
    return "deterministic" in {field.name for field in dataclasses.fields(Options)}


def losses(done: subprocess.CompletedProcess) -> list[float]:
    """Returns the losses that a run printed after each of its steps."""
    return [float(loss) for loss in re.findall(r"^step \d+/.* loss (\S+)", done.stdout, re.M)]


def accuracy(done: subprocess.CompletedProcess) -> float:
    return float(re.search(r"evaluated on test: .* accuracy (\S+)%", done.stdout)[1]) / 100


@pytest.mark.parametrize("name", ["resumed", "from-cpu", "back-on-cpu"])
def test_a_run_sees_the_same_batches_wherever_it_starts_and_resumes(name, programs):
    expected = losses(programs.result("on-cpu"))
    assert len(expected) == STEPS
    found = losses(programs.result("half-on-cpu" if name == "from-cpu" else "half"))
    found += losses(programs.result(name))
    np.testing.assert_allclose(found, expected, rtol=0.01)
    # Other batches would be further away.
    assert np.abs(np.diff(expected)).mean() > 0.03 * np.mean(expected)


def test_a_checkpoint_of_a_gpu_scores_the_same_on_a_cpu(programs, device):
    one, other = (programs.result(f"fp32-on-{where}") for where in (device, "cpu"))
    assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.005)
    assert one["loss"] == pytest.approx(other["loss"], rel=0.01)
    assert one["accuracy"] == pytest.approx(accuracy(programs.result("fp32")), abs=0.005)


def test_fp16_reaches_the_accuracy_of_fp32(programs):
    reached = {dtype: accuracy(programs.result(dtype)) for dtype in ("fp32", "fp16")}
    print(reached)
    assert reached["fp32"] > LEARNED
    assert reached["fp16"] == pytest.approx(reached["fp32"], abs=MARGIN)


def test_two_replicas_take_the_steps_of_one(programs):
    """With one GPU, both replicas are on it. With two, NCCL adds up their results."""
    one, two = (programs.result(f"steps-{count}") for count in (1, 2))
    assert set(one) == set(two)
    for name, value in one.items():
        if not name.startswith(("apart/", "shares")):
            np.testing.assert_allclose(two[name], value, rtol=5e-3, atol=1e-3, err_msg=name)
    np.testing.assert_array_equal(one["shares"].ravel(), two["shares"].ravel())


@pytest.mark.skipif(not has_deterministic_ops(), reason="there is no --deterministic=ops")
def test_deterministic_operations_give_bit_identical_runs(programs):
    for number in ("one", "two"):
        programs.result(f"ops-{number}")
    prefixes = [programs.folder / f"ops-{number}" / "model.ckpt-20" for number in ("one", "two")]
    assert_same_checkpoint(*prefixes)
