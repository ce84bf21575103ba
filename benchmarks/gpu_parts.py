"""Defines the parts of gpu.py: what each measures, in the order of their importance."""

import contextlib
import functools
import importlib.util
import json
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from contenders.contender import BATCH_SIZE
from parts import Clock, GpuSamples, Part, Results
from processes import FOLDER, PROJECT, Failure, Late

# The first interval between two logs includes the start. The second includes TensorBoard's graph.
UNSTEADY = 2
LOGGED = re.compile(r"step (\d+)/.* images/s (\d+)")


@dataclass(frozen=True)
class Bench:
    """The needs of all parts: a temporary folder, the data, and how long to measure."""

    folder: Path
    path: Path | None = None
    is_quick: bool = False
    is_cpu: bool = False

    @property
    def seconds(self) -> float:
        """Returns the seconds of steady training to measure."""
        return 0 if self.is_cpu else 2.5 if self.is_quick else 5

    @property
    def batch_size(self) -> int:
        return 8 if self.is_cpu else BATCH_SIZE

    def layers(self, layers: int) -> int:
        return 8 if self.is_cpu else layers

    def trainer(self, layers: int, *flags: str) -> list[str]:
        """Returns a command that trains in a new folder."""
        folder = tempfile.mkdtemp(dir=self.folder)
        command = ["run_trainer.py", f"--num_layers={self.layers(layers)}", f"--ckpt_path={folder}"]
        data = f"--path={self.path.resolve()}" if self.path else "--use_synthetic_data"
        device = ("--device=cpu", "--batch_size=8") if self.is_cpu else ("--device=gpu",)
        return [str(PROJECT / command[0]), *command[1:], data, *device, *flags]


# --- This project ---------------------------------------------------------------------------------


def steady(lines: list[str], times: list[float]) -> tuple[list[float], list[float]]:
    """Returns the logged images per second of steady training, and the times of these logs.

    The times begin one log earlier, so they enclose the rates.
    """
    logs = [(float(m[2]), at) for m, at in zip(map(LOGGED.match, lines), times, strict=True) if m]
    rates, at = [rate for rate, _ in logs], [at for _, at in logs]
    return rates[UNSTEADY:], at[UNSTEADY - 1 :]


def measure_trainer(
    bench: Bench, layers: int, flags: tuple[str, ...], clock: Clock, result: Results
) -> None:
    """Measures `run_trainer.py` as users start it: its rate, input included, and its start."""
    every = 2 if bench.is_cpu else 1000 if layers < 50 else 250
    result["flags"] = " ".join(flags) or "default"

    def enough(lines: list[str], times: list[float]) -> bool:
        rates, at = steady(lines, times)
        return len(rates) >= 2 and at[-1] - at[0] >= bench.seconds

    def read(lines: list[str], times: list[float]) -> None:
        logs = [at for line, at in zip(lines, times, strict=True) if LOGGED.match(line)]
        rates, at = steady(lines, times)
        result["opening"] = [line for line in lines if not LOGGED.match(line)][:6]
        if not rates:
            raise Failure(f"{len(logs)} logs are too few to measure a rate")
        rate = statistics.harmonic_mean(rates)
        result["images_per_second"], result["rates"] = rate, rates
        # The first log comes after `every` steps, which take as long as later ones.
        result["startup_seconds"] = max(0, logs[0] - every * bench.batch_size / rate)
        result["gpu"] = samples.medians(max(1, at[-1] - at[0]))

    command = bench.trainer(layers, f"--log_per_iterations={every}", *flags)
    with GpuSamples() as samples:
        try:
            ended = clock.run(*command, enough=enough)
        except Late as late:
            with contextlib.suppress(Failure):
                read(late.lines, late.times)
            raise
        read(ended.lines, ended.times)


def measure_recipe(bench: Bench, clock: Clock, result: Results) -> None:
    """Measures a whole run of the fast recipe from start to end, and its evaluation."""
    length = () if bench.path and not bench.is_quick else ("--train_epochs=41",)
    length = ("--num_iterations=20",) if bench.is_cpu else length
    command = bench.trainer(20, "--recipe=fast", "--dtype=bf16", *length)
    result["flags"] = " ".join(("--recipe=fast --dtype=bf16", *length))
    folder = next(word for word in command if word.startswith("--ckpt_path="))
    with GpuSamples() as samples:
        ended = clock.run(*command)
        result["gpu"] = samples.medians(0.7 * ended.seconds)
    result["train_seconds"] = ended.seconds
    logs = [match for match in map(LOGGED.match, ended.lines) if match]
    result["steps"] = int(logs[-1][1])
    result["images_per_second"] = statistics.median([float(match[2]) for match in logs])
    scores = bench.folder / "scores.json"
    evaluator = [PROJECT / "run_evaluator.py", folder, f"--output_json={scores}"]
    evaluator += [f"--path={bench.path.resolve()}"] if bench.path else []
    evaluator += ["--device=cpu"] if bench.is_cpu else []
    ended = clock.run(*evaluator)
    result["evaluate_seconds"] = ended.seconds
    result["accuracy"] = json.loads(scores.read_text())["accuracy"]


# --- PyTorch and the bare step --------------------------------------------------------------------


def measure_forms(
    bench: Bench,
    program: str,
    layers: int,
    dtype: str,
    forms: tuple[str, ...],
    clock: Clock,
    result: Results,
) -> None:
    """Measures the forms of a step in one process, which prints a line of JSON for each."""
    is_pytorch = program.startswith("pytorch")
    if is_pytorch and importlib.util.find_spec("torch") is None:
        raise Failure("PyTorch is not installed")
    gpu = "cuda" if is_pytorch else "gpu"
    command = [
        *(FOLDER / "contenders" / program, f"--layers={bench.layers(layers)}"),
        *(f"--dtype={dtype}", f"--forms={','.join(forms)}", f"--batch_size={bench.batch_size}"),
        f"--device={'cpu' if bench.is_cpu else gpu}",
        f"--steps={2 if bench.is_cpu else 2000 // layers}",
        f"--seconds={bench.seconds / 2}",
    ]
    result["forms"] = []

    def read(lines: list[str], times: list[float]) -> bool:
        if lines[-1].startswith("{"):
            result["forms"].append(json.loads(lines[-1]))
            rates = [form.get("images_per_second", 0) for form in result["forms"]]
            result["images_per_second"] = max(rates)
            clock.save()
        return False

    clock.run(*command, enough=read)


# --- All parts ------------------------------------------------------------------------------------

NHWC, NOT_COMPILED = "--data_format=channels_last", "--nojit_compile"
EAGER = ("eager", "eager-graph")
COMPILED = ("compile", "reduce-overhead", "compile-graph")


def make_parts(bench: Bench) -> list[Part]:
    """Returns all parts, the most important first."""

    def train(layers: int, name: str, *flags: str) -> Part:
        title = f"run_trainer.py, ResNet-{layers}, {' '.join(flags)}"
        measure = functools.partial(measure_trainer, bench, layers, flags)
        return Part(f"{layers}-{name}", title, 60 if layers < 50 else 120, measure)

    def torch(layers: int, dtype: str, name: str, forms: tuple[str, ...], deadline: float) -> Part:
        title = f"PyTorch, ResNet-{layers}, {dtype}, {', '.join(forms)}"
        how = (bench, "pytorch_gpu.py", layers, dtype, forms)
        measure = functools.partial(measure_forms, *how)
        return Part(f"pytorch-{layers}-{dtype}-{name}", title, deadline, measure)

    def step(name: str, layers: int, *forms: str) -> Part:
        title = (
            f"the step of ResNet-{layers} with its batch on the device, bf16, {', '.join(forms)}"
        )
        how = (bench, "step_gpu.py", layers, "bf16", forms)
        return Part(name, title, 100, functools.partial(measure_forms, *how))

    bf16, fp32 = "--dtype=bf16", "--dtype=fp32"
    recipe = functools.partial(measure_recipe, bench)
    return [
        train(20, "bf16", bf16),
        train(20, "fp32", fp32),
        Part("fast", "run_trainer.py --recipe=fast from start to end", 150, recipe),
        train(110, "bf16", bf16),
        torch(20, "bf16", "compiled", COMPILED, 100),
        torch(20, "bf16", "eager", EAGER, 45),
        train(20, "bf16-nhwc", bf16, NHWC),
        train(20, "bf16-notjit", bf16, NOT_COMPILED),
        step("step-20", 20, "step"),
        train(20, "bf16-1step", bf16, "--steps_per_call=1"),
        train(110, "bf16-nhwc", bf16, NHWC),
        train(20, "bf16-200steps", bf16, "--steps_per_call=200"),
        train(20, "fp16", "--dtype=fp16"),
        train(20, "fp32-nhwc", fp32, NHWC),
        train(20, "bf16-10steps", bf16, "--steps_per_call=10"),
        train(20, "bf16-notjit-nhwc", bf16, NOT_COMPILED, NHWC),
        train(110, "bf16-notjit", bf16, NOT_COMPILED),
        step("step-110", 110, "step"),
        torch(20, "fp32", "compiled", COMPILED, 100),
        torch(20, "fp32", "eager", EAGER, 45),
        train(20, "fp32-notjit", fp32, NOT_COMPILED),
        train(110, "fp32", fp32),
        torch(110, "bf16", "eager", EAGER, 60),
        torch(110, "fp32", "eager", EAGER, 60),
        # Compiling 110 layers takes over a minute, so the fastest form comes first.
        torch(110, "bf16", "compiled", ("compile-graph", "compile"), 150),
        step("less-20", 20, "loop", "gradients", "without-batch-norm", "forward"),
    ]
