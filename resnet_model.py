"""The network: a ResNet for 32x32 images, built from one kind of unit, as a `tf.Module`.

This file needs TensorFlow and NumPy only, and works in any project. Images come in as NHWC. Logits
go out as float32, and variables are float32. `data_format` and `dtype` only choose how the network
computes inside, so one set of variables serves NCHW and NHWC and every precision.

The attributes that hold variables name the keys of a checkpoint. Do not rename them.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np
import tensorflow as tf

LAYOUTS = {"channels_first": "NCHW", "channels_last": "NHWC"}
DTYPES = {"fp32": tf.float32, "bf16": tf.bfloat16, "fp16": tf.float16}
BLOCK_DEPTHS = (16, 32, 64)
IMAGE_SHAPE = (32, 32, 3)


def units_per_block(num_layers: int, bottleneck: bool = False) -> int:
    """Returns n for a network of 6n + 2 layers (9n + 2 with bottleneck units)."""
    per_unit = 9 if bottleneck else 6
    n, rest = divmod(num_layers - 2, per_unit)
    if n >= 1 and rest == 0:
        return n
    below = max(n, 1) * per_unit + 2
    raise ValueError(
        f"num_layers={num_layers} is invalid: it must be {per_unit}n + 2. "
        f"The nearest are {below} and {below + per_unit}."
    )


class Convolution(tf.Module):
    """A square convolution without bias, started from He's normal distribution."""

    def __init__(
        self,
        name: str,
        size: int,
        depth_in: int,
        depth: int,
        settings: "Settings",
        rng: np.random.Generator,
    ):
        super().__init__()
        self.kernel = _variable(
            f"{name}/kernel", _he_normal(rng, [size, size, depth_in, depth], size * size * depth_in)
        )
        self.layout = settings.layout
        self._convolve = settings.convolve

    def __call__(self, x: tf.Tensor, stride: int) -> tf.Tensor:
        return self._convolve(x, self.kernel, stride, self.layout)


def convolution(x: tf.Tensor, kernel: tf.Variable, stride: int, layout: str) -> tf.Tensor:
    """Returns the convolution of x with a kernel. `ResNet(convolve=…)` takes any like this."""
    return tf.nn.conv2d(x, tf.cast(kernel, x.dtype), stride, "SAME", data_format=layout)


class BatchNorm(tf.Module):
    """A batch norm with its parameters and moving averages in float32."""

    def __init__(self, name: str, depth: int, settings: "Settings"):
        super().__init__()
        self.gamma = _variable(f"{name}/gamma", np.ones(depth))
        self.beta = _variable(f"{name}/beta", np.zeros(depth))
        self.moving_mean = _variable(f"{name}/moving_mean", np.zeros(depth), trainable=False)
        self.moving_variance = _variable(f"{name}/moving_variance", np.ones(depth), trainable=False)
        self.decay, self.epsilon = settings.batch_norm_decay, settings.batch_norm_epsilon
        self.layout = settings.layout
        self._normalise = settings.normalise

    def __call__(
        self,
        x: tf.Tensor,
        training: bool,
        shortcut: tf.Tensor | None = None,
        relu: bool = True,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        return self._normalise(self, x, training, shortcut, relu)


def batch_norm_relu(
    norm: BatchNorm,
    x: tf.Tensor,
    training: bool,
    shortcut: tf.Tensor | None = None,
    relu: bool = True,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the sum of x and the shortcut: normalised, after a ReLU if `relu`; and as it is.

    In training it uses the statistics of the batch, and updates the averages. `ResNet(normalise=…)`
    takes any function like this one. A kernel can compute all of it in its own passes.
    """
    if shortcut is not None:
        x += shortcut
    normalised, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=norm.gamma,
        offset=norm.beta,
        mean=norm.moving_mean,
        variance=norm.moving_variance,
        epsilon=norm.epsilon,
        # The kernel itself updates the averages by this share of the batch's statistics.
        exponential_avg_factor=1 - norm.decay if training else 1.0,
        data_format=norm.layout,
        is_training=training,
    )
    if training:
        assign(norm.moving_mean, mean)
        assign(norm.moving_variance, variance)
    return tf.nn.relu(normalised) if relu else normalised, x


# A network computes its convolutions by `convolution` and its batch norms by `batch_norm_relu`, or
# by other functions like these.
Convolve = Callable[[tf.Tensor, tf.Variable, int, str], tf.Tensor]
Normalise = Callable[
    [BatchNorm, tf.Tensor, bool, tf.Tensor | None, bool], tuple[tf.Tensor, tf.Tensor]
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all units of a network share. `ResNet` explains each of them."""

    resnet_version: int
    shortcut_connections: bool
    batch_norm_decay: float
    batch_norm_epsilon: float
    layout: str
    normalise: Normalise
    convolve: Convolve


class Unit(tf.Module):
    """A residual unit: convolutions with a batch norm each, and the shortcut around them.

    `convolutions` lists (kernel size, depth, stride) from first to last. In a pre-activation unit
    (version 2), BN and ReLU come before each convolution. In a post-activation unit (version 1),
    they come after it, and the last ReLU comes after the addition.
    """

    def __init__(
        self,
        name: str,
        convolutions: Sequence[tuple[int, int, int]],
        depth_in: int,
        settings: Settings,
        rng: np.random.Generator,
        shortcut_after_activation: bool = False,
    ):
        super().__init__()
        self.label = name
        self._settings = settings
        self._shortcut_after_activation = shortcut_after_activation
        self._depth_in, self.depth = depth_in, convolutions[-1][1]
        self._strides = [stride for _, _, stride in convolutions]
        self.convs, self.norms = [], []
        for i, (size, depth, _) in enumerate(convolutions, 1):
            self.convs.append(Convolution(f"{name}/conv{i}", size, depth_in, depth, settings, rng))
            normed = depth_in if settings.resnet_version == 2 else depth
            self.norms.append(BatchNorm(f"{name}/norm{i}", normed, settings))
            depth_in = depth

    def __call__(
        self, x: tf.Tensor, training: bool, shortcut: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Takes and returns the two terms of a sum: the last convolution's output, the shortcut.

        The addition is left to the batch norm that comes next. A plain network has no shortcuts.
        """
        layers = zip(self.convs, self.norms, self._strides, strict=True)
        if self._settings.resnet_version == 1:
            source = x
            for conv, norm, stride in layers:
                x, _ = norm(conv(x, stride), training, relu=norm is not self.norms[-1])
            shortcut = self._shortcut(source)
            return tf.nn.relu(x if shortcut is None else x + shortcut), None
        (conv, norm, stride), *others = layers
        activation, total = norm(x, training, shortcut)
        source = activation if self._shortcut_after_activation else total
        x = conv(activation, stride)
        for conv, norm, stride in others:
            activation, _ = norm(x, training)
            x = conv(activation, stride)
        return x, self._shortcut(source)

    def _shortcut(self, x: tf.Tensor) -> tf.Tensor | None:
        """Returns x, averaged and with channels of zeros if the unit changes its shape."""
        if not self._settings.shortcut_connections:
            return None
        layout, stride = self._settings.layout, max(self._strides)
        if stride > 1:
            x = tf.nn.avg_pool2d(x, stride, stride, "VALID", data_format=layout)
        before = (self.depth - self._depth_in) // 2
        after = self.depth - self._depth_in - before
        if before or after:
            padding = [[0, 0]] * 4
            padding[layout.index("C")] = [before, after]
            x = tf.pad(x, padding)
        return x


class ResNet(tf.Module):
    """The network of the papers for CIFAR: 3x3 convolution, three blocks of n units, final layer.

    Arguments:
        num_layers: the depth: 6n + 2 layers, or 9n + 2 with bottleneck units.
        num_classes: the number of logits.
        shortcut_connections: False builds a plain network, with the same variables.
        bottleneck: units of three convolutions (1x1, 3x3, 1x1) instead of two.
        resnet_version: 2 puts BN and ReLU before each convolution, 1 puts them after it.
        batch_norm_decay: the share of a moving average that a step keeps.
        batch_norm_epsilon: the number that a batch norm adds to the variance.
        data_format: "channels_last" or "channels_first", inside the network.
        dtype: the precision inside the network: "fp32", "bf16" or "fp16".
        seed: the seed of the initial weights.
        normalise: computes each batch norm with its ReLU, as `batch_norm_relu` does.
        convolve: computes each convolution, as `convolution` does.
    """

    def __init__(
        self,
        num_layers: int = 20,
        num_classes: int = 10,
        shortcut_connections: bool = True,
        bottleneck: bool = False,
        resnet_version: int = 2,
        batch_norm_decay: float = 0.99,
        batch_norm_epsilon: float = 1e-3,
        data_format: str = "channels_last",
        dtype: str = "fp32",
        seed: int = 0,
        normalise: Normalise = batch_norm_relu,
        convolve: Convolve = convolution,
    ):
        super().__init__()
        num_units = units_per_block(num_layers, bottleneck)
        _refuse_others("resnet_version", resnet_version, (1, 2))
        _refuse_others("data_format", data_format, LAYOUTS)
        _refuse_others("dtype", dtype, DTYPES)
        self.num_layers, self.num_classes = num_layers, num_classes
        self._version, self._dtype = resnet_version, DTYPES[dtype]
        self._layout = LAYOUTS[data_format]
        settings = Settings(
            resnet_version,
            shortcut_connections,
            batch_norm_decay,
            batch_norm_epsilon,
            self._layout,
            normalise,
            convolve,
        )
        rng = np.random.default_rng(seed)

        # Only `logits_of_raw` subtracts the mean. Checkpoints contain it with the weights.
        self.image_mean = _variable("image_mean", np.zeros(IMAGE_SHAPE), trainable=False)
        self.init_conv = Convolution("init_conv", 3, 3, BLOCK_DEPTHS[0], settings, rng)
        if resnet_version == 1:
            self.init_norm = BatchNorm("init_norm", BLOCK_DEPTHS[0], settings)

        self.blocks = []
        depth = BLOCK_DEPTHS[0]
        for b, block_depth in enumerate(BLOCK_DEPTHS):
            units = []
            for u in range(num_units):
                name, is_first = f"block{b + 1}/unit{u + 1}", b == u == 0
                stride = 2 if b > 0 and u == 0 else 1
                convolutions = _unit_convolutions(block_depth, stride, bottleneck)
                units.append(Unit(name, convolutions, depth, settings, rng, is_first))
                depth = units[-1].depth
            self.blocks.append(units)

        if resnet_version == 2:
            self.final_norm = BatchNorm("final_norm", depth, settings)
        logits_kernel = _he_normal(rng, [depth, num_classes], depth)
        self.logits_kernel = _variable("logits/kernel", logits_kernel)
        self.logits_bias = _variable("logits/bias", np.zeros(num_classes))

    def __call__(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the logits [N, num_classes] of mean-subtracted images [N, 32, 32, 3]."""
        return self.project(self.features(images, training))

    def logits_of_raw(self, images: tf.Tensor) -> tf.Tensor:
        """Returns the logits of images as they come, uint8 or float, from 0 to 255."""
        return self(tf.cast(images, tf.float32) - self.image_mean)

    def features(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the input of the final layer: globally pooled features, float32 [N, depth]."""
        x = tf.cast(images, self._dtype)
        if self._layout == "NCHW":
            x = tf.transpose(x, [0, 3, 1, 2])
        with tf.name_scope("init_conv"):
            x = self.init_conv(x, 1)
            if self._version == 1:
                x, _ = self.init_norm(x, training)
        shortcut = None
        for unit in self.units:
            with tf.name_scope(unit.label):
                x, shortcut = unit(x, training, shortcut)
        with tf.name_scope("pool"):
            if self._version == 2:
                x, _ = self.final_norm(x, training, shortcut)
            height_and_width = [self._layout.index("H"), self._layout.index("W")]
            return tf.reduce_mean(tf.cast(x, tf.float32), height_and_width)

    def project(self, features: tf.Tensor) -> tf.Tensor:
        """Returns the logits of features: the final layer."""
        with tf.name_scope("logits"):
            return tf.matmul(features, self.logits_kernel) + self.logits_bias

    @property
    def units(self) -> tuple[Unit, ...]:
        """Returns all units, from the first to the last."""
        return tuple(unit for units in self.blocks for unit in units)

    @property
    def final_layer(self) -> tuple[tf.Variable, ...]:
        """Returns the variables of the final layer, the only ones that depend on the classes."""
        return self.logits_kernel, self.logits_bias

    @property
    def norms(self) -> tuple[BatchNorm, ...]:
        """Returns all batch norms."""
        return tuple(module for module in self.submodules if isinstance(module, BatchNorm))

    @property
    def statistics(self) -> tuple[tf.Variable, ...]:
        """Returns the moving averages of all batch norms."""
        return tuple(s for norm in self.norms for s in (norm.moving_mean, norm.moving_variance))

    @property
    def kernels(self) -> tuple[tf.Variable, ...]:
        """Returns the variables that weight decay acts on: convolution and logits kernels only."""
        return tuple(v for v in self.trainable_variables if v.name.endswith("/kernel:0"))


def _unit_convolutions(depth: int, stride: int, bottleneck: bool) -> list[tuple[int, int, int]]:
    if bottleneck:
        return [(1, depth, 1), (3, depth, stride), (1, 4 * depth, 1)]
    return [(3, depth, stride), (3, depth, 1)]


def _refuse_others(name: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        choices = ", ".join(map(str, known))
        raise ValueError(f"{name}={value} is invalid: it must be one of {choices}.")


def _he_normal(rng: np.random.Generator, shape: list[int], fan_in: int) -> np.ndarray:
    return rng.standard_normal(shape) * np.sqrt(2 / fan_in)


def _variable(name: str, value: np.ndarray, trainable: bool = True) -> tf.Variable:
    return tf.Variable(value, trainable=trainable, name=name, dtype=tf.float32)


def assign(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns only to this replica's own copy, which `variable.assign` refuses in a replica."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
