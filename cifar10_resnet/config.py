"""Defines the settings of a run once: its network, its data and its hyperparameters.

The flags, their checks, docs/flags.md and the description in a checkpoint follow from the fields
here. This module imports nothing slow, so a wrong setting is refused before TensorFlow starts.
"""

import dataclasses
import json
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any

from cifar10_resnet.errors import UserError
from cifar10_resnet.formats import CIFAR10_NAMES, FORMATS, MAX_CLASSES, SIDE
from cifar10_resnet.settings import Checked, setting

# Each of these makes a setting of one group. --help shows it under the group's title.
of_data = partial(setting, group="Data")
of_network = partial(setting, group="Network")
of_recipe = partial(setting, group="Recipe and length")
of_pretrained = partial(setting, group="Pretrained network")


MAX_LAYERS = 2_000  # The papers' deepest network has 1,202.


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
        20,
        "Number of layers: 6n + 2, or 9n + 2 with --bottleneck",
        also=("resnet_size",),
        least=1,
        most=MAX_LAYERS,
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
    num_classes: int = setting(10, least=2, most=MAX_CLASSES)
    batch_norm_decay: float = of_network(
        0.99,
        "Decay of the batch-norm moving averages",
        also=("batch_norm_momentum",),
        least=0,
        most=1,
    )
    batch_norm_epsilon: float = setting(1e-3, least=0, most=1)

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
    def title(self) -> str:
        """Returns the data set's name for readers."""
        known = FORMATS.get(self.dataset)
        return known.title if known else "synthetic images"

    @property
    def scored_split(self) -> str:
        """Returns the split to evaluate a run on: "holdout" if it has one, "test" otherwise."""
        return "holdout" if self.holdout else "test"


_FAST: dict[str, Any] = {
    "num_iterations": 16_000,
    "optimizer": "muon",
    "init_lr": 0.2,
    "nesterov": True,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "alternate_flips": True,
    "cutout": 9,
}
# A recipe overrides TrainingConfig's defaults. A flag that the user passes overrides both.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "one_cycle": {
        "num_iterations": 16_000,
        "init_lr": 0.2,
        "nesterov": True,
        "weight_decay": 5e-4,
    },
    "fast": _FAST,
    "best": _FAST | {"num_iterations": 39_062, "average_weights": 0.2},
}
# --help shows these lines. docs/results.md has the test accuracies.
RECIPE_NOTES = {
    "paper": "ResNet-20 reaches 91.94% in 164 epochs",
    "one_cycle": "41 epochs, accuracy not measured",
    "fast": "ResNet-20 reaches 92.31% in 41 epochs",
    "best": "ResNet-20 reaches 93.22% in 100 epochs",
}
MAX_ITERATIONS = 10_000_000  # The learning rate of every step is in memory.
MAX_BATCH_SIZE = 65_536  # Some of TensorFlow's kernels crash with more than 2^31 values.


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
    batch_size: int = of_recipe(
        128, "Images per step, over all replicas", least=1, most=MAX_BATCH_SIZE
    )
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
        0, "Width in pixels of the square blanked in each training image", least=0, most=2 * SIDE
    )
    mixup: float = of_recipe(
        0.0, "Mix images in pairs for this fraction of the run", least=0, most=1
    )
    average_weights: float = of_recipe(0.0, "Last fraction of the run to average", least=0, most=1)
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
            run = cls(
                _read(ModelConfig, parts["model"]),
                _read(DataConfig, parts["data"]),
                _read(TrainingConfig, parts["training"]),
            )
            if len(run.data.class_names) != run.model.num_classes:
                names = f"{len(run.data.class_names)} class names"
                raise UserError(f"it has {names} for {run.model.num_classes} classes")
            return run
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
