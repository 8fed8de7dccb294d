"""The worker of a site's resident process: it keeps model and data, and answers frame by frame.

``python -m fedpeft.flower.resident FOLDER SOCKET`` is started by ``fedpeft site`` in the site's
folder (``fedpeft.site.server``), with the number of an open socket. It goes by the node config in
the folder's ``site.json``; a message's process that has another one is refused. It ends when its
socket is closed, in the middle of whatever it does: what a client keeps is written whole or not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from flwr.app import MessageType, RecordDict

from fedpeft import logs
from fedpeft.config import Recipe
from fedpeft.config_load import dump_recipe
from fedpeft.errors import FedpeftError
from fedpeft.flower import wire
from fedpeft.flower.client_app import allowed, answer, log_to
from fedpeft.flower.node import Node, check_rules, policy_of
from fedpeft.flower.reasons import reason
from fedpeft.flower.records import Header, decode, encode
from fedpeft.site.folder import Config, read_config
from fedpeft.site.frames import Frame, FrameError, receive, send
from fedpeft.strategy import Message

log = logging.getLogger(__name__)


@logs.scope()
def answered(frame: Frame, config: Config, state: RecordDict) -> Frame:
    """The answer to a frame of ``shim``: a frame of records, or of a public reason.

    state: what lasts between requests where the config names no ``state`` on disk.
    """
    kind = str(frame.head.get("kind"))
    try:
        check_config(config, frame.head.get("config"))
        content = wire.unpack(frame)
        return wire.pack({}, answer(kind, content, Node(config, state, simulated=False)))
    except Exception as error:  # one faulty message costs only itself
        log.warning("%s failed", kind, exc_info=error)
        return Frame({"error": reason(error)})


@dataclass(frozen=True)
class Introduction:
    """How a site answers a server: its client, its training examples, its base model's digest."""

    client: str
    examples: int
    base: str


def introduction(config: Config, recipe: Recipe) -> Introduction:
    """The answer to a recipe. Raises FedpeftError where the site does not take it.

    Loads model and data, and trains nothing; an operator's look before a run.
    """
    node, text = Node(config, RecordDict(), simulated=False), dump_recipe(recipe)
    message, header = decode(
        answer(MessageType.QUERY, encode(Message(), Header(recipe=text)), node)
    )
    check_rules(node, allowed(text, node, None), secure=recipe.secure_aggregation.enabled)
    return Introduction(header.client, int(message.scalars["examples"]), header.base)


def check_config(own: Config, theirs: object) -> None:
    """Raises FedpeftError where the node was started with another config than this process."""
    if theirs == dict(own):
        return
    known = theirs if isinstance(theirs, dict) else {}
    differing = sorted(k for k in {*own, *known} if own.get(k) != known.get(k))
    raise FedpeftError(
        f"node config {', '.join(differing)}: the node and its site process have different ones. "
        f"Start both with what site.json says."
    )


def main(folder: Path, number: int) -> None:
    """Serves the socket until it is closed."""
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the resident process decides
    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
    connection = socket.socket(fileno=number)
    state = RecordDict()
    try:
        config = read_config(folder)
        log_to(config.get("log"))
        policy_of(Node(config, state, simulated=False))
    except FedpeftError as error:
        send(connection, Frame({"fatal": str(error)}))
        return
    send(connection, Frame({"ready": True}))
    requests: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, requests), daemon=True).start()
    while True:
        send(connection, answered(requests.get(), config, state))


def _read(connection: socket.socket, requests: queue.SimpleQueue[Frame]) -> None:
    """Reads what comes; where nothing can any more, the process ends with it."""
    try:
        while True:
            requests.put(receive(connection))
    except (OSError, FrameError):
        os._exit(0)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
        main(Path(sys.argv[1]), int(sys.argv[2]))
