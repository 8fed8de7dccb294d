"""Where a node keeps what it must not forget between the stages of secure aggregation.

Whoever is asked twice and has forgotten the first time gives away its vector, so the state is on
the device before an answer leaves, and no two requests are answered at once. Flower's context is
not enough for that on a real node: Flower 1.41 sends an answer first and stores the context when
the app's process ends, and may run two processes on one context. So a real node has a file beside
its identity, ``IDENTITY.state``, readable by its owner only, locked by way of the identity's file.
It holds the stages' secrets during a round, and the last round's number after it; it must never be
restored from a backup. A simulated node has Flower's context.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord

from fedpeft.errors import FedpeftError
from fedpeft.flower.node import Node
from fedpeft.record.files import failed_write, sync_folder
from fedpeft.secagg.codec import Reader, Writer
from fedpeft.secagg.envelope import SMALL

_RECORD = "secagg"
_LIMIT = 8 * SMALL


@dataclass(frozen=True)
class Kept:
    """participant: the ``state()`` of one, empty before its first round. setup: the round's."""

    participant: bytes = b""
    setup: bytes = b""


@contextmanager
def alone(node: Node) -> Iterator[None]:
    """No other request of secure aggregation is answered for this identity in the meantime.

    Raises FedpeftError where one is.
    """
    if node.simulated:
        yield
        return
    with open(_identity(node), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FedpeftError(
                "this client is answering another request of secure aggregation: one at a time."
            ) from error
        yield


def load(node: Node) -> Kept:
    """What was saved last. Raises FedpeftError for a file that is none of these."""
    if node.simulated:
        record = node.state.get(_RECORD)
        if not isinstance(record, ConfigRecord):
            return Kept()
        participant, setup = record["participant"], record["setup"]
        assert isinstance(participant, bytes) and isinstance(setup, bytes)  # as written below
        return Kept(participant, setup)
    path = _path(node)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Kept()
    except OSError as error:
        raise FedpeftError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
    reader = Reader(data, f"the state of secure aggregation in {str(path)!r}", _LIMIT)
    kept = Kept(reader.blob(), reader.blob())
    reader.end()
    return kept


def save(node: Node, kept: Kept) -> None:
    """Puts ``kept`` in the place of what was saved before, on the device when this returns.

    Raises FedpeftError where that fails; then nothing may be answered.
    """
    if node.simulated:
        content = {"participant": kept.participant, "setup": kept.setup}
        node.state[_RECORD] = ConfigRecord(dict(content))
        return
    path = _path(node)
    part = path.with_name(f".writing-{path.name}")
    try:
        part.unlink(missing_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(handle, "wb") as file:
            file.write(Writer().blob(kept.participant).blob(kept.setup).bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise failed_write(error, path, "Nothing was answered.") from error


def _identity(node: Node) -> Path:
    return Path(str(node.config["identity"]))


def _path(node: Node) -> Path:
    own = _identity(node)
    return own.with_name(f"{own.name}.state")
