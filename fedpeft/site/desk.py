"""The requests that wait at a site, and the answers of late.

Flower may start two processes for one message: both get the answer that is computed once, the
second also where it comes after the first was answered.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from fedpeft.errors import FedpeftError
from fedpeft.site.frames import Frame

KEPT = 8
"""Answers that are kept for processes that come late, at most."""

KEPT_BYTES = 256 * 2**20
"""Their bytes, at most; the newest is kept whatever its size."""


@dataclass
class Request:
    """A request, its answer once there is one, and how many wait for that."""

    frame: Frame
    key: str | None
    answer: Frame | None = None
    done: threading.Event = field(default_factory=threading.Event)


def refusal(reason: str) -> Frame:
    """An answer that is an error; the reason leaves the site."""
    return Frame({"error": f"FedpeftError: {reason}"})


class Desk:
    """At most ``bound`` requests wait, besides the one under way. For several threads."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._open: dict[str, Request] = {}
        self._answered: OrderedDict[str, Request] = OrderedDict()
        self._closed = ""

    def submit(self, frame: Frame) -> Request:
        """The request of a frame, which may be one that is there already.

        Raises FedpeftError where too many wait, and where the site is ending.
        """
        key = frame.head.get("key")
        name = None if key is None else json.dumps(key)
        with self._changed:
            known = None if name is None else self._open.get(name) or self._answered.get(name)
            if known is not None:
                return known
            if self._closed:
                raise FedpeftError(self._closed)
            if len(self._waiting) >= self._bound:
                raise FedpeftError(
                    f"{len(self._waiting)} requests wait at this site, and --queue={self._bound}: "
                    f"ask again later, or raise --queue."
                )
            request = Request(frame, name)
            self._waiting.append(request)
            if name is not None:
                self._open[name] = request
            self._changed.notify_all()
            return request

    def next(self) -> Request | None:
        """The request that has waited longest; waits for one. None once the desk is closed."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting or self._closed))
            return self._waiting.popleft() if self._waiting else None

    def finish(self, request: Request, answer: Frame, lasts: bool = True) -> None:
        """Gives everybody who waits the answer. lasts: whether who asks again gets it too."""
        with self._changed:
            request.answer = answer
            if request.key is not None:
                self._open.pop(request.key, None)
                if lasts:
                    self._keep(request.key, request)
            request.frame = Frame({})  # the request's bytes are needed no more
        request.done.set()

    def drop_waiting(self, reason: str) -> None:
        """Refuses what waits."""
        with self._changed:
            dropped, self._waiting = list(self._waiting), deque()
        for request in dropped:
            self.finish(request, refusal(reason), lasts=False)

    def close(self, reason: str) -> None:
        """Refuses what waits and what comes; the request under way is not touched."""
        with self._changed:
            self._closed = reason
            self._changed.notify_all()
        self.drop_waiting(reason)

    def _keep(self, key: str, request: Request) -> None:
        self._answered[key] = request
        while len(self._answered) > 1 and (len(self._answered) > KEPT or self._size() > KEPT_BYTES):
            self._answered.popitem(last=False)

    def _size(self) -> int:
        return sum(len(r.answer.body) for r in self._answered.values() if r.answer is not None)
