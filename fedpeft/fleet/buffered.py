"""Asynchronous rounds: the server goes on whenever so many replies are in its buffer.

FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639): so many clients train at all times, each
from the model of the moment when it began; a client that is done makes room for another at once.
Semi-asynchronous: others begin only when the server has gone on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedpeft.fleet.clock import Clock, Event
from fedpeft.fleet.jobs import DELIVERED, STALE, Ends, Jobs


@dataclass(frozen=True)
class Arrival:
    """A reply in the buffer: whose, of which version, how many seconds it took."""

    client: int
    version: int
    seconds: float


@dataclass(frozen=True)
class Landing:
    """A job that has ended: how, how many seconds it took, and computed."""

    client: int
    kind: str
    seconds: float
    computed: float


@dataclass(frozen=True)
class Window:
    """From one version of the server's model to the next.

    started: clients that began, in order. parts: their jobs, and how they end. arrived: the buffer.
    lost: client -> how its job ended. landed: all that ended. busy: seconds that clients were at
    work, all together.
    """

    started: tuple[int, ...]
    parts: tuple[tuple[Jobs, Ends], ...]
    arrived: tuple[Arrival, ...]
    lost: dict[int, str]
    landed: tuple[Landing, ...]
    busy: float


Begin = Callable[[np.ndarray], tuple[Jobs, Ends]]
"""What clients numbered so would be asked now, and how their jobs would end."""


@dataclass
class Buffered:
    """The policy's own state.

    size: replies in a full buffer, K. concurrency: clients at work. eager: others begin as soon as
    one is done. most: the staleness at which a reply is thrown away (0: none is).
    flights: client -> (version, when it began, seconds that it will compute), of those at work.
    """

    clock: Clock
    size: int
    concurrency: int
    eager: bool = True
    most: int = 0
    flights: dict[int, tuple[int, float, float]] = field(default_factory=dict)

    def window(self, version: int, order: np.ndarray, begin: Begin) -> Window:
        """Plays until the buffer is full, or nothing is to come.

        order: clients that may begin, in the order in which they are asked. Nobody begins twice
        from the same version: it would compute the same again.
        """
        waiting = [int(client) for client in order if int(client) not in self.flights]
        later = [int(client) for client in order if int(client) in self.flights]
        parts, arrived = list[tuple[Jobs, Ends]](), list[Arrival]()
        lost, landed = dict[int, str](), list[Landing]()
        before, busy = self.clock.now, 0.0
        self._fill(version, waiting, begin, parts)
        while len(arrived) < self.size:
            at_work, event = len(self.flights), self.clock.step()
            if event is None:
                break
            busy += at_work * (event.time - before)
            before = event.time
            landed.append(self._land(event, version, arrived, lost))
            if event.client in later:
                later.remove(event.client)
                waiting.append(event.client)
            if self.eager and len(arrived) < self.size:
                self._fill(version, waiting, begin, parts)
        started = tuple(int(c) for jobs, _ in parts for c in jobs.clients)
        return Window(started, tuple(parts), tuple(arrived), lost, tuple(landed), busy)

    def _fill(
        self, version: int, waiting: list[int], begin: Begin, parts: list[tuple[Jobs, Ends]]
    ) -> None:
        """Others begin, as many as there is room for."""
        room = self.concurrency - len(self.flights)
        if room <= 0 or not waiting:
            return
        clients = np.array(sorted(waiting[:room]), np.int64)
        del waiting[:room]
        jobs, ends = begin(clients)
        parts.append((jobs, ends))
        computed = jobs.computed(ends.time)
        for client, kind, time, done in zip(clients, ends.kind, ends.time, computed, strict=True):
            self.clock.log("start", int(client))
            self.flights[int(client)] = (version, self.clock.now, float(done))
            self.clock.at(self.clock.now + float(time), str(kind), int(client), version)

    def _land(
        self, event: Event, version: int, arrived: list[Arrival], lost: dict[int, str]
    ) -> Landing:
        """A job has ended."""
        _, began, computed = self.flights.pop(event.client)
        kind, seconds = event.kind, event.time - began
        if kind == DELIVERED and self.most and version - event.version > self.most:
            kind = STALE
        if kind == DELIVERED:
            arrived.append(Arrival(event.client, event.version, seconds))
        else:
            lost[event.client] = kind
        return Landing(event.client, kind, seconds, computed)
