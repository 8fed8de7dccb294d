"""The virtual clock: a heap of events, and a log of which only the SHA-256 is kept."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpeft.errors import FedpeftError


@dataclass(order=True, frozen=True)
class Event:
    """Something that will happen: at ``time`` seconds, ties in the order of ``seq``.

    client: whose. version: of the server's model that the client began with.
    """

    time: float
    seq: int
    kind: str = field(compare=False)
    client: int = field(compare=False)
    version: int = field(compare=False, default=0)


@dataclass
class Clock:
    """Seconds since the run began, and what is still to come.

    digest: SHA-256 chained over all events so far, in the order in which they happened: equal runs
    have equal digests. heard: is told of every event.
    """

    now: float = 0.0
    count: int = 0
    digest: str = ""
    heard: Callable[[float, str, int], None] | None = None
    _heap: list[Event] = field(default_factory=list)
    _seq: int = 0

    def at(self, time: float, kind: str, client: int, version: int = 0) -> None:
        """Plans an event. Raises FedpeftError for a time before now."""
        if not time >= self.now:
            raise FedpeftError(
                f"the fleet's clock stands at {self.now} s, and {kind} of client {client} would "
                f"be at {time} s: durations must be numbers of at least 0."
            )
        heapq.heappush(self._heap, Event(time, self._seq, kind, client, version))
        self._seq += 1

    def step(self) -> Event | None:
        """The next event, which happens now; None where nothing is to come."""
        if not self._heap:
            return None
        event = heapq.heappop(self._heap)
        self.now = event.time
        self.log(event.kind, event.client)
        return event

    def log(self, kind: str, client: int = -1) -> None:
        """Notes an event of this moment."""
        line = f"{self.digest} {self.now!r} {kind} {client}"
        self.digest = hashlib.sha256(line.encode()).hexdigest()
        self.count += 1
        if self.heard is not None:
            self.heard(self.now, kind, client)

    def forward(self, time: float) -> None:
        """Nothing happens until ``time``; a time that is past leaves the clock as it is.

        Raises FedpeftError where an event would be jumped over.
        """
        if self._heap and self._heap[0].time < time:
            raise FedpeftError(f"the clock cannot jump to {time} s over {self._heap[0]}")
        self.now = max(self.now, time)

    @property
    def waiting(self) -> list[Event]:
        """What is to come, in order."""
        return sorted(self._heap)

    def memory(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        events = [(e.time, e.seq, e.kind, e.client, e.version) for e in self.waiting]
        return {
            "now": self.now,
            "count": self.count,
            "digest": self.digest,
            "seq": self._seq,
            "events": events,
        }

    def restore(self, memory: dict[str, Any]) -> None:
        """Puts back what ``memory`` gave."""
        self.now, self.count = memory["now"], memory["count"]
        self.digest, self._seq = memory["digest"], memory["seq"]
        self._heap = [Event(*own) for own in memory["events"]]
        heapq.heapify(self._heap)


def ints(values: object) -> np.ndarray:
    """Client numbers as int64 ``[K]``."""
    return np.asarray(values, np.int64)
