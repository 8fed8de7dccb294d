"""A worker in this process, for the resident one: it does what a test says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpeft.site.desk import Desk
from fedpeft.site.frames import Ended, Frame, connect, listen, receive, send
from fedpeft.site.server import Limits, Resident

Answer = Callable[[Frame], Frame]


class Dies(Exception):
    """Raised by an answer where the worker is to die over it."""


class FakeWorker:
    """As ``fedpeft.site.worker.Worker``. ready: called before the worker says that it is."""

    def __init__(self, pid: int, answer: Answer, ready: Callable[[], None], size: int) -> None:
        self.pid = pid
        self.ended = False
        self.killed = threading.Event()
        self._answer = answer
        self._ready = ready
        self._size = size

    def wait_ready(self) -> None:
        self._ready()

    def alive(self) -> bool:
        return not self.ended

    def ask(self, frame: Frame) -> Frame:
        try:
            return self._answer(frame)
        except Dies:
            raise Ended("gone") from None

    def memory(self) -> int:
        return self._size

    def end(self, grace: float = 0.0) -> int:
        self.ended = True
        return -9

    def kill(self) -> None:
        self.killed.set()


def echo(frame: Frame) -> Frame:
    return Frame({"echo": frame.head["kind"]}, bytes(frame.body))


@dataclass
class Site:
    """A resident process in threads of this one. workers: those that were started."""

    path: Path
    limits: Limits = field(default_factory=lambda: Limits(queue=2, grace=5.0))
    answer: Answer = echo
    ready: Callable[[], None] = lambda: None
    size: int = 0
    workers: list[FakeWorker] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)
    fault: list[BaseException] = field(default_factory=list)
    desks: list[Desk] = field(default_factory=list)
    connections: list[socket.socket] = field(default_factory=list)

    def start(self) -> Any:
        self.workers.append(FakeWorker(len(self.workers) + 1, self.answer, self.ready, self.size))
        return self.workers[-1]

    def delay(self, failures: int) -> float:
        self.delays.append(failures)
        return 0.0

    @contextmanager
    def served(self) -> Iterator[Resident]:
        with listen(self.path, 8) as listener:
            resident = Resident(listener, self.start, self.limits, self.said.append, self.delay)
            self.desks.append(resident._desk)

            def serve() -> None:
                try:
                    resident.serve()
                except BaseException as error:
                    self.fault.append(error)

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield resident
            finally:
                resident.stop()
                thread.join()
                for connection in self.connections:
                    connection.close()

    def ask(self, kind: str, key: object = None, body: bytes = b"") -> Frame:
        with self.asked(kind, key, body) as connection:
            return receive(connection)

    def asked(self, kind: str, key: object = None, body: bytes = b"") -> socket.socket:
        """A connection on which the answer will come."""
        connection = connect(self.path)
        self.connections.append(connection)
        send(connection, Frame({"kind": kind, "key": key}, body))
        return connection

    def until_waiting(self, count: int) -> None:
        """Returns when so many requests are in the queue."""
        desk = self.desks[-1]
        with desk._changed:
            assert desk._changed.wait_for(lambda: len(desk._waiting) == count, timeout=20)
