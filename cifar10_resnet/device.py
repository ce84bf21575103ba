"""Starts TensorFlow on a device, quietly and without idle work."""

import contextlib
import functools
import gc
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cifar10_resnet.errors import UserError

if TYPE_CHECKING:
    from resnet_model import Convolve

# These passes over a graph find nothing to do in these networks on a CPU. They take 0.4 of
# the 6.4 seconds that ResNet-110 needs to start (AMD EPYC, two cores). "remapping" is not in the
# list, because it fuses batch norm with ReLU.
IDLE_PASSES = (
    *("layout_optimizer", "constant_folding", "shape_optimization", "arithmetic_optimization"),
    *("dependency_optimization", "loop_optimization", "function_optimization"),
    "common_subgraph_elimination",
)

SHARED_MEMORY = "/dev/shm"  # Linux has a folder in memory here, also in read-only containers.


def start_tensorflow(
    device: str,
    verbose: bool = False,
    num_gpus: int | None = None,
    *,
    tf32: bool = False,
    deterministic: str = "off",
) -> str:
    """Imports TensorFlow quietly, selects the device and returns "cpu" or "gpu".

    TensorFlow computes fp32 in TF32 by default. Here it does that only with `tf32`, because only
    training gains from it.
    """
    if verbose:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")
    _settle_temporary_folder()
    with _quiet_start():
        with _without_keras(), _without_collecting_garbage():
            import tensorflow as tf

        gpus = tf.config.get_visible_devices("GPU")
        found = len(gpus)
        gpus = [] if device == "cpu" else gpus[:num_gpus]
        tf.config.set_visible_devices(gpus, "GPU")
        for gpu in gpus:
            # Otherwise the first program takes all of a GPU's memory, and no other can start.
            # TF_FORCE_GPU_ALLOW_GROWTH in the environment overrides this.
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.experimental.enable_tensor_float_32_execution(tf32)
        if deterministic != "off":
            # TensorFlow then also sets xla_gpu_deterministic_ops for everything that XLA compiles.
            tf.config.experimental.enable_op_determinism()
        has_gpu = bool(gpus)
        if not has_gpu:
            tf.config.optimizer.set_experimental_options(dict.fromkeys(IDLE_PASSES, False))
    if num_gpus is not None and num_gpus > found:
        why = f"is not possible: TensorFlow finds {found} GPUs. Use --num_gpus={found}."
        raise UserError(why, "num_gpus", num_gpus)
    if device == "gpu" and not has_gpu:
        raise UserError(
            "is not possible: TensorFlow finds no GPU. Run `pip install '.[gpu]'` in the project's "
            "folder, or use --device=cpu.",
            "device",
            device,
        )
    return "gpu" if has_gpu else "cpu"


def visible_device() -> str:
    """Returns "gpu" if TensorFlow uses one, else "cpu"."""
    import tensorflow as tf

    return "gpu" if tf.config.get_visible_devices("GPU") else "cpu"


def processor() -> str:
    """Returns what is known of the processor's instructions."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        kept = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
        return "".join(sorted(set(kept)))
    return f"{platform.machine()} {platform.processor()}"


def slowness(dtype: str, device: str) -> str | None:
    """Returns why a precision saves little time on "cpu" or "gpu", or None if it saves more."""
    if not _is_emulated(dtype, device):
        return None
    return f"This CPU computes the convolutions of {dtype} in fp32, so {dtype} saves little time."


def ways(data_format: str, dtype: str) -> dict[str, Any]:
    """Returns the arguments of a ResNet that computes in a data format and precision here."""
    return {"data_format": data_format, "dtype": dtype, "convolve": convolve_in(dtype)}


def convolve_in(dtype: str, convolve: "Convolve | None" = None) -> "Convolve":
    """Returns how to compute convolutions: in fp32 if TensorFlow's device emulates the precision.

    TensorFlow's own emulation of bf16 and fp16 takes 3 to 20 times as long. Without `convolve`,
    TensorFlow computes the convolutions.
    """
    import tensorflow as tf

    from resnet_model import convolution

    convolve = convolve or convolution

    def in_fp32(x: tf.Tensor, kernel: tf.Variable, stride: int, layout: str) -> tf.Tensor:
        rounded = tf.cast(tf.cast(kernel, x.dtype), tf.float32)
        return tf.cast(convolve(tf.cast(x, tf.float32), rounded, stride, layout), x.dtype)

    return in_fp32 if _is_emulated(dtype, visible_device()) else convolve


def _is_emulated(dtype: str, device: str) -> bool:
    return device == "cpu" and (dtype == "fp16" or (dtype == "bf16" and not _cpu_has_bf16()))


def _cpu_has_bf16() -> bool:
    """Returns whether the processor has instructions for bf16, or true if that is not known."""
    words = processor().split()
    # x86 lists "flags", and Arm lists "Features".
    return not {"flags", "Features"} & set(words) or any("bf16" in word for word in words)


def resolve_data_format(data_format: str, dtype: str, device: str = "auto") -> str:
    """Turns `auto` into the device's data format. Refuses a format that its kernels lack."""
    if device == "auto":
        device = visible_device()
    if data_format == "auto":
        return "channels_first" if device == "gpu" else "channels_last"
    if data_format == "channels_first" and device == "cpu" and not _cpu_trains(data_format, dtype):
        raise UserError(
            f"is not possible in {dtype} on this CPU. Use --data_format=channels_last.",
            "data_format",
            data_format,
        )
    return data_format


@functools.cache  # It takes a second, and the answer stays.
def _cpu_trains(data_format: str, dtype: str) -> bool:
    """Returns whether this CPU can train in this data format and precision."""
    import tensorflow as tf

    from resnet_model import ResNet

    # The answer depends on TensorFlow's build, the processor and the environment. TensorFlow may
    # have one kernel and lack the next. So this computes a gradient of the smallest network that
    # uses every kernel. In these small images, the last block still has a pixel.
    try:
        with tf.device("cpu"):
            network = ResNet(num_layers=8, **ways(data_format, dtype))
            with tf.GradientTape() as tape:
                logits = network(tf.zeros([1, 4, 4, 3]), training=True)
            tape.gradient(logits, network.trainable_variables)
        return True
    except tf.errors.OpError:
        return False


def _settle_temporary_folder() -> None:
    """Lets the libraries start if every usual folder for temporary files is read-only."""
    try:
        tempfile.gettempdir()
    except OSError:
        if os.access(SHARED_MEMORY, os.W_OK):
            tempfile.tempdir = SHARED_MEMORY
        else:
            # TensorFlow imports absl's tests, which need a folder but write nothing to it.
            os.environ.setdefault("TEST_TMPDIR", os.devnull)


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """Keeps TensorFlow from importing Keras and with it Matplotlib: a quarter of its start.

    Nothing in this project uses Keras. Other code can use `tf.keras` as usual.
    """
    if "keras" in sys.modules:
        yield
        return
    sys.modules["keras"] = None  # An import of it now raises ImportError.
    try:
        yield
    finally:
        del sys.modules["keras"]


@contextlib.contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """Keeps Python from looking for garbage among the objects that an import makes, then or later.

    They are hundreds of thousands, and all of them stay. The first step comes a sixth sooner.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Keeps TensorFlow's start-up messages from the terminal, unless the user asks for them."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") in ("0", "1"):
        yield
        return
    # With several workers, errors are hidden too: TensorFlow prints pages if one is lost.
    level = "3" if os.environ.get("TF_CONFIG") else "2"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", level)
    with stderr_held_back():
        yield


@contextlib.contextmanager
def stderr_held_back() -> Iterator[None]:
    """Holds back the process's standard error, and prints it only if the block fails.

    TensorFlow writes some messages straight there, whatever its log level is. If there is neither
    memory nor a temporary folder for them, they are printed.
    """
    try:
        # Memory, where the system has files in it, because a temporary folder may be read-only.
        said = os.fdopen(os.memfd_create("stderr"), "w+b")
    except (AttributeError, OSError):
        try:
            said = tempfile.TemporaryFile()  # noqa: SIM115
        except OSError:
            yield
            return
    sys.stderr.flush()
    terminal = os.dup(2)
    with said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except Exception:
            said.seek(0)
            os.write(terminal, said.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
