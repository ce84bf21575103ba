"""Serves an exported network: a web page and a REST API.

python -m cifar10_resnet serve --saved_model=savedmodels/resnet20

This server is small. It is for trying a network, and for programs on the same machine. For more,
run TensorFlow Serving on the same SavedModel. It needs a numbered folder, such as resnet20/1:

python -m cifar10_resnet export --ckpt_path=runs/resnet20 --export_dir=savedmodels/resnet20/1
docker run -p 8501:8501 -v "$PWD/savedmodels/resnet20:/models/resnet" -e MODEL_NAME=resnet \\
    tensorflow/serving

A SavedModel is a program that runs with your rights. The command refuses a SavedModel that can do
more than classify images. Pass --trust to load it if you trust its source.
"""

import asyncio
import gc
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar10_resnet import storage
from cifar10_resnet.cli import app
from cifar10_resnet.device import start_tensorflow
from cifar10_resnet.errors import UserError, reason_of
from cifar10_resnet.options import Options, saved_model, trust
from cifar10_resnet.settings import Checked, same, setting

if TYPE_CHECKING:
    from cifar10_resnet.cli.flags import Flags


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    saved_model: str = saved_model()
    trust: bool = trust()
    device: str = same(Options, "device", group="Network")
    host: str = setting(
        "127.0.0.1", "Address to listen on (0.0.0.0: accept other machines)", "Address"
    )
    port: int = setting(
        8501, "Port to listen on (0: any free port)", "Address", least=0, most=65535
    )
    timeout: float = setting(
        30.0, "Seconds to receive a request, and seconds to answer it", "Address", least=0.1
    )


def main(flags: "Flags") -> int:
    """Serves the network until it is stopped."""
    storage.refuse_without_saved_model(flags.saved_model)
    sockets = _listen(flags.host, flags.port)

    start_tensorflow(flags.device)
    from cifar10_resnet.serving import server
    from cifar10_resnet.serving.saved_network import SavedNetwork

    network = SavedNetwork(flags.saved_model, flags.trust)
    # A large request makes many objects, so Python's garbage collector often runs. Frozen objects,
    # such as TensorFlow's, are not searched each time.
    gc.freeze()
    stopped_by = asyncio.run(server.serve(network, sockets, flags.host, flags.timeout))
    return 128 + stopped_by


def _listen(host: str, port: int) -> list[socket.socket]:
    from tornado.netutil import bind_sockets

    try:
        return bind_sockets(port, host, backlog=1024)
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        raise UserError(
            f"Port {port} on {host} cannot be used: {reason_of(error)}. Use another --host or "
            "--port, or --port=0 for any free port."
        ) from error


if __name__ == "__main__":
    app.run(main, Settings)
