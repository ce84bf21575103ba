"""Serves an exported network: a web page and a REST API.

python -m cifar10_resnet serve --saved_model=savedmodels/resnet20
"""

import asyncio
import gc
import os
import socket

from absl import flags

from cifar10_resnet.cli import app
from cifar10_resnet.cli.guard import exits_with_a_sentence
from cifar10_resnet.device import start_tensorflow
from cifar10_resnet.errors import UserError, reason_of
from cifar10_resnet.terminal import command

FLAGS = flags.FLAGS

app.define_device()
flags.DEFINE_string("saved_model", None, "Folder that the export command wrote.")
flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in.")
flags.DEFINE_integer(
    "port", 8501, "Port to listen on; 0 takes any free one.", lower_bound=0, upper_bound=65535
)
flags.DEFINE_float(
    "timeout", 30, "Seconds that a client may take to send a request.", lower_bound=0.1
)
flags.mark_flag_as_required("saved_model")

FLAG_GROUPS = {
    "The network": ("saved_model", "device"),
    "Its address": ("host", "port", "timeout"),
}


@exits_with_a_sentence
def main(argv: list[str]) -> int:
    if not os.path.isfile(os.path.join(FLAGS.saved_model, "saved_model.pb")):
        raise UserError(
            f"there is no SavedModel in {FLAGS.saved_model}: `{command('export')}` makes one of a "
            "checkpoint."
        )
    sockets = _listen(FLAGS.host, FLAGS.port)

    start_tensorflow(FLAGS.device)
    from cifar10_resnet.serving import server
    from cifar10_resnet.serving.saved_network import SavedNetwork

    network = SavedNetwork(FLAGS.saved_model)
    # A large request makes many objects, and with them many passes of Python's garbage collector:
    # they need not look at all of TensorFlow's each time.
    gc.freeze()
    stopped_by = asyncio.run(server.serve(network, sockets, FLAGS.host, FLAGS.timeout))
    return 128 + stopped_by


def _listen(host: str, port: int) -> list[socket.socket]:
    from tornado.netutil import bind_sockets

    try:
        return bind_sockets(port, host, backlog=1024)
    except (OSError, UnicodeError) as error:  # the latter of names that cannot be a machine's
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason_of(error)}. Choose others with --host "
            "and --port; --port=0 takes any free one."
        ) from error


if __name__ == "__main__":
    app.run(main, FLAG_GROUPS)
