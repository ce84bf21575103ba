"""Makes the measures of compare.py: one or two per function."""

import argparse
import contextlib
import functools
import importlib.util
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from contenders.contender import BATCH_SIZE
from processes import FOLDER, PROJECT, Ended, Failure, Worker, run_program

DTYPES = ("fp32", "bf16")

# A contender takes these steps before the first round, untimed.
WARM_UP = 3
# The two products of the backward pass take as many multiply-adds each as the forward pass.
PASSES = 3

# Each pair is (layers, bottleneck units).
DEPTHS = ((20, False), (32, False), (56, False), (110, False), (164, True))
BATCH_SIZES = (32, 64, 128, 256, 512)
MEMORY_STEPS = 20


@dataclass(frozen=True)
class Entrant:
    """A way to train the network, and the file that contains it."""

    name: str
    file: str
    needs: str
    dtypes: Sequence[str] = DTYPES
    options: tuple[tuple[str, Any], ...] = ()


THIS_PROJECT = Entrant("this project", "contenders/this_project.py", "tensorflow")
NOT_NATIVE = Entrant(
    "this project, --native=off", THIS_PROJECT.file, "tensorflow", options=(("native", "off"),)
)
KERAS = Entrant("Keras fit", "contenders/keras_fit.py", "keras")
TF2 = Entrant("TF2 reference", "contenders/tf2_reference.py", "tensorflow", ("fp32",))
TORCH = tuple(
    Entrant(f"PyTorch {name}", "contenders/pytorch.py", "torch", options=(("compiled", compiled),))
    for name, compiled in (("eager", False), ("compile", True))
)
CONTENDERS = (THIS_PROJECT, NOT_NATIVE, KERAS, TF2, *TORCH)

Turn = Callable[[], float]
Facts = dict[str, Any]


class DifferentNetworks(Exception):
    """An error: the contenders train different networks, so they cannot be compared."""


class Entries:
    """The contenders of one measure: their turns, or the problems that prevent turns."""

    def __init__(self) -> None:
        self._order: list[str] = []
        self._turns: dict[str, Turn] = {}
        self.problems: dict[str, str] = {}
        self.facts: dict[str, Facts] = {}
        self.rounds: dict[str, list[float]] = {}

    def add(self, name: str, needs: str, get_ready: Callable[[], tuple[Turn, Facts]]) -> None:
        """Gets a contender ready, unless its library is missing."""
        self._order.append(name)
        if importlib.util.find_spec(needs) is None:
            self.problems[name] = f"skipped: no {needs}"
            return
        print(f"  getting ready: {name}", flush=True)
        try:
            self._turns[name], self.facts[name] = get_ready()
        except Failure as failure:
            self.problems[name] = f"failed: {failure}"

    def take_turns(self, rounds: int) -> None:
        """Gives each contender one turn per round, in the same order."""
        self.rounds = {name: [] for name in self._turns}
        for i in range(rounds):
            print(f"  round {i + 1} of {rounds}:", end="", flush=True)
            for name, turn in self._turns.items():
                if name in self.problems:
                    continue
                try:
                    self.rounds[name].append(turn())
                    print("", report.number(self.rounds[name][-1]), end="", flush=True)
                except Failure as failure:
                    self.problems[name] = f"failed: {failure}"
            print(flush=True)

    def measure(
        self,
        title: str,
        unit: str,
        more_is_better: bool,
        against: Mapping[str, str] | str | None = None,
        only: Callable[[str], bool] = lambda name: True,
    ) -> dict[str, Any]:
        """Returns the measure for the report; `against` sets what each is compared with."""
        entries = []
        for name in filter(only, self._order):
            reference = against.get(name) if isinstance(against, Mapping) else against
            entry = {"name": name, "against": reference, "is_reference": name == reference}
            entry |= self.facts.get(name, {})
            if name in self.problems:
                entry["problem"] = self.problems[name]
            else:
                sound = reference is not None and reference not in self.problems
                compared = self.rounds.get(reference) if sound else None
                entry |= report.summary(self.rounds[name], compared)
            entries.append(entry)
        return {"title": title, "unit": unit, "more_is_better": more_is_better, "entries": entries}


class Bench:
    """The common parts of all measures: the flags, a temporary folder, and its data."""

    def __init__(self, flags: argparse.Namespace, folder: Path):
        self.flags, self.folder = flags, folder

    @property
    def test_images(self) -> int:
        return self.flags.images // 5

    @functools.cached_property
    def data(self) -> str:
        """Writes synthetic images in CIFAR-10's file format, and returns their folder."""
        print("  writing the photos", flush=True)
        run_program(
            PROJECT / "cifar10_download_and_extract.py",
            "--synthetic",
            f"--synthetic_train_images={self.flags.images}",
            f"--synthetic_test_images={self.test_images}",
            f"--data_dir={self.folder}",
        )
        return str(self.folder / "cifar-10-batches-bin")

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def run_trainer(self, ckpt_path: Path, *flags: str, until: str | None = None) -> Ended:
        program = PROJECT / "run_trainer.py"
        where = (f"--path={self.data}", f"--ckpt_path={ckpt_path}")
        return run_program(program, *where, *flags, until=until)

    def run_tf2(self, do: str, *flags: str, until: str | None = None) -> Ended:
        return run_program(FOLDER / TF2.file, do, f"--folder={self.data}", *flags, until=until)

    def steps(
        self,
        stack: contextlib.ExitStack,
        contender: Entrant,
        steps: int,
        dtype: str = "fp32",
        layers: int = 20,
        **options: Any,
    ) -> tuple[Turn, Facts]:
        """Gets a contender ready to train. Its turn returns images per second."""
        worker = stack.enter_context(Worker.start(contender.file))
        options |= dict(contender.options)
        facts = worker.ask("prepare", layers=layers, dtype=dtype, **options)
        worker.ask("steps", count=WARM_UP)
        return functools.partial(worker.ask, "steps", count=steps), facts

    def pipeline(
        self, stack: contextlib.ExitStack, contender: Entrant, batches: int
    ) -> tuple[Turn, Facts]:
        """Gets a contender's input pipeline ready. Its turn returns images per second."""
        worker = stack.enter_context(Worker.start(contender.file))
        worker.ask("open_pipeline", folder=self.data)
        worker.ask("pipeline", count=1)
        return functools.partial(worker.ask, "pipeline", count=batches), {}


def once_before(turn: Turn) -> tuple[Turn, Facts]:
    """Takes a turn once, because the first time may be slower, and returns it."""
    turn()
    return turn, {}


def refuse_different_networks(entries: Entries) -> None:
    counts = {name: facts.get("parameters") for name, facts in entries.facts.items()}
    counts = {name: count for name, count in counts.items() if count is not None}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise DifferentNetworks(f"these have different numbers of parameters: {told}")


def measure_steps(
    bench: Bench, layers: int, matmul: bool = False, everyone: bool = True
) -> dict[str, Any]:
    """Measures each contender's bare step and, with `matmul`, the rate that it could reach."""
    steps = bench.flags.steps if layers == 20 else max(2, bench.flags.steps // 5)
    products = {f"matmul {dtype}": dtype for dtype in DTYPES if matmul}
    entries, against = Entries(), {}
    with contextlib.ExitStack() as stack:
        for dtype in DTYPES:
            for contender in CONTENDERS if everyone else (THIS_PROJECT,):
                if dtype not in contender.dtypes:
                    continue
                name = f"{contender.name} {dtype}"
                against[name] = f"{THIS_PROJECT.name} {dtype}"
                ready = functools.partial(bench.steps, stack, contender, steps, dtype, layers)
                entries.add(name, contender.needs, ready)
        for name, dtype in products.items():
            worker = stack.enter_context(Worker.start(THIS_PROJECT.file))
            turn = functools.partial(worker.ask, "matmul", dtype=dtype)
            entries.add(name, THIS_PROJECT.needs, functools.partial(once_before, turn))
        refuse_different_networks(entries)
        entries.take_turns(bench.flags.rounds)

    measures = {}
    if everyone:
        measures[f"train{layers}"] = entries.measure(
            f"ResNet-{layers}, the bare training step, batches of {BATCH_SIZE}",
            *("images/s", True, against),
            only=lambda name: name not in products,
        )
    if matmul:
        measure = entries.measure(
            "One large matrix product", "GMAC/s", True, only=lambda name: name in products
        )
        measure["remarks"] = []
        for entry in measure["entries"]:
            dtype = products[entry["name"]]
            name = f"{THIS_PROJECT.name} {dtype}"
            if "problem" in entry or name in entries.problems:
                continue
            multiply_adds = PASSES * entries.facts[name]["multiply_adds"]
            pairs = zip(entries.rounds[name], entry["rounds"], strict=True)
            entry["shares"] = [rate * multiply_adds / 1e9 / gmacs for rate, gmacs in pairs]
            entry["share"] = statistics.median(entry["shares"])
            measure["remarks"].append(
                f"{name}: ResNet-{layers}'s step computes at {entry['share']:.1%} of that rate "
                f"({multiply_adds / 1e6:.1f} MMAC an image)."
            )
        measures["matmul"] = measure
    return measures


def measure_fine_tuning(bench: Bench) -> dict[str, Any]:
    """Compares the step that trains only the final layer with the step that trains everything."""
    entries, steps = Entries(), bench.flags.steps
    with contextlib.ExitStack() as stack:
        for name, fine_tune in (("fine-tuning step", True), ("whole step", False)):
            ready = functools.partial(bench.steps, stack, THIS_PROJECT, steps, fine_tune=fine_tune)
            entries.add(name, THIS_PROJECT.needs, ready)
        entries.take_turns(bench.flags.rounds)
    title = f"ResNet-20, training the final layer alone, fp32, batches of {BATCH_SIZE}"
    return {"fine_tuning": entries.measure(title, "images/s", True, "fine-tuning step")}


def measure_pipeline(bench: Bench) -> dict[str, Any]:
    """Measures the input pipelines without a network."""
    entries = Entries()
    with contextlib.ExitStack() as stack:
        for contender in (THIS_PROJECT, TF2, KERAS):
            ready = functools.partial(bench.pipeline, stack, contender, 20 * bench.flags.steps)
            entries.add(contender.name, contender.needs, ready)
        entries.take_turns(bench.flags.rounds)
    title = f"The input pipeline alone, augmented batches of {BATCH_SIZE}"
    return {"pipeline": entries.measure(title, "images/s", True, THIS_PROJECT.name)}


def measure_trainer(bench: Bench) -> dict[str, Any]:
    """Compares run_trainer.py (files, pipeline, logging, saving) with bare steps and others."""
    steps = 15 * bench.flags.steps
    every = max(1, steps // 6)

    def train() -> float:
        flags = (f"--max_train_steps={steps}", f"--log_per_iterations={every}")
        saving = f"--save_per_iterations={max(1, steps // 3)}"
        lines = bench.run_trainer(bench.new_folder(), *flags, saving).lines
        matches = (re.match(r"step (\d+)/.* images/s (\d+)", line) for line in lines)
        # The first interval includes the start-up.
        rates = [float(match[2]) for match in matches if match and int(match[1]) > every]
        return statistics.harmonic_mean(rates)

    entries = Entries()
    with contextlib.ExitStack() as stack:
        entries.add("run_trainer.py", THIS_PROJECT.needs, lambda: (train, {"steps": steps}))
        in_memory = functools.partial(bench.steps, stack, THIS_PROJECT, bench.flags.steps)
        entries.add("its bare step", THIS_PROJECT.needs, in_memory)
        for contender in (KERAS, TF2):
            # A turn takes more steps than a pipeline has batches ready at its start.
            ready = functools.partial(
                bench.steps, stack, contender, 3 * bench.flags.steps, folder=bench.data
            )
            entries.add(f"{contender.name}, from the pipeline", contender.needs, ready)
        entries.take_turns(bench.flags.rounds)
    title = f"ResNet-20, training as a whole, fp32, batches of {BATCH_SIZE}"
    return {"trainer": entries.measure(title, "images/s", True, "run_trainer.py")}


def measure_programs(
    bench: Bench, title: str, ours: str, our_turn: Turn, tf2_turn: Turn
) -> dict[str, Any]:
    """Measures the seconds of two programs, less the seconds of `import tensorflow`."""
    importing = "import tensorflow"

    def import_turn() -> float:
        code = f"{importing}; print('done', flush=True)"
        return run_program("-c", code, until="done").seconds

    entries = Entries()
    for name, turn in ((importing, import_turn), (ours, our_turn), (TF2.name, tf2_turn)):
        entries.add(name, "tensorflow", functools.partial(once_before, turn))
    entries.take_turns(bench.flags.rounds)
    remarks = []
    if importing not in entries.problems:
        import_seconds = statistics.median(entries.rounds[importing])
        remarks = [f"net: less the median of `{importing}` by itself, {import_seconds:.2f} s"]
        for name in {ours, TF2.name} - set(entries.problems):
            gross = entries.rounds[name]
            entries.facts[name] = {"gross_rounds": gross}
            entries.rounds[name] = [seconds - import_seconds for seconds in gross]
    against = dict.fromkeys((ours, TF2.name), ours)
    return entries.measure(title, "s", False, against) | {"remarks": remarks}


def measure_startup(bench: Bench) -> dict[str, Any]:
    """Measures the time from the start of the program to the end of its first step."""

    def our_turn(layers: int) -> float:
        flags = (f"--num_layers={layers}", "--max_train_steps=1", "--log_per_iterations=1")
        return bench.run_trainer(bench.new_folder(), *flags, until="step 1/").seconds

    def tf2_turn(layers: int) -> float:
        return bench.run_tf2("train", f"--layers={layers}", until="step 1 ").seconds

    return {
        f"startup{layers}": measure_programs(
            bench,
            f"ResNet-{layers}, from the start until the first step is done, net",
            "run_trainer.py",
            functools.partial(our_turn, layers),
            functools.partial(tf2_turn, layers),
        )
        for layers in (20, 110)
    }


def measure_evaluate(bench: Bench) -> dict[str, Any]:
    """Measures the programs that evaluate a checkpoint of ResNet-20 on the test images."""
    ours, theirs = bench.new_folder(), bench.new_folder() / "reference"

    # Each turn makes its own checkpoint. A failure to do so counts only against its program.
    def our_turn() -> float:
        if not (ours / "checkpoint").exists():
            bench.run_trainer(ours, "--max_train_steps=1")
        where = (f"--path={bench.data}", f"--ckpt_path={ours}")
        return run_program(PROJECT / "run_evaluator.py", *where).seconds

    def tf2_turn() -> float:
        if not theirs.with_suffix(".index").exists():
            bench.run_tf2("train", f"--checkpoint={theirs}")
        return bench.run_tf2("evaluate", f"--checkpoint={theirs}").seconds

    title = f"ResNet-20, evaluating on {bench.test_images:,} images, start to end, net"
    measure = measure_programs(bench, title, "run_evaluator.py", our_turn, tf2_turn)
    return {"evaluate": measure}


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Measures the peak memory of the training programs."""

    def our_turn() -> float:
        flag = f"--max_train_steps={MEMORY_STEPS}"
        return bench.run_trainer(bench.new_folder(), flag).peak_mib

    def tf2_turn() -> float:
        return bench.run_tf2("train", f"--steps={MEMORY_STEPS}").peak_mib

    entries = Entries()
    entries.add("run_trainer.py", THIS_PROJECT.needs, lambda: (our_turn, {}))
    entries.add(TF2.name, TF2.needs, lambda: (tf2_turn, {}))
    entries.take_turns(bench.flags.rounds)
    title = f"ResNet-20, peak memory of {MEMORY_STEPS} steps on {bench.flags.images:,} images"
    return {"memory": entries.measure(title, "MiB", False, "run_trainer.py")}


def measure_scaling(bench: Bench) -> dict[str, Any]:
    """Measures this project's step at several depths and batch sizes, one network at a time."""
    networks = [(layers, bottleneck, BATCH_SIZE) for layers, bottleneck in DEPTHS]
    networks += [(20, False, size) for size in BATCH_SIZES if size != BATCH_SIZE]
    points = []
    for layers, bottleneck, batch_size in networks:
        name = f"ResNet-{layers}{' bottleneck' * bottleneck}, {batch_size} images"
        print(f"  {name}", flush=True)
        network = {"layers": layers, "bottleneck": bottleneck, "batch_size": batch_size}
        try:
            points.append({"name": name, **network, **_time_network(bench, **network)})
        except Failure as failure:
            points.append({"name": name, **network, "problem": f"failed: {failure}"})

    sound = [point for point in points if "problem" not in point]
    series = {
        # The line is fitted without the bottleneck network, which is then compared with it.
        "depths": [point for point in sound if point["batch_size"] == BATCH_SIZE],
        "batch sizes": [point for point in sound if point["layers"] == 20],
    }
    remarks = []
    for what, chosen in series.items():
        for key, quantity in (("median", "seconds"), ("peak_mib", "memory")):
            remarks += report.departures(
                [
                    (point["name"], point["multiply_adds"], point[key], not point["bottleneck"])
                    for point in chosen
                ],
                f"{quantity} against multiply-adds, over the {what}",
            )
    if not remarks:
        remarks = [f"seconds and memory keep within {report.DEPARTURE:.0%} of straight lines"]
    title = "Scaling: this project's bare step, fp32, against depth and batch size"
    return {"scaling": {"title": title, "points": points, "remarks": remarks}}


def _time_network(bench: Bench, **network: Any) -> dict[str, Any]:
    batch_size = network["batch_size"]
    # All turns have about the same work. Otherwise, deep networks would take very long.
    work = network["layers"] * batch_size / (20 * BATCH_SIZE)
    steps = max(2, round(bench.flags.steps / work))
    with Worker.start(THIS_PROJECT.file) as worker:
        facts = worker.ask("prepare", dtype="fp32", **network)
        worker.ask("steps", count=2)
        rates = [worker.ask("steps", count=steps) for _ in range(bench.flags.rounds)]
        peak = worker.ask("peak_memory")
    return {
        **report.summary([batch_size / rate for rate in rates]),
        "multiply_adds": PASSES * batch_size * facts["multiply_adds"],
        "peak_mib": peak,
    }
