"""Frames on a Unix socket: what is said is what is heard, and strangers are refused."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.site import frames
from fedpeft.site.frames import Ended, Frame, FrameError, connect, listen, receive, send

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.mark.parametrize("body", [b"", b"\x00\xff" * 10, os.urandom(3 * 2**20)])
def test_what_is_sent_is_received(pair: Pair, body: bytes) -> None:
    frame = Frame({"a": [1, 2.5, "ü", None, True], "b": {"c": float("inf")}}, body)
    talk = threading.Thread(target=send, args=(pair[0], frame))
    talk.start()
    found = receive(pair[1])
    talk.join()
    assert (found.head, bytes(found.body)) == (frame.head, body)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (struct.pack("<4sIQ", b"http", 1, 0) + b"x", "is no frame of fedpeft's"),
        (struct.pack("<4sIQ", b"fps1", 2**32 - 1, 0), "at most 67108864"),
        (struct.pack("<4sIQ", b"fps1", 2, 2**63), "at most 67108864 \\+ 2147483648 are allowed"),
        (struct.pack("<4sIQ", b"fps1", 2, 0) + b"[]", "no JSON object"),
        (struct.pack("<4sIQ", b"fps1", 2, 0) + b"{'", "no JSON object"),
        (struct.pack("<4sIQ", b"fps1", 2, 0) + b"\xff\xfe", "no JSON object"),
    ],
)
def test_what_is_no_frame_is_refused(pair: Pair, raw: bytes, message: str) -> None:
    """A length that is too large is refused before a byte of it is read: none follow here."""
    pair[0].sendall(raw)
    with pytest.raises(FrameError, match=message):
        receive(pair[1])


@pytest.mark.parametrize("count", [0, 5, 16, 17])
def test_the_end_of_the_other_side_is_told(pair: Pair, count: int) -> None:
    pair[0].sendall((struct.pack("<4sIQ", b"fps1", 2, 7) + b"{}")[:count])
    pair[0].close()
    with pytest.raises(Ended):
        receive(pair[1])


def test_too_large_a_frame_is_not_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames._check_lengths, "__defaults__", (10, 10))
    with pytest.raises(FrameError, match="has 2 \\+ 11 bytes, and at most 10 \\+ 10"):
        send(pair[0], Frame({}, b"x" * 11))


def served(listener: socket.socket, frame: Frame) -> threading.Thread:
    """Answers the greeting of one connection with ``frame``."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            receive(connection)
            send(connection, frame)

    talk = threading.Thread(target=answer)
    talk.start()
    return talk


def test_a_connection_is_greeted(tmp_path: Path) -> None:
    with listen(tmp_path / "own" / "s", 1) as listener:
        talk = served(listener, frames.greeting())
        connect(tmp_path / "own" / "s").close()
        talk.join()


@pytest.mark.parametrize("theirs", [{"protocol": 2, "version": "9.9.9"}, {}])
def test_another_version_is_refused(tmp_path: Path, theirs: dict[str, object]) -> None:
    with listen(tmp_path / "own" / "s", 1) as listener:
        talk = served(listener, Frame(theirs))
        with pytest.raises(FedpeftError, match="restart `fedpeft site` after installing another"):
            connect(tmp_path / "own" / "s")
        talk.join()


def test_a_process_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen(tmp_path / "own" / "s", 1):
        monkeypatch.setattr(os, "getuid", lambda: 54321)
        with pytest.raises(FedpeftError, match="belongs to user .*, and this process to 54321"):
            connect(tmp_path / "own" / "s")


def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    with listen(tmp_path / "own" / "s", 1):
        assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "own" / "s").stat().st_mode) == 0o600


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o755)
    with pytest.raises(FedpeftError, match="closed to others \\(mode 0700\\), not 0755"):
        listen(tmp_path / "own" / "s", 1)


def test_a_socket_that_was_left_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "own" / "s"
    listen(path, 1).close()
    assert path.is_socket()
    with (
        listen(path, 1),
        pytest.raises(FedpeftError, match="another `fedpeft site` listens there"),
    ):
        listen(path, 1)


def test_another_file_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "own" / "s").write_text("mine")
    with pytest.raises(FedpeftError, match="cannot be made: Address already in use"):
        listen(tmp_path / "own" / "s", 1)
    assert (tmp_path / "own" / "s").read_text() == "mine"


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    for use in (connect, lambda path: listen(path, 1)):
        with pytest.raises(FedpeftError, match="at most 107: name it relative to the site's"):
            use(tmp_path / ("x" * 100))
