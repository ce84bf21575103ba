"""The network against hand-worked counts, an independent reference, and its own other layouts."""

import inspect
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow as tf
from conftest import skip_without_channels_first
from numpy_resnet import NumpyResNet, Values

from cifar10_resnet import config as configs
from cifar10_resnet import formats
from cifar10_resnet.config import ModelConfig
from cifar10_resnet.errors import UserError
from resnet_model import (
    IMAGE_SHAPE,
    BatchNorm,
    ResNet,
    Settings,
    Unit,
    batch_norm_relu,
    convolution,
    units_per_block,
)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    # a GPU would multiply in TF32, which is too coarse for the tolerances here
    with tf.device("cpu"):
        yield


def config(kind: str, num_layers: int | None = None, **more: float) -> ModelConfig:
    """The network of a kind like "v2", "plain v1" or "v2 bottleneck", with one unit in a block."""
    bottleneck = "bottleneck" in kind
    return ModelConfig(
        num_layers=num_layers or (11 if bottleneck else 8),
        shortcut_connections="plain" not in kind,
        bottleneck=bottleneck,
        resnet_version=1 if "v1" in kind else 2,
        **more,
    )


def build(network: ModelConfig, **more: object) -> ResNet:
    return ResNet(**network.arguments(), **more)


def unit_of(
    network: ModelConfig,
    convolutions: list[tuple[int, int, int]],
    depth_in: int,
    rng: np.random.Generator,
    first: bool = False,
    layout: str = "NHWC",
) -> Unit:
    """Returns a single unit of this network."""
    settings = Settings(
        network.resnet_version,
        network.shortcut_connections,
        network.batch_norm_decay,
        network.batch_norm_epsilon,
        layout,
        batch_norm_relu,
        convolution,
    )
    return Unit("unit", convolutions, depth_in, settings, rng, first)


def random_images(number: int, seed: int = 0) -> np.ndarray:
    # Not symmetric around zero, so a batch norm before any ReLU has a mean to remove.
    rng = np.random.default_rng(seed)
    return (0.5 + rng.standard_normal((number, 32, 32, 3))).astype(np.float32)


def name_of(variable: tf.Variable) -> str:
    return variable.name.removesuffix(":0")


def values_of(module: tf.Module) -> Values:
    return {name_of(variable): variable.numpy() for variable in module.variables}


def randomise(module: tf.Module, seed: int = 1) -> None:
    """Replaces all initial zeros and ones by other values, so every parameter has an effect.

    Kernels keep theirs. Variables of one name get the same values in any network.
    """
    rng = np.random.default_rng(seed)
    for variable in sorted(module.variables, key=name_of):
        kind = name_of(variable).rsplit("/", 1)[-1]
        if kind in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 2.0, variable.shape))
        elif kind != "kernel":
            variable.assign(0.3 * rng.standard_normal(variable.shape))


def assert_close(actual, expected, tolerance: float, what: str = "") -> None:
    """Equal up to this share of the largest of the expected values."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, what
    scale = np.abs(expected).max()
    assert scale > 0, what
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=what)


# --- Size -----------------------------------------------------------------------------------------

# Weights of a basic network of n units per block, counted by hand (BN is a gamma and a beta):
#
#   convolution of the images  3·3·3·16                                     =    432
#   block 1, each unit         2 BN of 16, 2 convolutions 9·16·16           =  4,672
#   block 2, first unit        BN of 16 and 32, 9·16·32 and 9·32·32         = 13,920
#            each other one    2 BN of 32, 2 convolutions 9·32·32           = 18,560
#   block 3, first unit        BN of 32 and 64, 9·32·64 and 9·64·64         = 55,488
#            each other one    2 BN of 64, 2 convolutions 9·64·64           = 73,984
#   last BN and projection     128 + 64·10 + 10                             =    778
#
#   432 + 4,672n + 13,920 + 18,560(n - 1) + 55,488 + 73,984(n - 1) + 778    = 97,216n - 21,926
#
# Version 1 has the last BN at the images instead (32) and both BNs of a unit at its own depth
# (32 more in block 2, 64 more in block 3): 32 + 32 + 64 = 128 make up for the last BN's 128.
#
# Bottleneck units at the depth d, in the middle of a block: BN of 4d, d and d; 4d·d, 9·d·d, d·4d
# make 17d² + 12d, that is 4,544 and 17,792 and 70,400, together 92,736n. The first units have
# fewer inputs: 16 for 64 (BN 96 and convolution 768 less), 64 for 128 (128 and 2,048 less), 128
# for 256 (256 and 8,192 less), together 11,488. Last BN and projection have 512 + 2,560 + 10:
#
#   432 + 92,736n - 11,488 + 3,082                                          = 92,736n - 7,974


def count_parameters(network: ModelConfig) -> int:
    return sum(v.shape.num_elements() for v in build(network).trainable_variables)


@pytest.mark.parametrize(
    ("num_layers", "parameters", "millions"),
    [
        (20, 269_722, 0.27),
        (32, 464_154, 0.46),
        (44, 658_586, 0.66),
        (56, 853_018, 0.85),
        (110, 1_727_962, 1.7),
    ],
)
def test_networks_of_the_paper_have_the_sizes_in_the_paper(num_layers, parameters, millions):
    counted = count_parameters(ModelConfig(num_layers=num_layers))
    assert counted == parameters
    assert counted / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (ModelConfig(num_layers=8), 75_290),
        (ModelConfig(num_layers=20, resnet_version=1), 269_722),
        (ModelConfig(num_layers=20, shortcut_connections=False), 269_722),
        (ModelConfig(num_layers=11, bottleneck=True), 84_762),
        (ModelConfig(num_layers=164, bottleneck=True), 1_661_274),
        # 90 more classes: 90 more columns of 64 and 90 more biases
        (ModelConfig(num_layers=8, num_classes=100), 81_140),
    ],
    ids=lambda value: value.name if isinstance(value, ModelConfig) else str(value),
)
def test_other_networks_have_the_sizes_worked_out_by_hand(network, parameters):
    assert count_parameters(network) == parameters


def added(x: tf.Tensor, shortcut: tf.Tensor | None) -> tf.Tensor:
    """The output of a unit: the sum that it leaves to the next batch norm."""
    return x if shortcut is None else x + shortcut


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("kind", ["v2", "v1", "v2 bottleneck"])
def test_blocks_halve_the_image_and_double_the_depth(kind, data_format):
    if data_format == "channels_first":
        skip_without_channels_first()
    num_layers, widening = (20, 4) if "bottleneck" in kind else (14, 1)
    model = build(config(kind, num_layers), data_format=data_format)
    layout = {"channels_last": "NHWC", "channels_first": "NCHW"}[data_format]
    x = tf.ones([2, 32, 32, 16] if layout == "NHWC" else [2, 16, 32, 32])
    shapes = []
    for units in model.blocks:
        for unit in units:
            x = added(*unit(x, False))
            shapes.append(tuple(x.shape))
    expected = [(size, depth * widening) for size, depth in ((32, 16), (16, 32), (8, 64))]
    assert shapes == [
        (2, size, size, depth) if layout == "NHWC" else (2, depth, size, size)
        for size, depth in expected
        for _ in range(2)
    ]


@pytest.mark.parametrize(("kind", "depth"), [("v2", 64), ("v1", 64), ("v2 bottleneck", 256)])
def test_logits_are_the_projected_features(kind, depth):
    model = build(config(kind, num_classes=7))
    randomise(model)
    features = model.features(random_images(3))
    assert features.shape == (3, depth)
    logits = model(random_images(3))
    assert logits.shape == (3, 7)
    expected = features.numpy().astype(np.float64) @ model.logits_kernel + model.logits_bias
    assert_close(logits, expected, 1e-5)


# --- Its arguments --------------------------------------------------------------------------------


def depth_or_neighbours(rule: Callable[[int, bool], int], error: type, *depth: object) -> object:
    """The units that a depth has in a block; or the depths that its refusal names."""
    try:
        return rule(*depth)
    except error as refusal:
        return re.search(r"nearest are (\d+) (?:or|and) (\d+)", str(refusal)).groups()


@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_rule_of_depths_is_that_of_the_settings(bottleneck):
    for num_layers in range(-20, 300):
        depth = num_layers, bottleneck
        assert depth_or_neighbours(units_per_block, ValueError, *depth) == depth_or_neighbours(
            configs.units_per_block, UserError, *depth
        )


def test_the_defaults_and_the_images_shape_are_those_of_the_settings():
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(ResNet).parameters.items()
    }
    given = ModelConfig().arguments()
    assert given.items() <= defaults.items()
    others = {"data_format", "dtype", "seed", "normalise", "convolve"}
    assert defaults.keys() - given.keys() == others
    assert IMAGE_SHAPE == (formats.SIDE, formats.SIDE, formats.CHANNELS)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_layers": 21}, "num_layers=21 is invalid: it must be 6n + 2."),
        ({"num_layers": 32, "bottleneck": True}, "num_layers=32 is invalid: it must be 9n + 2."),
        ({"resnet_version": 3}, "resnet_version=3 is invalid: it must be one of 1, 2."),
        ({"data_format": "NHWC"}, "data_format=NHWC is invalid: it must be one of channels_first,"),
        ({"dtype": "float32"}, "dtype=float32 is invalid: it must be one of fp32, bf16, fp16."),
    ],
)
def test_an_invalid_argument_raises_a_value_error(given, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ResNet(**given)


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_raw_images_have_the_logits_of_what_is_left_without_the_mean(kind):
    rng = np.random.default_rng(0)
    model = ResNet(num_layers=8)
    randomise(model)
    model.image_mean.assign(rng.uniform(100, 150, IMAGE_SHAPE))
    images = rng.integers(0, 256, (3, *IMAGE_SHAPE)).astype(kind)
    expected = model(images.astype(np.float32) - model.image_mean.numpy())
    np.testing.assert_array_equal(model.logits_of_raw(images), expected)


# --- The seam -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v2", "v1", "v2 bottleneck", "v1 bottleneck"])
def test_every_batch_norm_is_computed_by_the_function_that_is_handed_in(kind):
    asked = []

    def normalise(norm: BatchNorm, x: tf.Tensor, training: bool, shortcut=None, relu=True):
        asked.append((norm, training, relu))
        return batch_norm_relu(norm, x, training, shortcut, relu)

    plain, model = build(config(kind)), build(config(kind), normalise=normalise)
    np.testing.assert_array_equal(
        model(random_images(2), training=True), plain(random_images(2), True)
    )
    assert {norm for norm, _, _ in asked} == set(model.norms)
    assert all(training for _, training, _ in asked)
    # In version 1, the last ReLU of a unit comes after the addition.
    last = {unit.norms[-1] for unit in model.units} if "v1" in kind else set()
    assert {norm for norm, _, relu in asked if not relu} == last


def test_a_unit_leaves_its_addition_to_the_next_batch_norm():
    added = []

    def normalise(norm: BatchNorm, x: tf.Tensor, training: bool, shortcut=None, relu=True):
        if shortcut is not None:
            added.append(norm)
        return batch_norm_relu(norm, x, training, shortcut, relu)

    model = build(config("v2", 14), normalise=normalise)
    x = model.init_conv(random_images(2), 1)
    (first, shortcut), unit = model.units[0](x, False), model.units[1]
    summed = unit(first + shortcut, False)
    for ours, theirs in zip(unit(first, False, shortcut), summed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # If the shape stays, the shortcut is the sum itself.
    np.testing.assert_array_equal(summed[1], first + shortcut)

    added.clear()
    model(random_images(2))
    assert added == [unit.norms[0] for unit in model.units[1:]] + [model.final_norm]
    added.clear()
    build(config("plain v2", 14), normalise=normalise)(random_images(2))
    assert added == []


# --- Against the independent reference ------------------------------------------------------------

NETWORKS = [
    *map(config, ("v2", "v1", "v2 bottleneck", "v1 bottleneck")),
    *map(config, ("plain v2", "plain v1", "plain v2 bottleneck")),
    # Two units in a block, so there are inner ones.
    *(config("v2", 14), config("v1", 14)),
    # so large an epsilon, and so short a memory, that taking others would show
    config("v2", batch_norm_epsilon=0.5, batch_norm_decay=0.6),
    config("v1", batch_norm_epsilon=0.5, batch_norm_decay=0.6),
]
NETWORK_IDS = [f"{network.name}-epsilon{network.batch_norm_epsilon:g}" for network in NETWORKS]


def reference_for(network: ModelConfig, values: Values, training: bool) -> NumpyResNet:
    return NumpyResNet(
        values,
        version=network.resnet_version,
        shortcuts=network.shortcut_connections,
        epsilon=network.batch_norm_epsilon,
        training=training,
    )


@pytest.mark.parametrize("network", NETWORKS, ids=NETWORK_IDS)
def test_logits_and_moving_averages_are_those_of_an_independent_reference(network):
    units = 2 if network.num_layers == 14 else 1
    model = build(network, seed=2)
    randomise(model)
    images = random_images(4)
    before = values_of(model)

    reference = reference_for(network, before, training=False)
    assert_close(model(images, training=False), reference.logits(images, units), 2e-5)
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)

    reference = reference_for(network, before, training=True)
    assert_close(model(images, training=True), reference.logits(images, units), 2e-5)
    after = values_of(model)
    norms = {name.rsplit("/", 1)[0] for name in before if name.endswith("gamma")}
    assert reference.statistics.keys() == norms
    for name, value in before.items():
        if "moving_" not in name:
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    decay = network.batch_norm_decay
    for norm, statistics in reference.statistics.items():
        for statistic, name in zip(statistics, ("moving_mean", "moving_variance"), strict=True):
            expected = decay * before[f"{norm}/{name}"] + (1 - decay) * statistic
            assert_close(after[f"{norm}/{name}"], expected, 1e-5, f"{norm}/{name}")


def test_moving_averages_take_a_hundredth_of_the_unbiased_statistics():
    # 2 images of 3x3 are 18 values per channel: 18/17 instead of 1 is far above the tolerance
    rng = np.random.default_rng(0)
    x = (1 + 2 * rng.standard_normal((2, 3, 3, 4))).astype(np.float32)
    unit = unit_of(ModelConfig(), [(3, 4, 1), (3, 4, 1)], 4, rng)
    values = x.astype(np.float64).reshape(18, 4)
    variance = ((values - values.mean(0)) ** 2).sum(0) / 17

    unit(tf.constant(x), True)
    after = values_of(unit)
    # they start at 0 and 1
    assert_close(after["unit/norm1/moving_mean"], 0.01 * values.mean(0), 1e-5)
    assert_close(after["unit/norm1/moving_variance"] - 1, 0.01 * (variance - 1), 1e-4)

    unit(tf.constant(x), True)
    again = values_of(unit)["unit/norm1/moving_mean"]
    assert_close(again, (0.99 * 0.01 + 0.01) * values.mean(0), 1e-5)


def test_a_compiled_network_computes_the_same_and_moves_its_averages_too():
    images = random_images(4)
    eager, compiled = build(config("v2")), build(config("v2"))
    step = tf.function(compiled)
    assert_close(step(images, training=True), eager(images, training=True), 1e-5)
    for name, value in values_of(eager).items():
        if "moving_" in name:
            assert_close(values_of(compiled)[name], value, 1e-5, name)
    assert_close(step(images, training=False), eager(images, training=False), 1e-5)


def test_in_inference_an_image_is_judged_without_regard_to_its_neighbours():
    model = build(config("v2"))
    randomise(model)
    images = random_images(5)
    assert_close(model(images[1:2]), model(images)[1:2], 1e-5)
    # training mode does look at them, or else this would show nothing
    alone, among = model(images[1:2], training=True), model(images, training=True)[1:2]
    assert np.abs(alone - among).max() > 0.1 * np.abs(among).max()


# --- Gradients against the reference's finite differences -----------------------------------------

BASIC, BASIC_DEEPER = [(3, 4, 1), (3, 4, 1)], [(3, 8, 2), (3, 8, 1)]
NARROW = [(1, 4, 1), (3, 4, 1), (1, 16, 1)]
NARROW_DEEPER = [(1, 8, 1), (3, 8, 2), (1, 32, 1)]

# kind, convolutions (kernel size, depth, stride), input depth, whether the network's first unit
UNITS = {
    "v2-first": ("v2", BASIC, 4, True),
    "v2-inner": ("v2", BASIC, 4, False),
    "v2-stride": ("v2", BASIC_DEEPER, 4, False),
    "v2-bottleneck-first": ("v2 bottleneck", NARROW, 4, True),  # deepens without halving
    "v2-bottleneck-inner": ("v2 bottleneck", NARROW, 16, False),
    "v2-bottleneck-stride": ("v2 bottleneck", NARROW_DEEPER, 16, False),
    "v1-first": ("v1", BASIC, 4, True),
    "v1-inner": ("v1", BASIC, 4, False),
    "v1-stride": ("v1", BASIC_DEEPER, 4, False),
    "v1-bottleneck-first": ("v1 bottleneck", NARROW, 4, True),
    "v1-bottleneck-stride": ("v1 bottleneck", NARROW_DEEPER, 16, False),
    "plain-v2-first": ("plain v2", BASIC, 4, True),
    "plain-v2-stride": ("plain v2", BASIC_DEEPER, 4, False),
    "plain-v1-stride": ("plain v1", BASIC_DEEPER, 4, False),
    "plain-v2-bottleneck-stride": ("plain v2 bottleneck", NARROW_DEEPER, 16, False),
}


def clear_of_kinks(
    draw: Callable[[int], np.ndarray], forward: Callable[[np.ndarray], NumpyResNet], margin: float
) -> np.ndarray:
    """The first input drawn for which no ReLU is so near its kink that rounding takes it across.

    A single one that does changes gradients by a per cent, rightly.
    """
    for seed in range(500):
        x = draw(seed)
        if forward(x).nearest_kink > margin:
            return x
    raise AssertionError("every input has a ReLU near its kink")


def clear_image(network: ModelConfig, values: Values) -> np.ndarray:
    # only one, since each brings 100,000 or so chances of a ReLU near its kink
    def forward(images: np.ndarray) -> NumpyResNet:
        reference = reference_for(network, values, training=True)
        reference.logits(images, 1)
        return reference

    # float32's errors have grown to 4e-6 in the last block, as a root of their mean square
    return clear_of_kinks(lambda seed: random_images(1, seed), forward, 2e-5)


def clear_unit_input(
    depth_in: int, network: ModelConfig, values: Values, stride: int, first: bool
) -> np.ndarray:
    def draw(seed: int) -> np.ndarray:
        x = 0.3 + np.random.default_rng(seed).standard_normal((3, 6, 6, depth_in))
        return x.astype(np.float32)

    def forward(x: np.ndarray) -> NumpyResNet:
        reference = reference_for(network, values, training=True)
        reference.unit(x.astype(np.float64), "unit", stride, first)
        return reference

    return clear_of_kinks(draw, forward, 2e-5)


def assert_gradient(
    gradient: np.ndarray,
    loss: Callable[[np.ndarray], float],
    at: np.ndarray,
    rng: np.random.Generator,
    what: str,
    coordinates: int = 4,
) -> None:
    """Compares with central differences: some partial derivatives, and one along all at once."""
    step = 1e-7  # which takes no ReLU across its kink, and which float64 bears
    gradient, at = gradient.astype(np.float64), at.astype(np.float64)
    assert gradient.shape == at.shape, what
    directions = [rng.standard_normal(at.shape) / np.sqrt(at.size)]
    for index in rng.choice(at.size, min(coordinates, at.size), replace=False):
        directions.append(np.zeros(at.shape))
        directions[-1].flat[index] = 1.0
    measured = [(loss(at + step * d) - loss(at - step * d)) / (2 * step) for d in directions]
    claimed = [np.sum(gradient * d) for d in directions]
    scale = np.abs(gradient).max()
    assert scale > 1e-3, what
    np.testing.assert_allclose(claimed, measured, rtol=1e-4, atol=1e-4 * scale, err_msg=what)


@pytest.mark.parametrize(("kind", "convolutions", "depth_in", "first"), UNITS.values(), ids=UNITS)
def test_gradients_of_a_unit_are_the_references_finite_differences(
    kind, convolutions, depth_in, first
):
    rng = np.random.default_rng(3)
    network = config(kind)
    unit = unit_of(network, convolutions, depth_in, rng, first)
    randomise(unit)
    before = values_of(unit)
    stride = max(stride for _, _, stride in convolutions)
    x = clear_unit_input(depth_in, network, before, stride, first)

    def forward(values: Values, x: np.ndarray) -> np.ndarray:
        reference = reference_for(network, values, training=True)
        return reference.unit(x.astype(np.float64), "unit", stride, first)

    # the unit's own output, too, or else its gradients might be right for the wrong function
    with tf.GradientTape() as tape:
        x_tensor = tf.constant(x)
        tape.watch(x_tensor)
        output = added(*unit(x_tensor, True))
        weights = rng.standard_normal(output.shape)
        total = tf.reduce_sum(output * weights.astype(np.float32))
    assert_close(output, forward(before, x), 1e-5)
    variables = unit.trainable_variables
    of_x, *of_variables = tape.gradient(total, [x_tensor, *variables])

    assert_gradient(
        of_x.numpy(), lambda moved: float(np.sum(forward(before, moved) * weights)), x, rng, "input"
    )
    for variable, gradient in zip(variables, of_variables, strict=True):
        name = name_of(variable)

        def loss(moved: np.ndarray, name: str = name) -> float:
            return float(np.sum(forward({**before, name: moved}, x) * weights))

        assert_gradient(gradient.numpy(), loss, before[name], rng, name)


@pytest.mark.parametrize("kind", ["v2", "v1"])
def test_gradients_of_a_whole_network_are_the_references_finite_differences(kind):
    rng = np.random.default_rng(4)
    network = config(kind)
    model = build(network)
    randomise(model)
    before = values_of(model)
    images = clear_image(network, before)
    weights = rng.standard_normal((1, 10))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(model(images, training=True) * weights.astype(np.float32))
    variables = model.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(total, variables), strict=True):
        name = name_of(variable)

        def loss(moved: np.ndarray, name: str = name) -> float:
            reference = reference_for(network, {**before, name: moved}, training=True)
            return float(np.sum(reference.logits(images, 1) * weights))

        assert_gradient(gradient.numpy(), loss, before[name], rng, name, coordinates=0)


# --- Layouts and precisions -----------------------------------------------------------------------


def logits_and_gradients(model: ResNet, images: np.ndarray) -> tuple[np.ndarray, Values]:
    """Logits in training mode, and the gradients of a loss that weighs them."""
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((len(images), 10)).astype(np.float32)
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        total = tf.reduce_sum(logits * weights)
    variables = model.trainable_variables
    gradients = tape.gradient(total, variables)
    named = {name_of(v): g.numpy() for v, g in zip(variables, gradients, strict=True)}
    return logits.numpy(), named


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The length of the difference as a share of the expected one's."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["v2", "v1", "v2 bottleneck", "plain v2"])
def test_both_layouts_have_the_same_variables_logits_gradients_and_moving_averages(kind):
    skip_without_channels_first()
    last, first = (
        build(config(kind), data_format=data_format, seed=6)
        for data_format in ("channels_last", "channels_first")
    )
    assert_same_variables(first, last)
    for model in (last, first):
        randomise(model)
    images = clear_image(config(kind), values_of(last))
    assert_close(first(images), last(images), 1e-5)
    logits, gradients = logits_and_gradients(first, images)
    expected_logits, expected = logits_and_gradients(last, images)
    assert_close(logits, expected_logits, 1e-5)
    averages = values_of(last)
    for name, value in values_of(first).items():
        assert_close(value, averages[name], 1e-5, name)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 2e-4, name)


@pytest.mark.parametrize(("kind", "convolutions", "depth_in", "first"), UNITS.values(), ids=UNITS)
def test_a_unit_has_the_same_output_and_gradients_in_both_layouts(
    kind, convolutions, depth_in, first
):
    skip_without_channels_first()
    network = config(kind)
    units = {
        layout: unit_of(network, convolutions, depth_in, np.random.default_rng(8), first, layout)
        for layout in ("NHWC", "NCHW")
    }
    for unit in units.values():
        randomise(unit)
    stride = max(stride for _, _, stride in convolutions)
    x = tf.constant(clear_unit_input(depth_in, network, values_of(unit), stride, first))
    rng, weights = np.random.default_rng(9), None
    results = []
    for layout, unit in units.items():
        with tf.GradientTape() as tape:
            tape.watch(x)
            if layout == "NCHW":
                output = added(*unit(tf.transpose(x, [0, 3, 1, 2]), True))
                output = tf.transpose(output, [0, 2, 3, 1])
            else:
                output = added(*unit(x, True))
            if weights is None:
                weights = rng.standard_normal(output.shape).astype(np.float32)
            total = tf.reduce_sum(output * weights)
        results.append([output, *tape.gradient(total, [x, *unit.trainable_variables])])
    names = ["output", "input", *map(name_of, unit.trainable_variables)]
    for name, last, first in zip(names, *results, strict=True):
        assert_close(first, last, 1e-4, name)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
# half the distance from 1 to the next number
@pytest.mark.parametrize(("dtype", "roundoff"), [("bf16", 2**-8), ("fp16", 2**-11)])
@pytest.mark.parametrize("kind", ["v2", "v1", "v2 bottleneck"])
def test_low_precision_costs_a_few_roundoffs_and_keeps_variables_and_outputs_in_float32(
    kind, dtype, roundoff, data_format
):
    if data_format == "channels_first":
        skip_without_channels_first(dtype)
    full = build(config(kind))
    low = build(config(kind), data_format=data_format, dtype=dtype)
    assert_same_variables(full, low)
    assert all(variable.dtype == tf.float32 for variable in low.variables)
    for model in (full, low):
        randomise(model)
    logits, gradients = logits_and_gradients(low, random_images(4))
    expected_logits, expected_gradients = logits_and_gradients(full, random_images(4))
    assert logits.dtype == np.float32
    assert low.features(random_images(1)).dtype == tf.float32
    # Some twenty roundings on the way (of activations and of kernels) are independent and add up
    # to the root of their number, less what pooling evens out. Far less than one would mean that
    # the network did not compute in this precision.
    assert 0.05 * roundoff < relative_error(logits, expected_logits) < 5 * roundoff
    # If rounding changes the side of a ReLU, it passes a wrong gradient, so these
    # differ by far more than the roundoff. They still have to point the same way.
    for name, expected in expected_gradients.items():
        assert gradients[name].dtype == np.float32
        cosine = np.sum(gradients[name] * expected)
        cosine /= np.linalg.norm(gradients[name]) * np.linalg.norm(expected)
        assert cosine > 0.8, name
        assert 0.7 < np.linalg.norm(gradients[name]) / np.linalg.norm(expected) < 1.4, name


# --- Variables ------------------------------------------------------------------------------------


def assert_same_variables(one: ResNet, other: ResNet) -> None:
    """The same names, shapes and values in the same order, and the same of them trainable."""
    assert [v.name for v in one.variables] == [v.name for v in other.variables]
    trainable = [[v.name for v in model.trainable_variables] for model in (one, other)]
    assert trainable[0] == trainable[1]
    others = values_of(other)
    for name, value in values_of(one).items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "num_layers"),
    [("v2", 8), ("v2", 20), ("v1", 8), ("v2 bottleneck", 11), ("v1 bottleneck", 11)],
)
def test_plain_and_residual_networks_have_exactly_the_same_variables(kind, num_layers):
    residual = build(config(kind, num_layers), seed=9)
    plain = build(config(f"plain {kind}", num_layers), seed=9)
    assert_same_variables(residual, plain)
    # and yet they are different networks
    assert relative_error(plain(random_images(2)), residual(random_images(2))) > 0.1


@pytest.mark.parametrize("kind", ["v2", "v1", "v2 bottleneck"])
def test_every_variable_has_a_name_of_its_own(kind):
    model = build(config(kind, 20))
    names = [v.name for v in model.variables]
    assert len(set(names)) == len(names)
    for name in ("init_conv/kernel:0", "block2/unit1/conv1/kernel:0", "logits/bias:0"):
        assert name in names


def test_a_seed_gives_the_same_weights_every_time():
    assert_same_variables(build(config("v2"), seed=3), build(config("v2"), seed=3))


def test_other_seeds_give_other_weights():
    one, other = (values_of(build(config("v2"), seed=seed)) for seed in (3, 4))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name.endswith("/kernel"):
            assert abs(np.corrcoef(value.ravel(), other[name].ravel())[0, 1]) < 0.25, name
        else:
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_no_kernel_is_drawn_twice():
    # Equal shapes would show a new generator for each kernel.
    kernels = [v.numpy().ravel() for v in build(config("v2", 20)).kernels]
    for i, one in enumerate(kernels):
        for other in kernels[:i]:
            if one.size == other.size:
                assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["v2", "v2 bottleneck"])
def test_kernels_start_from_hes_normal_distribution(kind):
    kernels = [v for v in build(config(kind, 20)).kernels if v.shape.num_elements() >= 9_000]
    assert len(kernels) >= 7
    for kernel in kernels:
        values = kernel.numpy().ravel()
        deviation = np.sqrt(2 / np.prod(kernel.shape[:-1]))
        # of n numbers, the mean strays by 1/sqrt(n) deviations, the deviation by 1/sqrt(2n)
        assert abs(values.mean()) < 4.5 * deviation / np.sqrt(values.size), kernel.name
        assert values.std() == pytest.approx(deviation, rel=4.5 / np.sqrt(2 * values.size))
        # A normal distribution has 4.6% beyond two deviations, and is not cut off there.
        assert 0.035 < np.mean(np.abs(values) > 2 * deviation) < 0.056, kernel.name
        assert np.abs(values).max() > 3 * deviation, kernel.name


@pytest.mark.parametrize("kind", ["v2", "v1"])
def test_everything_but_kernels_starts_as_zeros_or_ones(kind):
    for name, value in values_of(build(config(kind))).items():
        start = {"kernel": None, "gamma": 1.0, "moving_variance": 1.0}.get(name.split("/")[-1], 0.0)
        if start is not None:
            np.testing.assert_array_equal(value, start, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "convolutions"),
    [("v2", 1 + 3 * 2), ("v1", 1 + 3 * 2), ("v2 bottleneck", 1 + 3 * 3), ("plain v2", 1 + 3 * 2)],
)
def test_weight_decay_acts_on_convolution_and_logits_kernels_only(kind, convolutions):
    kernels = build(config(kind)).kernels
    assert len({kernel.name for kernel in kernels}) == len(kernels) == convolutions + 1
    assert sum(len(kernel.shape) == 4 for kernel in kernels) == convolutions
    assert [kernel.name for kernel in kernels if len(kernel.shape) == 2] == ["logits/kernel:0"]


def test_moving_averages_and_the_mean_image_are_not_trained():
    model = build(config("v2"))
    trained = {v.name for v in model.trainable_variables}
    untrained = {v.name for v in model.variables} - trained
    kinds = {name.rsplit("/", 1)[-1] for name in untrained}
    assert kinds == {"image_mean:0", "moving_mean:0", "moving_variance:0"}
    kinds = {name.rsplit("/", 1)[-1] for name in trained}
    assert kinds == {"kernel:0", "gamma:0", "beta:0", "bias:0"}
    assert model.image_mean.shape == (32, 32, 3)
