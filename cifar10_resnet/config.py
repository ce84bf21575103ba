"""What a run is: its network, its data, its hyperparameters. Every checkpoint carries this.

Plain dataclasses without TensorFlow, so that a wrong depth or a contradiction is told before
anything slow is imported.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import CIFAR10_NAMES, FORMATS


def units_per_block(num_layers: int, bottleneck: bool = False) -> int:
    """Returns n for a depth of 6n + 2 layers (9n + 2 with bottleneck units)."""
    per_unit = 9 if bottleneck else 6
    n, rest = divmod(num_layers - 2, per_unit)
    if n >= 1 and rest == 0:
        return n
    below = max(n, 1) * per_unit + 2
    neighbours = f"{below} or {below + per_unit}"
    kind = "9n + 2 (with bottleneck units)" if bottleneck else "6n + 2"
    common = "29, 56, 110, 164, 1001" if bottleneck else "20, 32, 44, 56, 110, 1202"
    raise UserError(
        f"--num_layers={num_layers} is not a depth of these networks, which have {kind} layers: "
        f"the nearest are {neighbours} (common depths: {common})."
    )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a network: all that is needed to build it again."""

    num_layers: int = 20
    shortcut_connections: bool = True
    bottleneck: bool = False
    resnet_version: int = 2
    num_classes: int = 10
    batch_norm_decay: float = 0.99
    batch_norm_epsilon: float = 1e-3

    def __post_init__(self) -> None:
        units_per_block(self.num_layers, self.bottleneck)
        if self.resnet_version not in (1, 2):
            raise UserError(
                f"--resnet_version={self.resnet_version} is unknown: give 1 (the first paper's "
                "post-activation units) or 2 (pre-activation)."
            )

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that build this network: `ResNet(**run.model.arguments())`."""
        return dataclasses.asdict(self)

    @property
    def name(self) -> str:
        """A short name, for folders: resnet20, plain56, resnet164-bottleneck, resnet20-v1."""
        return (
            ("resnet" if self.shortcut_connections else "plain")
            + str(self.num_layers)
            + ("-bottleneck" if self.bottleneck else "")
            + ("-v1" if self.resnet_version == 1 else "")
        )


@dataclass(frozen=True)
class DataConfig:
    """Which images a run trains on."""

    dataset: str = "cifar10"
    class_names: tuple[str, ...] = CIFAR10_NAMES
    holdout: int = 0
    coarse_labels: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in (*FORMATS, "synthetic"):
            raise UserError(f"the data set {self.dataset!r} is unknown to this version.")

    @property
    def scored_split(self) -> str:
        """What a run is evaluated on: its holdout, or the test images if it has none."""
        return "holdout" if self.holdout else "test"


@dataclass(frozen=True)
class TrainingConfig:
    """The hyperparameters. The defaults are those of the paper's recipe."""

    recipe: str = "paper"
    num_iterations: int = 64_000
    batch_size: int = 128
    optimizer: str = "momentum"
    init_lr: float = 0.1
    scale_lr: bool = False
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    label_smoothing: float = 0.0
    alternate_flips: bool = False
    cutout: int = 0
    seed: int = 0
    pretrained: str = ""  # the checkpoint that the network started from, if it was one
    fine_tune: bool = False
    recompute_mean: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UserError(
                f"the recipe {self.recipe!r} is unknown: choose of {', '.join(RECIPES)}."
            )
        if self.optimizer not in OPTIMIZERS:
            raise UserError(
                f"the optimizer {self.optimizer!r} is unknown: choose of {', '.join(OPTIMIZERS)}."
            )
        # for what becomes of a length in epochs, too
        if not 1 <= self.num_iterations <= MAX_ITERATIONS:
            raise UserError(
                f"a run of {self.num_iterations} steps is none: 1 to {MAX_ITERATIONS:,} will do."
            )


OPTIMIZERS = ("momentum", "muon")
MAX_ITERATIONS = 10_000_000  # each has its learning rate in memory
MAX_SEED = 2**63 - 1

# What each recipe sets, on top of TrainingConfig's defaults. A flag given explicitly wins.
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


def with_given(config: Any, given: dict[str, Any]) -> Any:
    """The configuration with those of its fields replaced that are given (not None)."""
    names = {item.name for item in dataclasses.fields(config)}
    chosen = {k: v for k, v in given.items() if k in names and v is not None}
    return dataclasses.replace(config, **chosen)


def training_config(given: dict[str, Any]) -> TrainingConfig:
    """The hyperparameters of the given recipe, with those that are given put over them."""
    return with_given(with_given(TrainingConfig(), RECIPES[given.get("recipe") or "paper"]), given)


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def settings(self) -> dict[str, Any]:
        """All of it under the fields' own names, no two of which are alike."""
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
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                "the checkpoint's description is not one that this version of the project can "
                f"read ({error!s:.200})."
            ) from error


def _read(kind: type, values: dict[str, Any]) -> Any:
    """One of the dataclasses from JSON values, which must be of the types of its defaults."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for item in dataclasses.fields(kind):
        value = values.get(item.name, item.default)
        allowed = (float, int) if isinstance(item.default, float) else (type(item.default),)
        if type(value) not in allowed or not _is_sound(value):
            raise TypeError(f"{item.name} is {value!r:.60}")
    return kind(**values)


def _is_sound(value: Any) -> bool:
    """Whether a run may have such a value: names that can be printed, no number below zero."""
    if isinstance(value, tuple):
        return len(value) > 1 and all(isinstance(v, str) and v.isprintable() for v in value)
    if isinstance(value, float):
        return 0 <= value < math.inf
    return isinstance(value, str) or 0 <= value <= MAX_SEED


@dataclass(frozen=True)
class Options:
    """How to go about a run: all that may change from one start of it to the next."""

    ckpt_path: str
    train_log_path: str
    data_format: str = "channels_last"
    dtype: str = "fp32"
    loss_scale: float = 128.0
    jit_compile: bool = False
    sync_batch_norm: bool = False
    steps_per_call: int = 1
    log_per_iterations: int = 200
    save_per_iterations: int = 1000
    max_ckpts: int = 5
    epochs_between_evals: int = 0
    stop_threshold: float | None = None
    max_train_steps: int | None = None
    profile_steps: tuple[int, int] | None = None

    def last_step(self, run: RunConfig) -> int:
        """Returns the step at which this start of a run ends."""
        return min(run.training.num_iterations, self.max_train_steps or run.training.num_iterations)


def refuse_contradictions(
    run: RunConfig, given: dict[str, Any], prefix: str, named_by: str = "--ckpt_path"
) -> None:
    """Refuses given values (None is not given) that are not those of the checkpoint's run."""
    fixed = run.settings()
    for name, value in given.items():
        if value is not None and value != fixed[name]:
            raise UserError(
                f"{name}={value} was asked for, but the checkpoint {prefix} has "
                f"{name}={fixed[name]}: leave that flag out, or name another {named_by}."
            )
