"""Defines every setting once: a run's network, data and hyperparameters, and how to start it.

The flags, their checks, docs/flags.md and the description in a checkpoint follow from the fields
here. This module imports nothing slow, so a wrong setting is refused before TensorFlow starts.
"""

import dataclasses
import json
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any

from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import CIFAR10_NAMES, FORMATS
from cifar10_resnet.settings import Checked, setting

# Each of these makes a setting of one group. --help shows it under the group's title.
of_data = partial(setting, group="Data")
of_network = partial(setting, group="Network")
of_recipe = partial(setting, group="Recipe and length")
of_pretrained = partial(setting, group="Pretrained network")
of_files = partial(setting, group="Files and folders")
of_logging = partial(setting, group="Logging")
of_evaluation = partial(setting, group="Evaluation")
of_device = partial(setting, group="Device and precision")
of_several = partial(setting, group="Several devices and workers")
# This makes a setting for the checkpoint that a program reads.
checkpoint = partial(
    setting, help="Checkpoint, or a folder (its newest checkpoint is used)", also=("model_dir",)
)


# --- What a run is --------------------------------------------------------------------------------


def units_per_block(num_layers: int, bottleneck: bool = False) -> int:
    """Returns n for a depth of 6n + 2 layers (9n + 2 with bottleneck units)."""
    per_unit = 9 if bottleneck else 6
    n, rest = divmod(num_layers - 2, per_unit)
    if n >= 1 and rest == 0:
        return n
    below = max(n, 1) * per_unit + 2
    kind = "9n + 2 with bottleneck units" if bottleneck else "6n + 2"
    raise UserError(
        f"is invalid: it must be {kind}. The nearest are {below} and {below + per_unit}.",
        "num_layers",
        num_layers,
    )


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The shape of a network: everything needed to build it again."""

    num_layers: int = of_network(
        20, "Number of layers: 6n + 2, or 9n + 2 with --bottleneck", also=("resnet_size",), least=1
    )
    shortcut_connections: bool = of_network(
        True,
        "Build shortcuts (--noshortcut_connections: a plain network)",
        also=("shortcut_connection",),
    )
    bottleneck: bool = of_network(False, "Use bottleneck units: 1x1, 3x3 and 1x1 convolutions")
    resnet_version: int = of_network(
        2, "1: ReLU after each addition. 2: ReLU before each convolution", choices=(1, 2)
    )
    num_classes: int = setting(10, least=2)
    batch_norm_decay: float = of_network(
        0.99,
        "Decay of the batch-norm moving averages",
        also=("batch_norm_momentum",),
        least=0,
        most=1,
    )
    batch_norm_epsilon: float = setting(1e-3, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        units_per_block(self.num_layers, self.bottleneck)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that build this network: `ResNet(**run.model.arguments())`."""
        return dataclasses.asdict(self)

    @property
    def title(self) -> str:
        """Returns a name for headings: ResNet-20, Plain-56, ResNet-20 (version 1)."""
        kind = "ResNet" if self.shortcut_connections else "Plain"
        return f"{kind}-{self.num_layers}" + (" (version 1)" if self.resnet_version == 1 else "")

    @property
    def name(self) -> str:
        """Returns a name for folders: resnet20, plain56, resnet164-bottleneck, resnet20-v1."""
        return (
            ("resnet" if self.shortcut_connections else "plain")
            + str(self.num_layers)
            + ("-bottleneck" if self.bottleneck else "")
            + ("-v1" if self.resnet_version == 1 else "")
        )


@dataclass(frozen=True)
class DataConfig(Checked):
    """The data set of a run, with its classes and its holdout."""

    dataset: str = of_data(
        "cifar10",
        "Data set to use if the folder contains several",
        choices=(*FORMATS, "synthetic"),
        shown="",
        implied_by=("use_synthetic_data", "path"),
    )
    class_names: tuple[str, ...] = setting(CIFAR10_NAMES)
    holdout: int = of_data(0, "Keep the last N training images for evaluation", least=0)
    coarse_labels: bool = of_data(
        False, "Use CIFAR-100's 20 coarse labels instead of its 100 fine labels"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.class_names) < 2 or not all(map(str.isprintable, self.class_names)):
            raise UserError("must be two or more names.", "class_names", self.class_names)

    @property
    def scored_split(self) -> str:
        """Returns the split to evaluate a run on: "holdout" if it has one, "test" otherwise."""
        return "holdout" if self.holdout else "test"


# A recipe overrides TrainingConfig's defaults. A flag that the user passes overrides both.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "one_cycle": {
        "num_iterations": 16_000,
        "init_lr": 0.2,
        "nesterov": True,
        "weight_decay": 5e-4,
    },
    "fast": {
        "num_iterations": 16_000,
        "optimizer": "muon",
        "init_lr": 0.2,
        "nesterov": True,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "alternate_flips": True,
        "cutout": 9,
    },
}
# --help shows these lines. docs/results.md has the test accuracies.
RECIPE_NOTES = {
    "paper": "ResNet-20 reaches 91.94% in 164 epochs",
    "one_cycle": "41 epochs, accuracy not measured",
    "fast": "ResNet-20 reaches 92.31% in 41 epochs",
}
MAX_ITERATIONS = 10_000_000  # The learning rate of every step is in memory.


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """The hyperparameters. The defaults are the paper's recipe."""

    recipe: str = of_recipe(
        "paper",
        "Schedule and hyperparameters (other flags override them)",
        choices=tuple(RECIPES),
        notes=RECIPE_NOTES,
    )
    num_iterations: int = of_recipe(
        64_000, "Length in steps", least=1, most=MAX_ITERATIONS, implied_by=("train_epochs",)
    )
    batch_size: int = of_recipe(128, "Images per step, over all replicas", least=1)
    optimizer: str = of_recipe("momentum", "Optimizer", choices=("momentum", "muon"))
    init_lr: float = of_recipe(0.1, "Learning rate, or its peak", least=0)
    scale_lr: bool = of_recipe(False, "Multiply the learning rate by --batch_size / 128")
    momentum: float = of_recipe(0.9, "Momentum", least=0, most=1)
    nesterov: bool = of_recipe(False, "Use Nesterov momentum")
    weight_decay: float = of_recipe(2e-4, "L2 penalty on the kernels", least=0)
    label_smoothing: float = of_recipe(
        0.0, "Fraction of each label spread over all classes", least=0, most=1
    )
    alternate_flips: bool = setting(False)
    cutout: int = of_recipe(
        0, "Width in pixels of the square blanked in each training image", least=0
    )
    seed: int = of_recipe(0, "Random seed for weights, image order, crops and flips", least=0)
    pretrained: str = setting("")  # the checkpoint that the network started from, if any
    fine_tune: bool = of_pretrained(False, "Train only the final layer")
    recompute_mean: bool = of_pretrained(
        False, "Subtract the mean of the new images, not the pretrained one"
    )


def depends_on_recipe(item: Field) -> bool:
    """Returns whether a recipe changes a setting."""
    return any(item.name in recipe for recipe in RECIPES.values())


def with_given(config: Any, given: dict[str, Any]) -> Any:
    """Returns the configuration with its given values. None counts as not given."""
    names = {item.name for item in fields(config)}
    chosen = {k: v for k, v in given.items() if k in names and v is not None}
    return dataclasses.replace(config, **chosen)


def training_config(given: dict[str, Any]) -> TrainingConfig:
    """Returns the hyperparameters of the given recipe. Other given values override them."""
    recipe = with_given(TrainingConfig(), {"recipe": given.get("recipe")}).recipe
    return with_given(with_given(TrainingConfig(), RECIPES[recipe]), given)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run: its network, its data and its hyperparameters."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def settings(self) -> dict[str, Any]:
        """Returns all settings as one dict. Field names are unique."""
        parts = (self.model, self.data, self.training)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Reads what `to_json` wrote. Fields that an older version lacked take their defaults."""
        try:
            parts = json.loads(text)
            return cls(
                _read(ModelConfig, parts["model"]),
                _read(DataConfig, parts["data"]),
                _read(TrainingConfig, parts["training"]),
            )
        except (
            UserError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as error:
            raise UserError(
                f"another version of this project wrote its description ({error!s:.200}). Use "
                "that version."
            ) from error


def _read(kind: type, values: dict[str, Any]) -> Any:
    """Returns a dataclass from JSON values. Lists become tuples, which JSON lacks."""
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def refuse_contradictions(
    run: RunConfig, given: dict[str, Any], prefix: str, named_by: str = "--ckpt_path"
) -> None:
    """Refuses given values that differ from the checkpoint's run. None counts as not given."""
    for name, fixed in run.settings().items():
        if given.get(name, fixed) not in (None, fixed):
            raise UserError(
                f"does not match the checkpoint {prefix}, which has {name}={fixed}. Remove the "
                f"flag, or use another {named_by}.",
                name,
                given[name],
            )


# --- How to start a run ---------------------------------------------------------------------------

# Without --log_per_iterations, learning curves have enough points however short the run is.
LEAST_LOGS, MOST_STEPS_PER_LOG = 20, 200


@dataclass(frozen=True)
class Options(Checked):
    """The settings that may change each time a run starts or resumes."""

    path: str | None = of_data(
        None,
        "Folder with the data files, or its parent folder",
        first=True,
        also=("data_dir", "data_path"),
        shown=" or ".join(known.folder for known in FORMATS.values() if known.folder),
        own=True,
    )
    use_synthetic_data: bool = of_data(False, "Train on synthetic images (no --path needed)")
    train_epochs: float | None = of_recipe(
        None, "Length in epochs, instead of --num_iterations", above=0
    )
    max_train_steps: int | None = of_recipe(
        None, "Stop after this step without changing the schedule", least=1
    )
    pretrained_model_checkpoint_path: str | None = of_pretrained(
        None, "Start from this checkpoint's network, except the final layer", first=True
    )
    ckpt_path: str | None = of_files(
        None,
        "Run folder for checkpoints and logs",
        also=("model_dir",),
        shown="runs/resnet20, runs/resnet20-fast and so on",
        own=True,
    )
    train_log_path: str | None = of_files(
        None, "TensorBoard folder", also=("log_path",), shown="log in --ckpt_path", own=True
    )
    export_dir: str | None = of_files(
        None, "Write a SavedModel to this new folder at the end", own=True
    )
    clean: bool = of_files(False, "Delete the run in --ckpt_path and start again")
    save_per_iterations: int = of_logging(1000, "Save a checkpoint every N steps", least=1)
    max_ckpts: int = of_logging(5, "Number of newest checkpoints to keep (negative: all)")
    log_per_iterations: int | None = of_logging(
        None,
        "Log every N steps",
        also=("log_per_steps",),
        least=1,
        shown=f"{MOST_STEPS_PER_LOG}, or less for at least {LEAST_LOGS} logs",
    )
    profile_steps: tuple[int, int] | None = of_logging(
        None,
        "Profile these steps for TensorBoard: FIRST,LAST",
        meaning="a first and a last step, as in 100,110",
        least=1,
    )
    quiet: bool = of_logging(False, "Print only errors and the result")
    verbose: bool = of_logging(False, "Print all settings and TensorFlow's messages")
    epochs_between_evals: int = of_evaluation(
        0, "Evaluate every N epochs, on the holdout if there is one", least=0
    )
    stop_threshold: float | None = of_evaluation(
        None,
        "Stop when an evaluation reaches this accuracy, a fraction such as 0.92",
        least=0,
        most=1,
    )
    eval_only: bool = of_evaluation(False, "Evaluate the newest checkpoint without training")
    device: str = of_device(
        "auto",
        "Device to use (auto: a GPU if TensorFlow finds one)",
        choices=("auto", "cpu", "gpu"),
    )
    data_format: str = of_device(
        "auto",
        "Data format inside the network (auto: channels_first only on GPUs)",
        choices=("auto", "channels_first", "channels_last"),
    )
    dtype: str = of_device(
        "fp32",
        "Precision of the computation (variables stay fp32)",
        choices=("fp32", "bf16", "fp16"),
    )
    loss_scale: float = of_device(128.0, "Factor on the loss against fp16 underflow", least=1)
    native: str = of_device(
        "auto",
        "Native kernels for CPUs (auto: if they can be built; on: required)",
        choices=("auto", "on", "off"),
    )
    jit_compile: bool = of_device(False, "Compile the step with XLA (slower on CPUs)")
    steps_per_call: int = of_device(
        1, "Steps per call from Python (more is faster on GPUs)", least=1
    )
    distribution_strategy: str = of_several(
        "auto",
        "Devices to use: all workers in TF_CONFIG, all local GPUs, or one",
        choices=("auto", "off", "mirrored", "multi_worker"),
    )
    num_gpus: int | None = of_several(None, "Number of local GPUs to use", least=0, shown="all")
    sync_batch_norm: bool = of_several(
        False, "Compute batch-norm statistics over the whole batch, not per replica"
    )
    worker_timeout: float = of_several(
        60.0, "Seconds of silence before a worker counts as lost", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for is_wrong, why in (
            (self.quiet and self.verbose, "--quiet and --verbose contradict. Use one of them."),
            (
                self.stop_threshold is not None and not self.epochs_between_evals,
                "--stop_threshold needs evaluations. Add --epochs_between_evals=1.",
            ),
            (
                self.export_dir is not None and self.eval_only,
                "--export_dir does not work with --eval_only. Use the export command.",
            ),
            (
                self.clean and self.eval_only,
                "--clean would delete the checkpoint that --eval_only evaluates. Remove one of "
                "them.",
            ),
            (
                self.num_gpus is not None
                and self.device == ("gpu" if self.num_gpus == 0 else "cpu"),
                "--num_gpus does not fit --device. Use --num_gpus=1 or more with gpu, 0 with cpu.",
            ),
        ):
            if is_wrong:
                raise UserError(why)

    def refuse_beside(self, given: dict[str, Any]) -> None:
        """Refuses given settings that --train_epochs or --use_synthetic_data replaces."""
        if self.train_epochs is not None and given.get("num_iterations") is not None:
            raise UserError(
                "--num_iterations and --train_epochs both set the length. Use one of them."
            )
        if self.use_synthetic_data and (given.get("dataset") or given.get("coarse_labels")):
            raise UserError(
                "--use_synthetic_data does not work with --dataset or --coarse_labels. Remove them."
            )

    def last_step(self, run: RunConfig) -> int:
        """Returns the step at which this start of a run ends."""
        return min(run.training.num_iterations, self.max_train_steps or run.training.num_iterations)

    def steps_per_log(self, run: RunConfig) -> int:
        """Returns the number of steps from one log of a run to the next."""
        enough = max(1, self.last_step(run) // LEAST_LOGS)
        return self.log_per_iterations or min(enough, MOST_STEPS_PER_LOG)
