"""Reads a run's event files without TensorFlow."""

import glob
import os
import struct
from collections.abc import Iterator

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.util.tensor_util import make_ndarray

from cifar10_resnet.errors import UserError, unreadable

WRITERS = ("train", "eval")


def read_history(log_path: str) -> list[dict[str, float]]:
    """Returns a row for each step at which something was written, in order.

    Columns are named after writer and tag (`train_loss`, `eval_accuracy`). If a resumed run
    repeated steps, the later values count.
    """
    rows: dict[int, dict[str, float]] = {}
    for writer in WRITERS:
        pattern = os.path.join(glob.escape(log_path), writer, "events.out.tfevents.*")
        for file in sorted(glob.glob(pattern)):  # oldest first: names contain the start time
            for step, tag, value in _scalars(file):
                rows.setdefault(step, {"step": step})[f"{writer}_{tag}"] = value
    return [rows[step] for step in sorted(rows)]


def _scalars(file: str) -> Iterator[tuple[int, str, float]]:
    """Yields the step, the tag and the value of each scalar in a file."""
    try:
        for event in _events(file):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    yield event.step, value.tag, float(make_ndarray(value.tensor))
    except OSError as error:
        raise unreadable(file, error) from error
    except (DecodeError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not an intact event file of TensorBoard. Move it away."
        ) from error


def _events(file: str) -> Iterator[Event]:
    """Yields the events of a file. Skips a last event that is still being written."""
    with open(file, "rb") as opened:
        content = opened.read()
    place = 0
    while place + 12 <= len(content):
        # A record is its length, the length's checksum, the event, and the event's checksum.
        begin = place + 12
        end = begin + struct.unpack_from("<Q", content, place)[0]
        if end + 4 > len(content):
            return
        yield Event.FromString(content[begin:end])
        place = end + 4
