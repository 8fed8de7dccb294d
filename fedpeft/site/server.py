"""The resident process: it listens, queues, and sees to it that a worker is there.

It holds neither model nor data, and loads no torch: what may crash or grow is the worker. Where a
worker dies over a message, whoever waits for the answer is told at once, and another worker is
started, later and later as long as they die. One that has grown beyond its memory is exchanged
between two messages; what a client keeps is on disk by then (``state``).
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedpeft.errors import FedpeftError
from fedpeft.site.desk import Desk, Request, refusal
from fedpeft.site.frames import (
    Ended,
    Frame,
    FrameError,
    check_greeting,
    check_peer,
    greeting,
    receive,
    send,
)
from fedpeft.site.worker import FatalError, Worker

TALK_SECONDS = 120.0
"""For a process to say what it wants, once it is connected, and to take its answer."""

ENDING = "the site process is ending, and the request is lost: ask again when it is back."

Say = Callable[[str], None]


def backoff(failures: int) -> float:
    """Seconds before the next worker, after so many that died one after another."""
    return min(60.0, 0.25 * 2.0**failures)


@dataclass(frozen=True)
class Limits:
    """queue: requests that may wait. memory: resident bytes of a worker between two messages.

    grace: seconds that the message under way has when the process is asked to end.
    """

    queue: int = 8
    memory: int = 0
    grace: float = 60.0


class Resident:
    """Serves a listening socket until it is told to stop.

    start: makes a worker. say: called with each line for the log. delay: see ``backoff``.
    """

    def __init__(
        self,
        listener: socket.socket,
        start: Callable[[], Worker],
        limits: Limits,
        say: Say,
        delay: Callable[[int], float] = backoff,
    ) -> None:
        self._listener = listener
        self._start = start
        self._limits = limits
        self._say = say
        self._delay = delay
        self._desk = Desk(limits.queue)
        self._worker: Worker | None = None
        self._failures = 0
        self._fatal = ""
        self._stopping = threading.Event()
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)  # a signal's handler waits for nothing
        self._talks: set[threading.Thread] = set()

    def serve(self) -> None:
        """Returns after ``stop``. Raises FedpeftError where no worker can be started at all."""
        dispatcher = threading.Thread(target=self._dispatch, name="dispatcher", daemon=True)
        dispatcher.start()
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._stopping.is_set():
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._wake.recv(1)
        self._listener.close()
        self._desk.close(ENDING)
        dispatcher.join(self._limits.grace)
        self.kill()
        dispatcher.join()
        for talk in list(self._talks):
            talk.join(1.0)
        self._wake.close()
        self._waker.close()
        if self._fatal:
            raise FedpeftError(self._fatal)

    def stop(self) -> None:
        """Ends ``serve``, after the message under way; may be called by a signal's handler."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def kill(self) -> None:
        """Ends the worker now, and the message under way with it."""
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        talk = threading.Thread(target=self._talk, args=(connection,), daemon=True)
        self._talks = {other for other in self._talks if other.is_alive()} | {talk}
        talk.start()

    def _talk(self, connection: socket.socket) -> None:
        """One request of one process, and its answer."""
        with connection:
            connection.settimeout(TALK_SECONDS)
            try:
                check_peer(connection)
                theirs = receive(connection, head_limit=4096, body_limit=0)
                send(connection, greeting())
                check_greeting(theirs, "a message's process")
                send(connection, self._answered(receive(connection)))
            except Ended:  # a look whether somebody listens, or a process that Flower ended
                return
            except (OSError, FedpeftError) as error:
                self._say(f"a connection was dropped: {error}")

    def _answered(self, frame: Frame) -> Frame:
        try:
            request = self._desk.submit(frame)
        except FedpeftError as error:
            return refusal(str(error))
        request.done.wait()
        assert request.answer is not None, "it is done"
        return request.answer

    def _dispatch(self) -> None:
        """Gives the worker one request after another."""
        try:
            while self._ready() and (request := self._desk.next()) is not None:
                if self._ready():
                    self._serve_one(request)
                else:
                    self._desk.finish(request, refusal(ENDING), lasts=False)
        except FatalError as error:
            self._fatal = str(error)
            self._desk.close(ENDING)
            self.stop()
        finally:
            if self._worker is not None:
                self._worker.end()

    def _ready(self) -> bool:
        """Whether a worker is there; starts one where it has to. False when stopping."""
        while not self._stopping.is_set():
            if self._worker is not None and self._worker.alive():
                return True
            if self._worker is not None:
                self._lost("between two messages")
            self._stopping.wait(self._delay(self._failures) if self._failures else 0.0)
            if self._stopping.is_set():
                break
            self._worker = self._start()
            try:
                self._worker.wait_ready()
                self._say(f"worker {self._worker.pid} is ready")
            except (OSError, FrameError):
                self._lost("before it was ready")
                self._desk.drop_waiting("the site's worker does not start: see the site's log.")
        return False

    def _lost(self, when: str) -> int:
        assert self._worker is not None
        code, self._worker = self._worker.end(), None
        self._failures += 1
        self._say(f"the worker ended with {code} {when}; the next one follows")
        return code

    def _serve_one(self, request: Request) -> None:
        assert self._worker is not None
        what, began = describe(request.frame), time.monotonic()
        try:
            answer = self._worker.ask(request.frame)
        except (OSError, FrameError):
            code = self._lost(f"over {what}")
            why = f"the site's worker ended with {code} over this request, which is lost."
            self._desk.finish(request, refusal(why), lasts=False)
            return
        self._failures = 0
        self._desk.finish(request, answer)
        size, seconds = self._worker.memory(), time.monotonic() - began
        outcome = answer.head.get("error", "answered")
        self._say(f"{what}: {outcome}, {seconds:.2f} s, {size / 2**20:.0f} MiB")
        if self._limits.memory and size > self._limits.memory:
            self._say(
                f"the worker has grown beyond {self._limits.memory / 2**20:.0f} MiB: another one "
                f"takes its place. Where that happens after every message, raise --memory"
            )
            self._worker.end()
            self._worker = None


def describe(frame: Frame) -> str:
    """A request, for the log."""
    kind, key = frame.head.get("kind"), frame.head.get("key")
    if isinstance(key, list) and len(key) > 2 and key[2]:
        return f"{kind} of round {key[2]}"
    return str(kind)
