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
            for event in _events(file):
                for value in event.summary.value:
                    if value.metadata.plugin_data.plugin_name == "scalars":
                        row = rows.setdefault(event.step, {"step": event.step})
                        row[f"{writer}_{value.tag}"] = float(make_ndarray(value.tensor))
    return [rows[step] for step in sorted(rows)]


def _events(file: str) -> Iterator[Event]:
    """Yields the events of a file. Skips a last event that is still being written."""
    try:
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
    except OSError as error:
        raise unreadable(file, error) from error
    except DecodeError as error:
        raise UserError(
            f"{file} is not an intact event file of TensorBoard. Move it away."
        ) from error
