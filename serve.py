"""Serves an exported network: a page to try it, and an address for programs.

python serve.py --saved_model=savedmodels/resnet20
"""

import asyncio
import gc
import os
import socket

from absl import flags
from tornado.netutil import bind_sockets

import program
from cifar10_resnet import device
from cifar10_resnet.errors import UserError, exits_with_a_sentence, reason_of

FLAGS = flags.FLAGS

flags.adopt_module_key_flags(device)
flags.DEFINE_string("saved_model", None, "Folder that export_saved_model.py wrote.")
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
            f"there is no SavedModel in {FLAGS.saved_model}: export_saved_model.py makes one of a "
            "checkpoint."
        )
    sockets = _listen(FLAGS.host, FLAGS.port)

    device.start_tensorflow(FLAGS.device)
    from cifar10_resnet.serving import server
    from cifar10_resnet.serving.saved_network import SavedNetwork

    network = SavedNetwork(FLAGS.saved_model)
    # A large request makes many objects, and with them many passes of Python's garbage collector:
    # they need not look at all of TensorFlow's each time.
    gc.freeze()
    stopped_by = asyncio.run(server.serve(network, sockets, FLAGS.host, FLAGS.timeout))
    return 128 + stopped_by


def _listen(host: str, port: int) -> list[socket.socket]:
    try:
        return bind_sockets(port, host, backlog=1024)
    except (OSError, UnicodeError) as error:  # the latter of names that cannot be a machine's
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason_of(error)}. Choose others with --host "
            "and --port; --port=0 takes any free one."
        ) from error


if __name__ == "__main__":
    program.run(main, FLAG_GROUPS)
