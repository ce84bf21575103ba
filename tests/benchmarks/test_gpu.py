"""The benchmark for GPUs in its form for CPUs: it records failures, and keeps what it measured."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import PROJECT, run, run_code, without_tensorflow

sys.path.insert(0, str(PROJECT / "benchmarks"))

import gpu
import gpu_parts
from parts import Benchmark, Clock, Part, Results
from processes import run_program


def program(code: str) -> Callable[[Clock, Results], None]:
    """Returns a measure that runs Python code, and takes its output as a rate."""

    def measure(clock: Clock, result: Results) -> None:
        result["images_per_second"] = float(clock.run("-c", code).lines[-1])

    return measure


def measured(parts: list[Part], folder: Path, budget: float = 100) -> dict:
    """Returns the JSON file of a benchmark with these parts."""
    machine = {"gpu": None, "processor": "a test", "versions": {}}
    results = {"command": "none", "date": "today", "machine": machine, "parts": {}}
    file = folder / "results.json"
    Benchmark(parts, results, file, budget, gpu.table).run()
    return json.loads(file.read_text())


def test_a_part_that_fails_is_recorded_and_the_others_are_measured(tmp_path):
    codes = {
        "good": "print(41)",
        "bad": "raise SystemExit('this part is broken')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "odd": "print('no number')",
        "last": "print(42)",
    }
    parts = [Part(name, name, 60, program(code)) for name, code in codes.items()]
    found = measured(parts, tmp_path)["parts"]
    assert list(found) == list(codes)
    assert [found[name]["images_per_second"] for name in ("good", "last")] == [41, 42]
    assert [part["status"] for part in found.values()] == [
        *("measured", "failed", "failed", "failed", "measured")
    ]
    assert found["bad"]["problem"] == "this part is broken"
    assert found["killed"]["problem"] == "killed by SIGKILL"
    assert found["odd"]["problem"].startswith("ValueError: ")
    rows = (tmp_path / "results.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows if row.startswith("| ")] == [
        *("| part", "| ---", *(f"| {name}" for name in codes))
    ]


# It starts a child, as a program that compiles does, and both would run for minutes.
SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_deadline_kills_a_part_with_its_children_and_keeps_its_numbers(tmp_path):
    def measure(clock: Clock, result: Results) -> None:
        def read(lines: list[str], times: list[float]) -> bool:
            result["child"] = int(lines[-1])
            return False

        clock.run("-c", SLOW, enough=read)

    found = measured([Part("slow", "slow", 2, measure)], tmp_path)["parts"]["slow"]
    assert found["status"] == "failed"
    assert found["problem"] == "killed at its deadline of 2 s"
    assert 1 < found["seconds"] < 30
    for _ in range(100):
        if not is_alive(found["child"]):
            return
        time.sleep(0.1)
    raise AssertionError("its child is alive")


def test_a_program_that_printed_enough_is_ended():
    ended = run_program("-c", SLOW, enough=lambda lines, times: True, deadline=60)
    assert len(ended.lines) == len(ended.times) == 1
    assert ended.seconds < 30


def test_the_table_compares_the_trainer_with_its_bare_step_and_with_pytorch():
    forms = [{"form": form, "images_per_second": rate} for form, rate in (("a", 50), ("b", 80))]
    parts = {
        "20-bf16": {"images_per_second": 100},
        "pytorch-20-bf16-eager": {"forms": [*forms, {"form": "c", "problem": "failed"}]},
        "step-20": {"images_per_second": 125},
        "110-bf16": {"problem": "failed"},
    }
    bare, torch = gpu.ratios(parts)
    assert bare.endswith("its bare step = 0.80")
    assert torch.endswith("(b, without input) = 1.25")


def test_parts_after_the_budget_are_skipped_and_known_parts_are_not_measured_again(tmp_path):
    parts = [Part(str(i), "a part", 60, program("print(5)")) for i in range(2)]
    found = measured(parts, tmp_path, budget=0)["parts"]
    assert {part["status"] for part in found.values()} == {"skipped"}
    assert "budget" in (tmp_path / "results.md").read_text()


def test_the_steady_rate_leaves_out_the_start():
    lines = ["Training …", *(f"step {i} left 0:01 loss 1 images/s {10 * i}" for i in range(1, 5))]
    lines = [line.replace(" left", "/9 left", 1) for line in lines]
    rates, times = gpu_parts.steady(lines, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert rates == [30.0, 40.0]
    assert times == [2.0, 3.0, 4.0]


def test_the_most_important_parts_come_first_and_can_be_chosen():
    parts = gpu_parts.make_parts(gpu_parts.Bench(Path()))
    names = [part.name for part in parts]
    assert names[:4] == ["20-bf16", "20-fp32", "fast", "110-bf16"]
    assert len(set(names)) == len(names)
    chosen = [part.name for part in gpu.chosen(parts, ["pytorch", "fast"], ["pytorch-110"])]
    assert chosen[0] == "fast"
    assert all(name.startswith("pytorch-20") for name in chosen[1:])
    with pytest.raises(SystemExit, match="30 is not a part"):
        gpu.chosen(parts, ["30"], [])


def test_the_program_measures_a_run_and_writes_the_results(tmp_path):
    printed = run(
        *("benchmarks/gpu.py", "--cpu", "--only=20-fp32,pytorch-20-fp32-eager"),
        *("--skip=20-fp32-n", f"--output={tmp_path}", "--name=found"),
    ).stdout
    results = json.loads((tmp_path / "found.json").read_text())
    trained, torch = (results["parts"][name] for name in ("20-fp32", "pytorch-20-fp32-eager"))
    assert trained["status"] == "measured"
    assert trained["images_per_second"] > 0
    assert trained["startup_seconds"] > 0
    assert torch["status"] == "measured" or torch["problem"] == "PyTorch is not installed"
    assert (tmp_path / "found.md").read_text() in printed


def test_pytorch_needs_no_tensorflow(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['benchmarks']; import gpu; print('tensorflow' in sys.modules)"
    )
    environment = without_tensorflow(tmp_path) | {"PYTHONDONTWRITEBYTECODE": "1"}
    assert run_code(code, env=os.environ | environment).stdout == "False\n"
