"""The process that computes: started by the resident one, asked over a pair of sockets.

It says ``{"ready": true}`` when it has loaded what every message needs, or ``{"fatal": reason}``
where its configuration is wrong. After that each frame is answered by one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import psutil

from fedpeft.errors import FedpeftError
from fedpeft.site.frames import Frame, receive, send

GRACE = 10.0
"""Seconds that a worker has to end by itself when its socket is closed, before it is killed."""

QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Of a worker: what it prints is the site's log."""


class FatalError(FedpeftError):
    """What a worker cannot start with, however often it is tried."""


class Worker:
    """A worker process. command: what runs it; the number of its socket is appended."""

    def __init__(self, command: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **QUIET},
                start_new_session=True,  # Ctrl-C is for the process that owns it
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._popen.pid

    def wait_ready(self) -> None:
        """Raises FatalError where it cannot start, OSError or FrameError where it has died."""
        said = receive(self._socket).head
        if "fatal" in said:
            raise FatalError(str(said["fatal"]))

    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    def ask(self, frame: Frame) -> Frame:
        """Its answer. Raises OSError or FrameError where it dies over it."""
        send(self._socket, frame)
        return receive(self._socket)

    def memory(self) -> int:
        """Resident bytes; 0 where it has ended."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def end(self, grace: float = GRACE) -> int:
        """Ends it: its socket is closed, and it is killed where it goes on. Its exit code."""
        self._socket.close()
        try:
            return self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._popen.wait()

    def kill(self) -> None:
        """Ends it now."""
        self._popen.kill()


def command() -> list[str]:
    """The worker of this installation; it is started in the site's folder."""
    return [sys.executable, "-P", "-m", "fedpeft.flower.resident", os.getcwd()]
