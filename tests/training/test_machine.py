"""A start names what differs from the machine of the run's last start."""

import re
from pathlib import Path

import pytest
from conftest import values_in
from programs import SMALL, environment, error_of, run, run_code

from cifar10_resnet import checkpoints
from cifar10_resnet.distributed.replicas import Replicas
from cifar10_resnet.errors import UserError
from cifar10_resnet.options import Options
from cifar10_resnet.training import machine

THEN = {"device": "cpu", "threads": "2", "oneDNN": "on"}
LINE = "This machine may round differently from the run's last start: {}. The run continues, "
LINE += "but may not be bit-identical."


def test_a_difference_is_named_in_one_line_and_strict_refuses_it():
    now = THEN | {"threads": "4", "oneDNN": "off"}
    named = "threads 4 instead of 2, oneDNN off instead of on"
    assert machine.compare(THEN, now, "runs/a/model.ckpt-5", False) == LINE.format(named)
    refused = f"deterministic=strict does not match the checkpoint runs/a/model.ckpt-5: {named}."
    with pytest.raises(UserError, match=re.escape(refused)):
        machine.compare(THEN, now, "runs/a/model.ckpt-5", True)


def test_the_same_machine_is_not_mentioned():
    assert machine.compare(THEN, dict(THEN), "a", False) == ""
    assert machine.compare(THEN, dict(THEN), "a", True) == ""


def test_a_fact_that_another_version_does_not_know_is_no_difference():
    assert machine.compare(THEN, {"device": "cpu"}, "a", True) == ""
    assert machine.compare({"device": "cpu"}, THEN, "a", True) == ""


def test_a_checkpoint_of_an_older_version_goes_on_but_not_strictly():
    assert machine.compare({}, THEN, "a", False) == ""
    with pytest.raises(UserError, match="a: its machine is not recorded"):
        machine.compare({}, THEN, "a", True)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (
            "flags\t\t: fpu sse4_1 avx avx2 avx512f avx512_bf16\nmodel name\t: AMD EPYC 9B14\n",
            ("AMD EPYC 9B14", "avx512_bf16"),
        ),
        (
            "flags\t\t: sse4_1 avx avx2 avx512f amx_bf16 avx512_fp16\nmodel name\t: Xeon\n",
            ("Xeon", "amx_bf16"),
        ),
        ("flags : fpu sse4_1 avx2 avx\nmodel name : Ryzen", ("Ryzen", "avx2")),
        ("Features\t: fp asimd sve\n", ("", "sve")),
        ("arm64 arm", ("arm64 arm", "")),
        ("", ("", "")),
    ],
)
def test_a_processor_has_a_model_and_its_best_instruction_set(described, expected):
    assert machine.model_and_instructions(described) == expected


def facts(is_native: bool = False, replicas: Replicas | None = None, **options) -> dict[str, str]:
    settled = Options(**options).settled("cpu", options.get("data_format", "channels_last"), 1)
    return machine.facts(settled, is_native, replicas or Replicas())


def test_every_fact_of_a_cpu_is_noticed(monkeypatch):
    before = facts()
    onednn = before["oneDNN"]
    assert before["device"] == "cpu"
    assert int(before["threads"]) >= 1
    assert machine.differences(before, facts()) == ""

    def changed(**options) -> str:
        return machine.differences(before, facts(**options))

    assert changed(is_native=True) == "native kernels on instead of off"
    assert changed(dtype="bf16") == "precision bf16 instead of fp32"
    assert changed(jit_compile=True) == "XLA on instead of off"
    assert changed(data_format="channels_first").startswith("data format channels_first instead")
    for name, value, expected in (
        ("TF_NUM_INTRAOP_THREADS", "97", f"threads 97 instead of {before['threads']}"),
        ("ONEDNN_MAX_CPU_ISA", "SSE41", f"oneDNN {onednn} with SSE41 instead of {onednn}"),
        ("DNNL_MAX_CPU_ISA", "AVX", f"oneDNN {onednn} with AVX instead of {onednn}"),
    ):
        with monkeypatch.context() as changing:
            changing.setenv(name, value)
            assert changed() == expected


def test_onednn_is_off_or_on_as_tensorflow_has_it():
    code = "from cifar10_resnet.training import machine; print(machine._onednn())"
    for value, expected in (("0", "off\n"), ("1", "on\n")):
        assert run_code(code, env=environment(TF_ENABLE_ONEDNN_OPTS=value)).stdout == expected


def test_workers_that_differ_are_listed_together():
    class Two(Replicas):
        def exchange(self, text: str) -> list[str]:
            return [text, text.replace('"device": "cpu"', '"device": "a GPU"')]

    found = facts(replicas=Two())
    assert found["device"] == "cpu, a GPU"
    assert found["precision"] == "fp32"


TRAIN = ("run_trainer.py", *SMALL, "--use_synthetic_data", "--num_iterations=12")
TRAIN += ("--save_per_iterations=4", "--native=off")


def with_threads(count: int) -> dict[str, str]:
    return environment(TF_NUM_INTRAOP_THREADS=str(count))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run with 4 steps, taken with 2 threads."""
    folder = tmp_path_factory.mktemp("begun")
    first = run(*TRAIN, f"--ckpt_path={folder}", "--max_train_steps=4", env=with_threads(2))
    assert "round differently" not in first.stdout
    return folder


def test_a_run_that_moves_says_once_what_differs_and_strict_refuses(begun):
    strict = (*TRAIN, f"--ckpt_path={begun}", "--deterministic=strict")
    refused = error_of(*strict, env=with_threads(1))
    assert "--deterministic=strict does not match the checkpoint" in refused
    assert "model.ckpt-4: threads 1 instead of 2. Make" in refused

    went_on = run(*TRAIN, f"--ckpt_path={begun}", "--max_train_steps=8", env=with_threads(1))
    assert went_on.stdout.splitlines()[0] == LINE.format("threads 1 instead of 2")
    assert checkpoints.find(str(begun)).machine["threads"] == "1"
    # From now on, this is the run's machine.
    again = run(*strict, env=with_threads(1))
    assert "round differently" not in again.stdout
    assert "deterministic operations" in again.stdout


def test_on_the_same_machine_a_strict_run_resumes_bit_identically(tmp_path):
    for folder, stops in (("whole", [12]), ("parts", [4, 8, 12])):
        for stop in stops:
            flags = (f"--ckpt_path={tmp_path / folder}", f"--max_train_steps={stop}")
            run(*TRAIN, *flags, "--deterministic=strict", env=with_threads(2))
    whole, parts = (values_in(tmp_path / name / "model.ckpt-12") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert (
            value.tobytes() == parts[name].tobytes()
            if hasattr(value, "tobytes")
            else (value == parts[name])
        ), name
