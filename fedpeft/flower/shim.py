"""The Flower client of a deployment: it hands a message to the site's resident process.

Flower starts a process for every message. With node config ``socket=PATH`` that process loads
neither torch nor a model: it passes the message over the socket to ``fedpeft site``, which has
both, and returns what comes back (``fedpeft.site``). ``socket-wait`` bounds the seconds to wait for
a site process that is not there yet. Without ``socket`` it answers by itself (``client_app``).

Nothing but public reasons leaves: errors of the resident process come as such.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedpeft.errors import FedpeftError
from fedpeft.flower import wire
from fedpeft.flower.reasons import reason
from fedpeft.site.frames import Ended, Frame, connect, receive, send

log = logging.getLogger(__name__)

app = ClientApp()

WAIT = 60.0
"""Seconds to wait for a site process that starts or restarts, unless node config says."""

STEP = 0.1
"""Between two looks at the socket."""


KEY = ("run", "round", "exchange", "client", "nonce")
"""Fields of a message's header that no other message shares."""


@app.query()
def query(message: FlowerMessage, context: Context) -> FlowerMessage:
    """See ``client_app``."""
    return answered(message, context)


@app.train()
def train(message: FlowerMessage, context: Context) -> FlowerMessage:
    """See ``client_app``."""
    return answered(message, context)


@app.train("secure")
def train_securely(message: FlowerMessage, context: Context) -> FlowerMessage:
    """See ``client_app``."""
    return answered(message, context)


@app.evaluate()
def evaluate(message: FlowerMessage, context: Context) -> FlowerMessage:
    """See ``client_app``."""
    return answered(message, context)


def answered(message: FlowerMessage, context: Context) -> FlowerMessage:
    """The resident process's reply; without one configured, this process's own."""
    path = context.node_config.get("socket")
    if not path:
        from fedpeft.flower.client_app import app as own

        return own(message, context)
    try:
        kind = str(message.metadata.message_type)
        head = {
            "kind": kind,
            "config": dict(context.node_config),
            "key": key_of(kind, message.content),
        }
        wait = float(str(context.node_config.get("socket-wait", WAIT)))
        reply = handed(Path(str(path)), wire.pack(head, message.content), wait)
        if "error" not in reply.head:
            return FlowerMessage(wire.unpack(reply), reply_to=message)
        why = str(reply.head["error"])
    except Exception as error:
        log.warning("%s could not be handed over", message.metadata.message_type, exc_info=error)
        why = reason(error)
    return FlowerMessage(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why), reply_to=message)


def key_of(kind: str, content: RecordDict) -> list[object] | None:
    """What is the same of two processes that Flower starts for one message; None: nothing is."""
    header = content.get("header")
    if not isinstance(header, ConfigRecord) or not header.get("nonce"):
        return None
    return [kind, *(header.get(name) for name in KEY)]


def handed(path: Path, request: Frame, wait: float) -> Frame:
    """What the process at ``path`` answers. Raises FedpeftError where there is none.

    wait: seconds for one that is not there yet; for its answer there is no bound but its end.
    """
    until = time.monotonic() + wait
    while True:
        try:
            connection = connect(path)
            break
        except (OSError, Ended) as error:
            if time.monotonic() >= until:
                raise FedpeftError(
                    f"nobody answers at node config socket={str(path)!r} after {wait:g} seconds: "
                    f"start `fedpeft site` in the site's folder (unit fedpeft-site), or leave "
                    f"socket out of the node's config."
                ) from error
        time.sleep(STEP)
    with connection:
        try:
            send(connection, request)
            return receive(connection)
        except (OSError, Ended) as error:
            raise FedpeftError(
                "the site process ended before it answered, and the request is lost: see its log."
            ) from error
