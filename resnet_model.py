"""The network: a ResNet for 32x32 images, built from one kind of unit, as a `tf.Module`.

Images come in as NHWC with their mean subtracted, logits go out as float32, variables are float32.
`data_format` and `dtype` only say how the inside computes, so that one set of variables serves
NCHW and NHWC and every precision.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import tensorflow as tf

from cifar10_resnet.config import ModelConfig, units_per_block
from cifar10_resnet.errors import UserError

DTYPES = {"fp32": tf.float32, "bf16": tf.bfloat16, "fp16": tf.float16}
BLOCK_DEPTHS = (16, 32, 64)
IMAGE_SHAPE = (32, 32, 3)


def resolve_data_format(data_format: str, dtype: str, device: str) -> str:
    """Turns `auto` into a layout for the device (`cpu`, `gpu`); refuses what its kernels lack."""
    if data_format == "auto":
        return "channels_first" if device == "gpu" else "channels_last"
    if data_format == "channels_first" and device == "cpu" and not _cpu_trains(data_format, dtype):
        raise UserError(
            f"this CPU's kernels lack channels_first in {dtype} "
            "(they have it in fp32 and bf16, with oneDNN on): use --data_format=channels_last."
        )
    return data_format


def _cpu_trains(data_format: str, dtype: str) -> bool:
    """Returns whether this CPU can train in this data format and precision."""
    # Only TensorFlow knows: the answer depends on its build, the processor and the environment, and
    # one kernel may be there without the next. So take a step of the smallest network that uses
    # every kernel, on images so small that the last block still has a pixel.
    try:
        with tf.device("cpu"):
            network = ResNet(ModelConfig(num_layers=8), data_format, dtype)
            with tf.GradientTape() as tape:
                logits = network(tf.zeros([1, 4, 4, 3]), training=True)
            tape.gradient(logits, network.trainable_variables)
        return True
    except tf.errors.OpError:
        return False


class Replicas(Protocol):
    """The devices that a batch is spread over, as batch norm needs them."""

    count: int

    def sum(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Within a replica: each value's sum over all replicas."""


class Convolution(tf.Module):
    """A square convolution without bias, started from He's normal distribution."""

    def __init__(self, name: str, size: int, depth_in: int, depth: int, rng: np.random.Generator):
        super().__init__()
        self.kernel = _variable(
            f"{name}/kernel", _he_normal(rng, [size, size, depth_in, depth], size * size * depth_in)
        )

    def __call__(self, x: tf.Tensor, stride: int, layout: str) -> tf.Tensor:
        return tf.nn.conv2d(x, tf.cast(self.kernel, x.dtype), stride, "SAME", data_format=layout)


class BatchNorm(tf.Module):
    """Fused batch normalisation. Statistics and parameters stay in float32."""

    def __init__(self, name: str, depth: int, decay: float, epsilon: float):
        super().__init__()
        self.gamma = _variable(f"{name}/gamma", np.ones(depth))
        self.beta = _variable(f"{name}/beta", np.zeros(depth))
        self.moving_mean = _variable(f"{name}/moving_mean", np.zeros(depth), trainable=False)
        self.moving_variance = _variable(f"{name}/moving_variance", np.ones(depth), trainable=False)
        self._decay, self._epsilon = decay, epsilon
        # set where the statistics shall be those of a batch that is spread over replicas
        self.replicas: Replicas | None = None

    def __call__(self, x: tf.Tensor, training: bool, layout: str) -> tf.Tensor:
        if training and self.replicas:
            return self._over_replicas(x, layout)
        normalised, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=self.gamma,
            offset=self.beta,
            mean=self.moving_mean,
            variance=self.moving_variance,
            epsilon=self._epsilon,
            # the kernel itself moves the averages, by this share of the batch's statistics
            exponential_avg_factor=1 - self._decay if training else 1.0,
            data_format=layout,
            is_training=training,
        )
        if training:
            assign(self.moving_mean, mean)
            assign(self.moving_variance, variance)
        return normalised

    def _over_replicas(self, x: tf.Tensor, layout: str) -> tf.Tensor:
        axes = [layout.index(axis) for axis in "NHW"]
        count = tf.cast(tf.size(x) // x.shape[layout.index("C")] * self.replicas.count, tf.float32)
        mean, variance = tf.nn.moments(tf.cast(x, tf.float32), axes)
        # Squares about the moving mean keep the digits that squares about zero would lose.
        shift = (mean - self.moving_mean) / self.replicas.count
        square = variance / self.replicas.count + shift**2 * self.replicas.count
        shift, square = self.replicas.sum([shift, square])
        mean, variance = self.moving_mean + shift, square - shift**2
        normalised = self._normalise_with(mean, variance, count, axes, layout)(
            x, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        )
        for moving, value in (
            (self.moving_mean, mean),
            (self.moving_variance, variance * count / (count - 1)),
        ):
            assign(moving, self._decay * moving + (1 - self._decay) * value)
        return normalised

    def _normalise_with(
        self,
        mean: tf.Tensor,
        variance: tf.Tensor,
        count: tf.Tensor,
        axes: list[int],
        layout: str,
    ) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
        """Normalising x with gamma and beta, by statistics of `count` values on all replicas.

        Its gradient goes through the statistics too, and so to x on all replicas.
        """
        shape = [-1 if axis == "C" else 1 for axis in layout]
        centre, scale = (
            tf.reshape(v, shape) for v in (mean, tf.math.rsqrt(variance + self._epsilon))
        )

        @tf.custom_gradient
        def normalise(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor):
            y, *_ = tf.raw_ops.FusedBatchNormV3(
                x=x,
                scale=gamma,
                offset=beta,
                mean=mean,
                variance=variance,
                epsilon=self._epsilon,
                data_format=layout,
                is_training=False,
            )

            def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
                upstream = tf.cast(upstream, tf.float32)
                normalised = (tf.cast(x, tf.float32) - centre) * scale
                for_beta = tf.reduce_sum(upstream, axes)
                for_gamma = tf.reduce_sum(upstream * normalised, axes)
                through_mean, through_variance = (
                    tf.reshape(total / count, shape)
                    for total in self.replicas.sum([for_beta, for_gamma])
                )
                centred = upstream - through_mean - normalised * through_variance
                for_x = tf.reshape(gamma, shape) * scale * centred
                return tf.cast(for_x, x.dtype), for_gamma, for_beta

            return y, gradient

        return normalise


class Unit(tf.Module):
    """A residual unit: convolutions with a batch norm each, and the shortcut around them.

    `convolutions` lists (kernel size, depth, stride) from first to last. In a pre-activation unit
    (version 2) BN and ReLU come before each convolution, in a post-activation unit (version 1)
    after it, and the last ReLU after the addition.
    """

    def __init__(
        self,
        name: str,
        convolutions: Sequence[tuple[int, int, int]],
        depth_in: int,
        config: ModelConfig,
        rng: np.random.Generator,
        shortcut_after_activation: bool = False,
    ):
        super().__init__()
        self.label = name
        self._version = config.resnet_version
        self._residual = config.shortcut_connections
        self._shortcut_after_activation = shortcut_after_activation
        self._depth_in, self.depth = depth_in, convolutions[-1][1]
        self._strides = [stride for _, _, stride in convolutions]
        self.convs, self.norms = [], []
        for i, (size, depth, _) in enumerate(convolutions, 1):
            self.convs.append(Convolution(f"{name}/conv{i}", size, depth_in, depth, rng))
            normed = depth_in if self._version == 2 else depth
            self.norms.append(_batch_norm(f"{name}/norm{i}", normed, config))
            depth_in = depth

    def __call__(self, x: tf.Tensor, training: bool, layout: str) -> tf.Tensor:
        shortcut = x
        layers = list(zip(self.convs, self.norms, self._strides, strict=True))
        for i, (conv, norm, stride) in enumerate(layers):
            if self._version == 2:
                x = tf.nn.relu(norm(x, training, layout))
                if i == 0 and self._shortcut_after_activation:
                    shortcut = x
                x = conv(x, stride, layout)
            else:
                x = norm(conv(x, stride, layout), training, layout)
                if i + 1 < len(layers):
                    x = tf.nn.relu(x)
        if self._residual:
            x += self._shortcut(shortcut, layout)
        return x if self._version == 2 else tf.nn.relu(x)

    def _shortcut(self, x: tf.Tensor, layout: str) -> tf.Tensor:
        """The identity; where the unit halves the picture or deepens it: average pool, zeros."""
        stride = max(self._strides)
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
    """The network of the papers for CIFAR: 3x3 convolution, three blocks of n units, projection."""

    def __init__(
        self,
        config: ModelConfig | None = None,
        data_format: str = "channels_last",
        dtype: str = "fp32",
        seed: int = 0,
    ):
        super().__init__()
        self.config = config = config or ModelConfig()
        self._layout = {"channels_first": "NCHW", "channels_last": "NHWC"}[data_format]
        self._dtype = DTYPES[dtype]
        rng = np.random.default_rng(seed)

        # not used by the network itself: it travels with it, for whoever has raw images
        self.image_mean = _variable("image_mean", np.zeros(IMAGE_SHAPE), trainable=False)
        self.init_conv = Convolution("init_conv", 3, 3, BLOCK_DEPTHS[0], rng)
        if config.resnet_version == 1:
            self.init_norm = _batch_norm("init_norm", BLOCK_DEPTHS[0], config)

        self.blocks = []
        depth = BLOCK_DEPTHS[0]
        for b, block_depth in enumerate(BLOCK_DEPTHS):
            units = []
            for u in range(units_per_block(config.num_layers, config.bottleneck)):
                stride = 2 if b > 0 and u == 0 else 1
                units.append(
                    Unit(
                        f"block{b + 1}/unit{u + 1}",
                        _unit_convolutions(block_depth, stride, config.bottleneck),
                        depth,
                        config,
                        rng,
                        shortcut_after_activation=b == 0 and u == 0,
                    )
                )
                depth = units[-1].depth
            self.blocks.append(units)

        if config.resnet_version == 2:
            self.final_norm = _batch_norm("final_norm", depth, config)
        self.logits_kernel = _variable(
            "logits/kernel", _he_normal(rng, [depth, config.num_classes], depth)
        )
        self.logits_bias = _variable("logits/bias", np.zeros(config.num_classes))

    def __call__(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Mean-subtracted images [N, 32, 32, 3] to logits [N, num_classes]."""
        return self.project(self.features(images, training))

    def features(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """All below the projection: images to globally pooled features, float32 [N, depth]."""
        layout = self._layout
        x = tf.cast(images, self._dtype)
        if layout == "NCHW":
            x = tf.transpose(x, [0, 3, 1, 2])
        with tf.name_scope("init_conv"):
            x = self.init_conv(x, 1, layout)
            if self.config.resnet_version == 1:
                x = tf.nn.relu(self.init_norm(x, training, layout))
        for unit in self.units:
            with tf.name_scope(unit.label):
                x = unit(x, training, layout)
        with tf.name_scope("pool"):
            if self.config.resnet_version == 2:
                x = tf.nn.relu(self.final_norm(x, training, layout))
            return tf.reduce_mean(tf.cast(x, tf.float32), [layout.index("H"), layout.index("W")])

    def project(self, features: tf.Tensor) -> tf.Tensor:
        """Features to logits."""
        with tf.name_scope("logits"):
            return tf.matmul(features, self.logits_kernel) + self.logits_bias

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, from the first to the last."""
        return tuple(unit for units in self.blocks for unit in units)

    @property
    def final_layer(self) -> tuple[tf.Variable, ...]:
        """The variables of the projection, which alone depend on the classes."""
        return self.logits_kernel, self.logits_bias

    @property
    def norms(self) -> tuple[BatchNorm, ...]:
        """All batch norms."""
        return tuple(module for module in self.submodules if isinstance(module, BatchNorm))

    @property
    def kernels(self) -> tuple[tf.Variable, ...]:
        """The variables that weight decay acts on: convolution and logits kernels, nothing else."""
        return tuple(v for v in self.trainable_variables if v.name.endswith("/kernel:0"))


def _unit_convolutions(depth: int, stride: int, bottleneck: bool) -> list[tuple[int, int, int]]:
    if bottleneck:
        return [(1, depth, 1), (3, depth, stride), (1, 4 * depth, 1)]
    return [(3, depth, stride), (3, depth, 1)]


def _batch_norm(name: str, depth: int, config: ModelConfig) -> BatchNorm:
    return BatchNorm(name, depth, config.batch_norm_decay, config.batch_norm_epsilon)


def _he_normal(rng: np.random.Generator, shape: list[int], fan_in: int) -> np.ndarray:
    return rng.standard_normal(shape) * np.sqrt(2 / fan_in)


def _variable(name: str, value: np.ndarray, trainable: bool = True) -> tf.Variable:
    return tf.Variable(value, trainable=trainable, name=name, dtype=tf.float32)


def assign(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns, within a replica, to that replica's own copy alone; `variable.assign` refuses to."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
