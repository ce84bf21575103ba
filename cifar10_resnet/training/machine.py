"""Describes the machine of a run and how it is used, because a run's rounding depends on both.

A checkpoint records these facts. They do not identify a run, so a run can move to any machine. But
only with the same facts is a resumed run bit-identical to an uninterrupted one.
"""

import json
import os

import tensorflow as tf

# Whether oneDNN is on has no public name.
from tensorflow.python.util import _pywrap_util_port

from cifar10_resnet import device
from cifar10_resnet.distributed.replicas import Replicas
from cifar10_resnet.errors import UserError
from cifar10_resnet.options import Options

Facts = dict[str, str]

# The instruction sets between which oneDNN and the native kernels choose, the best one last.
INSTRUCTION_SETS = (
    *("asimd", "bf16", "sve", "svebf16"),
    *("sse4_1", "avx", "avx2", "avx_vnni"),
    *("avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"),
)


def facts(options: Options, is_native: bool, replicas: Replicas) -> Facts:
    """Returns the facts of this start. If workers differ in a fact, it lists all their values."""
    gpus = tf.config.get_visible_devices("GPU")
    own = _facts_of_gpus(gpus, options) if gpus else _facts_of_cpu(is_native)
    own |= {
        "data format": options.data_format,
        "precision": options.dtype,
        "XLA": _on_or_off(options.jit_compile),
        "replicas": str(replicas.count),
        "TensorFlow": tf.__version__,
    }
    of_workers = [json.loads(text) for text in replicas.exchange(json.dumps(own))]
    return {
        name: ", ".join(dict.fromkeys(worker.get(name, "none") for worker in of_workers))
        for name in own
    }


def differences(then: Facts, now: Facts) -> str:
    """Returns the facts that differ from a run's last start, as text, or "" if none does.

    A fact that one of them lacks does not count: another version did not record it.
    """
    return ", ".join(
        f"{name} {value} instead of {then[name]}"
        for name, value in now.items()
        if then.get(name, value) != value
    )


def compare(then: Facts, now: Facts, prefix: str, is_strict: bool) -> str:
    """Returns a line that names what differs from a run's last start, or "" if nothing does.

    With --deterministic=strict, it refuses a difference.
    """
    found = differences(then, now)
    if is_strict and (found or not then):
        why = found or "its machine is not recorded"
        raise UserError(
            f"does not match the checkpoint {prefix}: {why}. Make them equal, or use "
            "--deterministic=ops.",
            "deterministic",
            "strict",
        )
    if not found:
        return ""
    return (
        f"This machine may round differently from the run's last start: {found}. The run "
        "continues, but may not be bit-identical."
    )


def _facts_of_gpus(gpus: list, options: Options) -> Facts:
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = dict.fromkeys(detail.get("device_name", "unknown GPU") for detail in details)
    return {"device": " and ".join(names), "TF32": _on_or_off(options.tf32)}


def _facts_of_cpu(is_native: bool) -> Facts:
    model, instructions = model_and_instructions(device.processor())
    return {
        "device": "cpu",
        "processor": model,
        "instructions": instructions,
        "threads": str(_threads()),
        "oneDNN": _onednn(),
        "native kernels": _on_or_off(is_native),
    }


def model_and_instructions(described: str) -> tuple[str, str]:
    """Returns a processor's model and best instruction set, from Linux's lines about it."""
    values = dict(
        (part.strip() for part in line.split(":", 1))
        for line in described.splitlines()
        if ":" in line
    )
    flags = (values.get("flags") or values.get("Features") or "").split()
    known = [name for name in INSTRUCTION_SETS if name in flags]
    # Elsewhere, the description is the model.
    return values.get("model name", described.strip() if not values else ""), (known or [""])[-1]


def _threads() -> int:
    """Returns the number of threads with which TensorFlow computes an operation."""
    asked = tf.config.threading.get_intra_op_parallelism_threads()
    text = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
    asked = asked or (int(text) if text.isdecimal() else 0)
    has_affinity = hasattr(os, "sched_getaffinity")
    return asked or (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def _onednn() -> str:
    """Returns whether TensorFlow uses oneDNN's operations, and its limit on instructions.

    By default, they are on for some processors only. TensorFlow's own operations use oneDNN's
    products, so the limit counts without these operations too.
    """
    limits = [os.environ.get(f"{name}_MAX_CPU_ISA", "") for name in ("ONEDNN", "DNNL")]
    limit = next((limit for limit in limits if limit), "")
    return f"{_on_or_off(_pywrap_util_port.IsMklEnabled())}{limit and f' with {limit}'}"


def _on_or_off(is_on: bool | None) -> str:
    return "on" if is_on else "off"
