"""Starts TensorFlow in a worker, while the meeting of the workers watches."""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob

# The limit on how long a worker may be silent, and the call that waits for the other workers,
# have no public names.
from tensorflow.python.eager import context as tf_context

from cifar10_resnet.device import stderr_held_back
from cifar10_resnet.distributed.cluster import Cluster
from cifar10_resnet.distributed.meeting import Meeting

# All workers must start within these seconds. Schedulers start them minutes apart.
START_TIMEOUT = 600
# If another worker ends, TensorFlow may fail here before its connection ends.
GRACE_SECONDS = 2


def join(cluster: Cluster, worker_timeout: float) -> tf.distribute.Strategy:
    """Returns TensorFlow's strategy once it has started in all workers."""
    with Meeting(cluster, START_TIMEOUT, worker_timeout) as meeting:
        meeting.gather()
        tf_context.context().configure_coordination_service(
            service_type="standalone",
            service_leader="/job:worker/replica:0/task:0",
            cluster_register_timeout_in_ms=round(meeting.seconds_left * 1000) + 1000,
            heartbeat_timeout_in_ms=round(worker_timeout * 1000),
            coordinated_jobs=[CoordinatedJob(name="worker", num_tasks=len(cluster.addresses))],
        )
        # TensorFlow 2.20 reports its server's start at every log level.
        is_quiet = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "3"
        with stderr_held_back() if is_quiet else contextlib.nullcontext(), _interruptible():
            start = _in_thread(tf.distribute.MultiWorkerMirroredStrategy)
            failure = _watch(meeting, start)
    if failure:
        # TensorFlow cannot end this thread. It crashes if it ends around it.
        if not start.done():
            atexit.register(_end_at_once, failure)
        raise failure
    return start.result()


def _watch(meeting: Meeting, start: Future) -> BaseException | None:
    """Waits for all workers. Returns what ends the wait early: an error, or a signal."""
    failed_at: list[float] = []

    def is_started() -> bool:
        _keep_sigterm()
        if not start.done():
            return False
        if start.exception() is None:
            return True
        failed_at.append(time.monotonic())
        if failed_at[-1] - failed_at[0] > GRACE_SECONDS:
            start.result()
        return False

    try:
        meeting.watch(is_started)
    except BaseException as failure:
        return failure
    finally:
        _keep_sigterm()


def _in_thread(function: Callable[[], Any]) -> Future:
    """Returns the future result of a function, which runs in a thread that the exit ignores."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _keep_sigterm() -> None:
    """Installs Python's handler again, because TensorFlow's start replaces it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _end_at_once(failure: BaseException) -> None:
    """Ends the process with the status that the error or the signal has."""
    status = failure.code if isinstance(failure, SystemExit) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + signal.SIGINT if isinstance(failure, KeyboardInterrupt) else status)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Lets other threads run while TensorFlow waits for the other workers.

    TensorFlow's Python module keeps Python's lock in this call, so no signal would be handled, and
    nobody could watch the other workers. A call through ctypes releases the lock.
    """
    folder = Path(tf.sysconfig.get_lib())
    module, original = tf_context.pywrap_tfe, tf_context.pywrap_tfe.TFE_EnableCollectiveOps
    found = [ctypes.CDLL(str(file)) for file in folder.glob("libtensorflow_*.*")]
    names = ("TFE_EnableCollectiveOps", "TF_NewStatus", "TF_GetCode", "TF_Message")
    calls = [next((getattr(f, name) for f in found if hasattr(f, name)), None) for name in names]
    if all(calls):
        module.TFE_EnableCollectiveOps = _releasing_lock(*calls)
    try:
        yield
    finally:
        module.TFE_EnableCollectiveOps = original


def _releasing_lock(enable: Any, new_status: Any, code_of: Any, message_of: Any) -> Callable:
    pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_in.restype, pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    new_status.restype, new_status.argtypes = ctypes.c_void_p, ()
    code_of.restype, code_of.argtypes = ctypes.c_int, (ctypes.c_void_p,)
    message_of.restype, message_of.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)
    enable.restype = None
    enable.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p)

    def call(context: Any, server: bytes) -> None:
        status = new_status()
        enable(pointer_in(context, None), server, len(server), status)
        if code := code_of(status):
            kind = tf.errors.exception_type_from_error_code(code)
            raise kind(None, None, message_of(status).decode("utf-8", "replace"))

    return call
