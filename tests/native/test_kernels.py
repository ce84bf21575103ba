"""The native kernels compute what TensorFlow's compute, for any shape and number of threads."""

import platform

import numpy as np
import pytest
import tensorflow as tf
from programs import run_code

from cifar10_resnet.config import ModelConfig, RunConfig, TrainingConfig
from cifar10_resnet.native import build, kernels
from cifar10_resnet.training.trainer import Trainer
from resnet_model import ResNet, convolution

EPSILON, DECAY = 1e-3, 0.9


@pytest.fixture(scope="module")
def library() -> str:
    try:
        return build.library()
    except build.CannotBuild as error:
        pytest.skip(str(error))


def draw(shape: tuple[int, ...], dtype: tf.DType, count: int) -> list[tf.Tensor]:
    rng = np.random.default_rng(len(shape) + shape[-1])
    return [tf.cast(rng.normal(0.5, 2, shape), dtype) for _ in range(count)]


def parameters(channels: int) -> list[np.ndarray]:
    """gamma, beta, moving mean and moving variance; some gammas are below zero."""
    rng = np.random.default_rng(channels)
    low = (-1.5, -1, -1, 0.5)
    return [rng.uniform(first, 1.5, channels).astype(np.float32) for first in low]


def reference(terms, upstream, gamma, beta, moving_mean, moving_variance, relu):
    """All results in float64: y, sum, both moving averages, and the gradients."""
    x = sum(np.asarray(term, np.float64) for term in terms)
    axes, count = tuple(range(x.ndim - 1)), x.size / x.shape[-1]
    mean, variance = x.mean(axes), x.var(axes)
    normalised = (x - mean) / np.sqrt(variance + EPSILON)
    y = normalised * gamma + beta
    passed = (y > 0) | (not relu)
    of_y, of_sum = (np.asarray(each, np.float64) for each in upstream)
    gradient = of_y * passed
    for_gamma, for_beta = (gradient * normalised).sum(axes), gradient.sum(axes)
    for_x = (
        gamma
        / np.sqrt(variance + EPSILON)
        * (gradient - for_beta / count - normalised * for_gamma / count)
    )
    return {
        "y": y * passed,
        "sum": x,
        "moving_mean": DECAY * moving_mean + (1 - DECAY) * mean,
        "moving_variance": DECAY * moving_variance + (1 - DECAY) * variance * count / (count - 1),
        "for_x": for_x + (of_sum if len(terms) == 2 else 0),
        "for_gamma": for_gamma,
        "for_beta": for_beta,
    }, np.abs(y) > 0.02  # where rounding cannot change what the ReLU does


def computed(library, terms, upstream, gamma, beta, moving_mean, moving_variance, relu):
    kernels = tf.load_op_library(library)
    x, *added = terms
    x, _, mean, scale, new_mean, new_variance = kernels.add_batch_norm(
        x, added, moving_mean, moving_variance, gamma, beta,
        decay=DECAY, epsilon=EPSILON, relu=relu, training=True,
    )  # fmt: skip
    norm = mean, scale, gamma, beta
    y = kernels.normalise_relu(x, *norm, relu=relu)
    for_x, for_gamma, for_beta = kernels.add_batch_norm_relu_grad(
        upstream[0], upstream[1 : 1 + len(added)], x, *norm, relu=relu
    )
    names = ("y", "sum", "moving_mean", "moving_variance", "for_x", "for_gamma", "for_beta")
    values = (y, x, new_mean, new_variance, for_x, for_gamma, for_beta)
    return {n: np.asarray(v, np.float64) for n, v in zip(names, values, strict=True)}


# whole vectors and lines, none of either, rests of both, and more than one piece
SHAPES = [(4, 8, 8, 16), (2, 4, 4, 64), (3, 5, 7, 32), (2, 3, 3, 10), (5, 1, 1, 3), (2, 9, 9, 48),
          (2, 2, 2, 256), (3, 3, 3, 100), (37, 23, 41, 16)]  # fmt: skip


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_the_reference_s(library, shape, dtype, terms, relu):
    x, upstream = draw(shape, dtype, terms), draw(shape, dtype, 2)
    if terms == 2:
        # The sum is rounded before it is normalised, as TensorFlow's addition does.
        expected, clear = reference([x[0] + x[1], 0], upstream, *parameters(shape[-1]), relu)
    else:
        expected, clear = reference(x, upstream, *parameters(shape[-1]), relu)
    found = computed(library, x, upstream, *parameters(shape[-1]), relu)
    rounding = 2e-5 if dtype == tf.float32 else 1e-2
    for name, value in expected.items():
        scale = np.abs(value).max() + 1
        if name == "for_x":
            found[name], value = found[name][clear], value[clear]
        loose = 20 if name in ("for_gamma", "for_beta", "for_x") and relu else 1
        if dtype == tf.float32 or name in ("y", "sum", "moving_mean", "moving_variance", "for_x"):
            np.testing.assert_allclose(found[name], value, atol=loose * rounding * scale)


def test_a_mean_far_from_zero_loses_no_digits(library):
    (x,) = draw((8, 16, 16, 16), tf.float32, 1)
    args = parameters(16)
    near = computed(library, [x], [x, x], *args, True)
    far = computed(library, [x + 4096], [x, x], *args, True)
    np.testing.assert_allclose(far["y"], near["y"], atol=2e-3)


def test_bfloat16_is_rounded_as_tensorflow_rounds_and_nan_stays_nan(library):
    rng = np.random.default_rng(0)
    one, other = (tf.cast(rng.normal(size=(4, 8, 8, 16)), tf.bfloat16) for _ in range(2))
    one = tf.where(tf.range(16) == 3, tf.constant(np.nan, tf.bfloat16), one)
    found = computed(library, [one, other], [one, one], *parameters(16), False)
    np.testing.assert_array_equal(found["sum"], np.asarray(one + other, np.float64))
    assert np.isnan(found["y"][..., 3]).all()
    assert np.isfinite(found["y"][..., 4]).all()


def test_wrong_shapes_are_refused(library):
    kernels = tf.load_op_library(library)
    x, (gamma, *rest) = tf.zeros([2, 4, 4, 16]), parameters(16)
    attributes = {"decay": 0.9, "epsilon": 1e-3, "relu": True, "training": True}
    with pytest.raises(tf.errors.InvalidArgumentError, match="differ in shape"):
        kernels.add_batch_norm(x, [x[:1]], gamma, *rest, **attributes)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a value for each channel"):
        kernels.add_batch_norm(x, [], gamma[:8], *rest, **attributes)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a value for each channel"):
        kernels.normalise_relu(x, gamma[:8], *rest, relu=True)
    kernel, x = tf.zeros([3, 3, 16, 16]), tf.zeros([1, 8, 8, 16])
    with pytest.raises(tf.errors.InvalidArgumentError, match="does not fit the images"):
        kernels.convolution3x3_float32(tf.zeros([1, 8, 8, 32]), kernel, [], relu=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a value for each channel"):
        kernels.convolution3x3_float32(x, kernel, [gamma, gamma, gamma[:8], gamma], relu=True)
    for others in ((kernel[:2], x), (kernel, x[:, :7])):
        with pytest.raises(tf.errors.InvalidArgumentError, match="does not fit the images"):
            kernels.convolution3x3_float32_grad(x, *others, [], relu=True)
    for shape in ([1, 7, 8, 16], [1, 4, 8, 16], [1, 8, 8, 48]):
        kernel, x = tf.zeros([3, 3, shape[-1], shape[-1]]), tf.zeros(shape)
        with pytest.raises(tf.errors.InvalidArgumentError, match="no kernel for this shape"):
            kernels.convolution3x3_float32_grad(x, kernel, x, [], relu=True)


THREADS = """
import hashlib, sys
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
from cifar10_resnet.config import ModelConfig, RunConfig
from cifar10_resnet.native import build
from cifar10_resnet.training.trainer import Trainer
kernels = tf.load_op_library(build.library())
x, other = (tf.random.stateless_normal([50, 33, 31, 16], [1, i]) for i in range(2))
ones = tf.ones(16)
total, _, *norm, mean, variance = kernels.add_batch_norm(x, [other], ones, ones, ones, ones,
    decay=0.9, epsilon=1e-3, relu=True, training=True)
norm += [ones, ones]
gradients = kernels.add_batch_norm_relu_grad(other, [x], total, *norm, relu=True)
x, other = x[:, :32, :16], other[:, :32, :16]
results = [total, *norm, mean, variance, *gradients]
results.append(kernels.normalise_relu(total, *norm, relu=True))
for dtype in (tf.float32, tf.bfloat16):
    if gradient := getattr(kernels, f"convolution3x3_{dtype.name}_grad", None):
        upstream = tf.cast(other, dtype)
        results += gradient(tf.cast(x, dtype), tf.ones([3, 3, 16, 16]), upstream, norm, relu=True)
values = b"".join(value.numpy().tobytes() for value in results)
print(hashlib.sha256(values).hexdigest())
"""


def test_results_are_the_same_bits_for_any_number_of_threads(library):
    assert len({run_code(THREADS, threads).stdout for threads in (1, 2, 5)}) == 1


# --- Convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(
    "shape",
    [(9, 32, 32, 16), (17, 16, 16, 32), (3, 8, 8, 64), (2, 4, 16, 32), (1, 5, 16, 48),
     (2, 12, 8, 96)],
    ids=str,
)  # fmt: skip
def test_convolutions_and_their_gradients_are_tensorflow_s(library, shape, dtype):
    if not hasattr(kernels._load(library), f"convolution3x3_{dtype.name}"):
        pytest.skip("the kernels in bfloat16 are not for this processor")
    convolve, depth = kernels.convolve_with(library), shape[-1]
    rng = np.random.default_rng(depth)
    # Small whole numbers are exact in both precisions, and so are their quarters and the sums of
    # their products in float32.
    x, upstream = (
        tf.constant(rng.integers(-4, 5, shape), dtype, name=name) for name in ("x", "dy")
    )
    kernel = tf.Variable(rng.integers(-3, 4, (3, 3, depth, depth)), dtype=tf.float32)
    results = []
    for way in (convolve, lambda *of: convolution(tf.cast(of[0], tf.float32), *of[1:])):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = way(x, kernel, 1, "NHWC")
        of = tf.cast(upstream, y.dtype)
        results.append([y, *tape.gradient(y, [x, kernel], of)])
    for name, ours, theirs in zip(("y", "x", "kernel"), *results, strict=True):
        expected = tf.cast(tf.cast(theirs, ours.dtype), tf.float32)
        np.testing.assert_array_equal(tf.cast(ours, tf.float32), expected, err_msg=name)


SLOWER = """
import pytest, sys
from cifar10_resnet.native import build
build.FLAGS += tuple(sys.argv[2:])
options = ["-q", "-p", "no:cacheprovider", "-k", "gradients_are_tensorflow_s"]
sys.exit(pytest.main([*options, sys.argv[1]]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are for x86")
@pytest.mark.parametrize(
    "options", ["-mno-amx-bf16", "-march=x86-64-v3", "-march=x86-64"], ids=["no AMX", "AVX2", "SSE"]
)
def test_convolutions_for_slower_processors_are_tensorflow_s(library, options):
    run_code(SLOWER, __file__, options)


def operations_of(convolve, shape, kernel_shape, stride=1, dtype=tf.float32) -> set[str]:
    """Returns the types of the operations that a convolution consists of."""
    traced = tf.function(lambda x, kernel: convolve(x, kernel, stride, "NHWC"), autograph=False)
    of = tf.TensorSpec(shape, dtype), tf.TensorSpec(kernel_shape)
    return {op.type for op in traced.get_concrete_function(*of).graph.get_operations()}


@pytest.mark.parametrize(
    ("side", "depth"), [(32, 16), (16, 32), (8, 64)], ids=["block1", "block2", "block3"]
)
def test_the_networks_convolutions_in_fp32_have_kernels_whatever_the_precision(
    library, side, depth, monkeypatch
):
    shapes = (None, side, side, depth), (3, 3, depth, depth)
    assert "Convolution3x3Float32" in operations_of(kernels.convolve_with(library), *shapes)
    monkeypatch.setattr("cifar10_resnet.device._cpu_has_bf16", lambda: False)
    convolve = kernels.ways(library, "bf16")["convolve"]
    assert "Convolution3x3Float32" in operations_of(convolve, *shapes, dtype=tf.bfloat16)


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16], ids=lambda dtype: dtype.name)
def test_other_convolutions_are_left_to_tensorflow(library, dtype):
    convolve = kernels.convolve_with(library)
    for size, stride, depth_in, depth, side in (
        (3, 2, 16, 16, 32), (3, 1, 16, 32, 32), (1, 1, 16, 16, 32), (3, 1, 10, 10, 32),
        (3, 1, 16, 16, 12), (3, 1, 3, 16, 32), (3, 1, 16, 16, 7),
    ):  # fmt: skip
        shapes = (2, side, side, depth_in), (size, size, depth_in, depth)
        assert "Conv2D" in operations_of(convolve, *shapes, stride, dtype)


def test_convolutions_in_fp32_are_those_of_float64_within_rounding(library):
    convolve, rng = kernels.convolve_with(library), np.random.default_rng(0)
    exact = [tf.constant(rng.normal(size=size)) for size in ([8, 16, 16, 32], [3, 3, 32, 32])]
    upstream = tf.constant(rng.normal(size=[8, 16, 16, 32]))
    results = []
    for way, dtype in ((convolve, tf.float32), (convolution, tf.float64)):
        inputs = [tf.cast(value, dtype) for value in exact]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = way(*inputs, 1, "NHWC")
        results.append([y, *tape.gradient(y, inputs, tf.cast(upstream, dtype))])
    for ours, theirs in zip(*results, strict=True):
        assert np.linalg.norm(ours - theirs.numpy()) < 1e-6 * np.linalg.norm(theirs)


# --- The network ----------------------------------------------------------------------------------

NETWORKS = {
    "v2": {"num_layers": 14},
    "v1": {"num_layers": 14, "resnet_version": 1},
    "plain": {"num_layers": 14, "shortcut_connections": False},
    "bottleneck": {"num_layers": 20, "bottleneck": True},
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_a_network_has_the_same_logits_gradients_and_averages(library, kind, training):
    images = tf.random.stateless_normal([8, 32, 32, 3], [0, 0], stddev=60)
    ours, theirs = (ResNet(**NETWORKS[kind], **way) for way in (kernels.ways(library), {}))
    results = []
    for model in (ours, theirs):
        with tf.GradientTape() as tape:
            logits = model(images, training=training)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits([1] * 8, logits))
        gradients = tape.gradient(loss, model.trainable_variables) if training else []
        results.append([logits, *gradients, *model.non_trainable_variables])
    for one, other in zip(*results, strict=True):
        # Rounding may change which numbers a ReLU keeps. That moves single elements further.
        distance = np.linalg.norm(np.subtract(one, other))
        assert distance <= 1e-2 * np.linalg.norm(other) + 1e-3
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_convolutions_that_normalise_what_they_read_give_the_bits_of_two_operations(
    library, kind, dtype
):
    model = ResNet(**NETWORKS[kind], dtype=dtype, **kernels.ways(library, dtype))
    images = tf.random.stateless_normal([8, 32, 32, 3], [0, 0], stddev=60)

    def results():
        with tf.GradientTape() as tape:
            features = model.features(images, training=True)
        trained = [v for v in model.trainable_variables if "logits" not in v.name]
        return [features, *tape.gradient(features, trained)]

    in_graph = tf.function(results, autograph=False)
    graph = in_graph.get_concrete_function().graph
    norms = [op.get_attr("N") for op in graph.get_operations() if op.type.startswith("Convolution")]
    assert norms.count(4) >= 6
    # Eagerly, TensorFlow computes each operation separately.
    for one, other in zip(in_graph(), results(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_fixed_statistics_have_no_native_gradient(library):
    model = ResNet(num_layers=8, **kernels.ways(library))
    with tf.GradientTape() as tape:
        logits = model(tf.ones([1, 32, 32, 3]), training=False)
    with pytest.raises(LookupError, match="fixed statistics"):
        tape.gradient(logits, model.trainable_variables)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_losses_of_many_steps_are_those_of_tensorflow_s_kernels(library, dtype):
    # A gentle rate: where rounding changes what a ReLU does, gradients differ by a percent.
    run = RunConfig(ModelConfig(num_layers=8), training=TrainingConfig(init_lr=1e-3, batch_size=16))
    trainers = [Trainer(run, dtype=dtype, native_library=way) for way in (library, None)]
    rng = np.random.default_rng(0)
    images = rng.normal(0, 60, (10, 16, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, 10, (10, 16)).astype(np.int32)
    for step in range(500):
        for trainer in trainers:
            trainer.train_step(images[step % 10], labels[step % 10])
        if step % 50 == 49:
            ours, theirs = (trainer.means(reset=True)[0] for trainer in trainers)
            assert abs(ours - theirs) < (1e-3 if dtype == "fp32" else 1e-2) * theirs
