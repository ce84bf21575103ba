"""Computes batch norms and convolutions with the native kernels."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType

import tensorflow as tf

from cifar10_resnet import device
from cifar10_resnet.errors import UserError
from cifar10_resnet.native import build
from cifar10_resnet.options import Options
from resnet_model import BatchNorm, Convolve, Normalise, assign, convolution


def library(options: Options, num_replicas: int = 1) -> str | None:
    """Returns the file of the kernels that a start can use, or None."""
    if options.native == "off":
        return None
    obstacles = {
        "they are for CPUs": tf.config.get_visible_devices("GPU"),
        "they need --data_format=channels_last": options.data_format == "channels_first",
        "they lack fp16": options.dtype == "fp16",
        "XLA compiles its own (--jit_compile)": options.jit_compile,
        "they lack --sync_batch_norm": options.sync_batch_norm and num_replicas > 1,
    }
    why = next((why for why, is_there in obstacles.items() if is_there), None)
    try:
        if why is None:
            file = build.library()
            _load(file)
            return file
    except build.CannotBuild as error:
        why = str(error)
        if error.is_new and options.native == "auto":
            print(f"Training without native kernels: {why}.", file=sys.stderr, flush=True)
    except (tf.errors.NotFoundError, OSError) as error:
        why = f"TensorFlow cannot load them ({error!s:.200})"
    if options.native == "on":
        raise UserError(f"is not possible: {why}. Use --native=auto.", "native", "on")
    return None


def ways(library: str, dtype: str = "fp32") -> dict[str, Callable]:
    """Returns the arguments of a ResNet that computes with these kernels."""
    return {
        "normalise": normalise_with(library),
        "convolve": device.convolve_in(dtype, convolve_with(library)),
    }


def normalise_with(library: str) -> Normalise:
    """Returns the `normalise` for a ResNet that computes its batch norms with these kernels."""
    kernels = _load(library)

    def normalise(
        norm: BatchNorm,
        x: tf.Tensor,
        training: bool,
        shortcut: tf.Tensor | None = None,
        relu: bool = True,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        to_normalise, total, mean, scale, moving_mean, moving_variance = kernels.add_batch_norm(
            x=x,
            added=[] if shortcut is None else [shortcut],
            moving_mean=norm.moving_mean,
            moving_variance=norm.moving_variance,
            gamma=norm.gamma,
            beta=norm.beta,
            decay=norm.decay,
            epsilon=norm.epsilon,
            relu=relu,
            training=training,
        )
        if training:
            assign(norm.moving_mean, moving_mean)
            assign(norm.moving_variance, moving_variance)
        # A graph does not need this where a native convolution normalises what it reads.
        y = kernels.normalise_relu(to_normalise, mean, scale, norm.gamma, norm.beta, relu=relu)
        return y, total[0] if total else x

    return normalise


def convolve_with(library: str) -> Convolve:
    """Returns the `convolve` for a ResNet that computes convolutions with these kernels.

    They are for most of the network's convolutions: 3x3, with a stride of 1 and as many channels
    out as in. In bf16, they are only for some processors. TensorFlow computes the others.
    """
    kernels = _load(library)

    def convolve(x: tf.Tensor, kernel: tf.Tensor, stride: int, layout: str) -> tf.Tensor:
        size, _, depth_in, depth = kernel.shape
        # The library has only the operations that this processor has instructions for.
        native = getattr(kernels, f"convolution3x3_{x.dtype.name}", None)
        if native and (size, stride, depth_in) == (3, 1, depth):
            _, height, width, _ = x.shape
            if x.dtype == tf.bfloat16:
                fits = depth % 16 == width % 16 == 0 or depth % 32 == width % 8 == 0
            else:
                fits = depth in (16, 32, 64) and height % 2 == width % 2 == height * width % 64 == 0
            if fits:
                norm, relu = [], False
                if tf.is_symbolic_tensor(x) and x.op.type == "NormaliseRelu":
                    relu = x.op.get_attr("relu")
                    x, *norm = x.op.inputs
                return native(x=x, kernel=kernel, norm=norm, relu=relu)
        return convolution(x, kernel, stride, layout)

    return convolve


@functools.cache
def _load(library: str) -> ModuleType:
    kernels = tf.load_op_library(library)
    tf.RegisterGradient("AddBatchNorm")(functools.partial(_gradient_of_batch_norm, kernels))
    # The gradient of AddBatchNorm includes the ReLU.
    tf.RegisterGradient("NormaliseRelu")(lambda _, upstream: [upstream, None, None, None, None])
    for dtype in ("float32", "bfloat16"):
        if gradient := getattr(kernels, f"convolution3x3_{dtype}_grad", None):
            tf.RegisterGradient(f"Convolution3x3{dtype.title()}")(
                functools.partial(_gradient_of_convolution, gradient)
            )
    return kernels


def _gradient_of_batch_norm(
    kernels: ModuleType, operation: tf.Operation, upstream: tf.Tensor, *others: tf.Tensor
) -> list[tf.Tensor | None]:
    """Returns the gradients for the inputs. The unit's second gradient arrives at the sum."""
    if not operation.get_attr("training"):
        raise LookupError("A batch norm with fixed statistics has no native gradient.")
    terms = operation.get_attr("N")
    x = operation.outputs[0]
    gamma, beta = operation.inputs[-2:]
    mean, scale, *_ = operation.outputs[1 + terms :]
    for_x, for_gamma, for_beta = kernels.add_batch_norm_relu_grad(
        gradient=upstream,
        gradient_of_sum=others[:terms],
        x=x,
        gamma=gamma,
        beta=beta,
        mean=mean,
        scale=scale,
        relu=operation.get_attr("relu"),
    )
    return [for_x] * (1 + terms) + [None, None, for_gamma, for_beta]


def _gradient_of_convolution(
    gradient: Callable, operation: tf.Operation, upstream: tf.Tensor
) -> list[tf.Tensor | None]:
    """Returns the gradients. If it normalises x, the first one is the activation's gradient."""
    x, kernel, *norm = operation.inputs
    relu = operation.get_attr("relu")
    gradients = gradient(x=x, kernel=kernel, gradient=upstream, norm=norm, relu=relu)
    return [*gradients, *[None] * len(norm)]
