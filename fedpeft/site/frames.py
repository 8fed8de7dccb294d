"""What is spoken between a message's process and the resident one: frames on a Unix socket.

A frame is a JSON object and raw bytes, each with its length in front, nothing pickled::

    b"fps1"   uint32 bytes of JSON   uint64 raw bytes   JSON   raw bytes

Lengths are checked before anything is read, and what is read grows with what arrives. Both ends
see to it that the other is a process of the same user (``SO_PEERCRED``), and a conversation begins
with a greeting: protocol and version must be the same on both sides.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft import __version__
from fedpeft.errors import FedpeftError

PROTOCOL = 1
HEAD_LIMIT = 64 * 2**20
"""Bytes of a frame's JSON, at most."""

BODY_LIMIT = 2 * 2**30
"""Raw bytes of a frame, at most: as of a message of Flower's."""

PATH_LIMIT = 107
"""Bytes of a Unix socket's path, at most; Linux has room for no more."""

GREETING_SECONDS = 30.0
"""For the other end to greet, once it is connected."""

_MAGIC = b"fps1"
_LENGTHS = struct.Struct("<4sIQ")
_PIECE = 2**20
_PEER = struct.Struct("3i")  # pid, uid, gid


class FrameError(FedpeftError):
    """The other end said something that is no frame, or ended in the middle of one."""


class Ended(FrameError):
    """The other end has closed the connection."""


@dataclass(frozen=True)
class Frame:
    """head: a JSON object. body: raw bytes."""

    head: Mapping[str, Any]
    body: bytes | bytearray = field(default=b"", repr=False)


def send(connection: socket.socket, frame: Frame) -> None:
    """Sends a frame. Raises FrameError where it is too large, OSError where nobody listens."""
    head = json.dumps(frame.head, separators=(",", ":")).encode()
    _check_lengths(len(head), len(frame.body))
    connection.sendall(_LENGTHS.pack(_MAGIC, len(head), len(frame.body)) + head)
    if frame.body:  # who has read all may have answered and gone by now
        connection.sendall(frame.body)


def receive(
    connection: socket.socket, head_limit: int = HEAD_LIMIT, body_limit: int = BODY_LIMIT
) -> Frame:
    """The next frame. Raises Ended where none comes any more, FrameError for what is none."""
    first = _read(connection, _LENGTHS.size)
    magic, head_length, body_length = _LENGTHS.unpack(first)
    if magic != _MAGIC:
        raise FrameError("what came over the site's socket is no frame of fedpeft's")
    _check_lengths(head_length, body_length, head_limit, body_limit)
    text = _read(connection, head_length)
    try:
        head = json.loads(text)
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict):
        raise FrameError("the head of a frame on the site's socket is no JSON object")
    return Frame(head, _read(connection, body_length))


def greeting() -> Frame:
    """What each side says first."""
    return Frame({"protocol": PROTOCOL, "version": __version__})


def check_greeting(frame: Frame, who: str) -> None:
    """Raises FedpeftError where the other side speaks another protocol, or is another fedpeft."""
    theirs = frame.head.get("protocol"), frame.head.get("version")
    if theirs != (PROTOCOL, __version__):
        protocol, version = (str(value)[:40] for value in theirs)
        raise FedpeftError(
            f"{who} is fedpeft {version} (protocol {protocol}), this process is {__version__} "
            f"(protocol {PROTOCOL}): restart `fedpeft site` after installing another version."
        )


def check_peer(connection: socket.socket) -> None:
    """Raises FedpeftError unless the other end is a process of this user's."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, user, _ = _PEER.unpack(raw)
    if user != os.getuid():
        raise FedpeftError(
            f"the other end of the site's socket belongs to user {user}, and this process to "
            f"{os.getuid()}: run the node and `fedpeft site` as the same user."
        )


def check_path(path: Path) -> None:
    """Raises FedpeftError for a path that is too long for a socket."""
    length = len(os.fsencode(path))
    if length > PATH_LIMIT:
        raise FedpeftError(
            f"socket={str(path)!r} has {length} bytes, and a Unix socket's path at most "
            f"{PATH_LIMIT}: name it relative to the site's folder, or move the folder."
        )


def connect(path: Path) -> socket.socket:
    """A connection to the resident process, greeted. Raises OSError where there is none.

    Raises FedpeftError where somebody else listens, or another version.
    """
    check_path(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(GREETING_SECONDS)
    try:
        connection.connect(os.fspath(path))
        check_peer(connection)
        send(connection, greeting())
        check_greeting(receive(connection, head_limit=4096, body_limit=0), "the site process")
        connection.settimeout(None)  # an answer takes as long as its training
    except BaseException:
        connection.close()
        raise
    return connection


def listen(path: Path, backlog: int) -> socket.socket:
    """The socket at ``path``, in a folder (0700, made if missing) that this user alone can enter.

    A file that an earlier process left is removed. Raises FedpeftError where another process
    listens there, and where the folder is open to others or is somebody else's.
    """
    check_path(path)
    _check_folder(path.parent)
    if path.is_socket():
        if _answers(path):
            raise FedpeftError(
                f"socket={str(path)!r}: another `fedpeft site` listens there. End it first."
            )
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise FedpeftError(
            f"socket={str(path)!r} cannot be made: {error.strerror}. Name another path, or remove "
            f"what lies there."
        ) from error
    finally:
        os.umask(before)
    return listener


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise FedpeftError(
            f"the socket's folder {str(folder)!r} cannot be made: {error.strerror}."
        ) from error
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise FedpeftError(
            f"the socket's folder {str(folder)!r} must belong to this user and be closed to others "
            f"(mode 0700), not {stat.S_IMODE(found.st_mode):04o}: chmod it, or name another socket."
        )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(os.fspath(path)) == 0


def _check_lengths(
    head: int, body: int, head_limit: int = HEAD_LIMIT, body_limit: int = BODY_LIMIT
) -> None:
    if head > head_limit or body > body_limit:
        raise FrameError(
            f"a frame on the site's socket has {head} + {body} bytes, and at most {head_limit} + "
            f"{body_limit} are allowed"
        )


def _read(connection: socket.socket, count: int) -> bytearray:
    """Exactly so many bytes; memory is taken as they arrive."""
    found = bytearray()
    while len(found) < count:
        piece = connection.recv(min(_PIECE, count - len(found)))
        if not piece:
            raise Ended("the other end of the site's socket has gone")
        found += piece
    return found
