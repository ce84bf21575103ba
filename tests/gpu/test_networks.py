"""A GPU computes what the CPU computes in fp32: logits, gradients and predictions."""

from collections.abc import Iterator

import gpu_device
import numpy as np
import pytest
import tensorflow as tf
from conftest import skip_without_channels_first
from programs import PROJECT

from cifar10_resnet import checkpoints
from cifar10_resnet.data.synthetic import make_split
from resnet_model import ResNet

BATCH_SIZE = 32
LOSS_SCALE = 128.0  # as in the trainer, or small gradients would be zero in fp16

# The tolerances are distances between vectors, relative to the length of the CPU's vector. The
# first is for logits and averages, the second for gradients, because an input of a ReLU that rounds
# to the other side of zero changes gradients at once. The significand has 24 bits in fp32, 11 in
# TF32 and fp16, 8 in bf16.
TOLERANCES = {"fp32": (1e-4, 1e-2), "tf32": (5e-3, 0.1), "fp16": (5e-3, 0.1), "bf16": (0.03, 0.3)}
FORMATS = ("channels_last", "channels_first")


@pytest.fixture(scope="module")
def device() -> str:
    return gpu_device.find()


@pytest.fixture(autouse=True)
def tf32_as_before() -> Iterator[None]:
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


def make_network(data_format: str, dtype: str) -> ResNet:
    """Returns a ResNet-8 that is not at its start: all batch norms differ.

    With a decay of 0, a step in training leaves the averages that inference needs.
    """
    network = ResNet(num_layers=8, data_format=data_format, dtype=dtype, batch_norm_decay=0.0)
    rng = np.random.default_rng(0)
    for variable in network.variables:
        if not variable.name.endswith("/kernel:0") and variable is not network.image_mean:
            variable.assign_add(rng.uniform(0, 0.3, variable.shape).astype(np.float32))
    return network


def make_batch() -> tuple[tf.Tensor, tf.Tensor]:
    images, labels = make_split("train", BATCH_SIZE)
    images = (images - images.mean(0)).astype(np.float32)
    return tf.constant(images), tf.constant(labels.astype(np.int32))


def compute(
    where: str, data_format: str, precision: str, jit_compile: bool = False
) -> dict[str, np.ndarray]:
    """Returns a network's logits and gradients, computed on one device in one way."""
    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
    dtype = "fp32" if precision == "tf32" else precision

    def all_of_it(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, list]:
        with tf.GradientTape() as tape:
            logits = network(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = LOSS_SCALE * tf.reduce_mean(losses)
        return network(images), logits, tape.gradient(loss, network.trainable_variables)

    with tf.device(f"/{where}:0"):
        network = make_network(data_format, dtype)
        computed = tf.function(all_of_it, autograph=False, jit_compile=jit_compile)(*make_batch())
        assert where.upper() in computed[0].device
    inferred, logits, gradients = computed
    gradients = np.concatenate([g.numpy().ravel() for g in gradients])
    averages = np.concatenate([norm.moving_variance.numpy() for norm in network.norms])
    return {
        "inference": inferred.numpy(),
        "training": logits.numpy(),
        "averages": averages,
        "gradients": gradients,
    }


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, np.ndarray]:
    """Returns what the CPU computes in fp32 with channels_last."""
    return compute("cpu", "channels_last", "fp32")


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


def assert_close(
    expected: dict[str, np.ndarray], found: dict[str, np.ndarray], precision: str
) -> None:
    distances = {name: distance(value, found[name]) for name, value in expected.items()}
    print(precision, {name: f"{value:.1e}" for name, value in distances.items()})
    of_values, of_gradients = TOLERANCES[precision]
    assert distances.pop("gradients") <= of_gradients
    assert max(distances.values()) <= of_values, distances


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("data_format", FORMATS)
def test_logits_and_gradients_are_the_cpus(data_format, precision, device, on_cpu):
    if device == "cpu":
        if data_format == "channels_first":
            skip_without_channels_first(precision.replace("tf32", "fp32"))
        if precision == "tf32":
            pytest.skip("TF32 needs a GPU")
    assert_close(on_cpu, compute(device, data_format, precision), precision)


@pytest.mark.parametrize(
    ("data_format", "precision"),
    [
        ("channels_last", "fp32"),
        ("channels_first", "fp32"),
        ("channels_last", "tf32"),
        ("channels_last", "bf16"),
        ("channels_first", "bf16"),
        ("channels_last", "fp16"),
    ],
)
def test_a_compiled_network_computes_the_cpus_logits_and_gradients(
    data_format, precision, device, on_cpu
):
    if device == "cpu" and (data_format, precision) != ("channels_last", "fp32"):
        pytest.skip("XLA has this form only for GPUs")
    assert_close(on_cpu, compute(device, data_format, precision, jit_compile=True), precision)


@pytest.mark.parametrize(
    ("data_format", "dtype", "agreement"),
    [
        ("channels_last", "fp32", 0.99),
        ("channels_first", "fp32", 0.99),
        ("channels_last", "bf16", 0.95),
        ("channels_first", "fp16", 0.98),
    ],
)
def test_a_checkpoint_of_a_cpu_predicts_the_same_on_a_gpu(data_format, dtype, agreement, device):
    """The shipped ResNet-20 was trained on a CPU. On synthetic images, it is often unsure."""
    if device == "cpu" and data_format == "channels_first":
        skip_without_channels_first(dtype)
    saved = checkpoints.find(str(PROJECT / "files" / "pretrained" / "resnet20"))
    images, _ = make_split("test", 200)
    predicted = []
    for where, how in (
        ("cpu", {"data_format": "channels_last", "dtype": "fp32"}),
        (device, {"data_format": data_format, "dtype": dtype}),
    ):
        with tf.device(f"/{where}:0"):
            network = ResNet(**saved.run.model.arguments(), **how)
            checkpoints.restore_model(network, saved.prefix)
            logits = tf.function(network.logits_of_raw)(tf.constant(images))
        predicted.append(logits.numpy().argmax(1))
    assert np.mean(predicted[0] == predicted[1]) >= agreement
