"""A run under a fleet's clock: who takes part, whose reply is in time, and how long a round takes.

Bytes are those of the messages themselves, and of replies of clients that do not train
(``fedpeft.still``), so a round is decided before anybody trains: who will be late, drop out or not
be needed does not train at all, and what trains is batched as ever.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedpeft import sampling
from fedpeft.asynchrony import Pending, Windows, check_asynchronous
from fedpeft.comms.densities import alike
from fedpeft.comms.ledger import entries
from fedpeft.costs import Costs, labels_of
from fedpeft.engine import AbortedRoundError, Lost, RoundReport, Seam, play_round
from fedpeft.federation import Federation
from fedpeft.fleet.availability import BY_LABEL
from fedpeft.fleet.jobs import ABSENT, REASONS
from fedpeft.fleet.measures import gini, idle, jain, time_to
from fedpeft.fleet.simulator import Simulator, build
from fedpeft.message import Messages
from fedpeft.metrics import Score
from fedpeft.postprocess import Postprocessor
from fedpeft.prepare import Prepared
from fedpeft.still import Still
from fedpeft.streams import numpy_stream


@dataclass(frozen=True)
class FleetSummary:
    """What a run took by the fleet's clock.

    seconds: virtual time. idle: mean idle fraction of the rounds. wasted: share of the computation
    that counted for nothing. lost: jobs that did not count, by how they ended. in_flight: clients
    still at work at the end, whose updates are discarded. jain, gini: of how often clients' replies
    counted. joules: NaN where a device's power is not known; powers are assumptions. adapted:
    clients that train in another way to fit into memory. target, time_to_target: the accuracy asked
    for, and when it was first measured (NaN: never). events, digest: of the event log, SHA-256.
    """

    seconds: float
    idle: float
    wasted: float
    lost: dict[str, int]
    in_flight: int
    jain: float
    gini: float
    joules: float
    adapted: int
    target: float
    time_to_target: float
    events: int
    digest: str


class Timed:
    """The fleet of a run. ``line`` is what the last round was, for the record."""

    def __init__(self, prepared: Prepared) -> None:
        recipe, roster = prepared.recipe, prepared.population.clients.roster
        self._prepared = prepared
        self._names = roster.names
        self._sampled = max(1, round(sampling.expected(recipe.rounds.sampling, len(roster))))
        concurrency = recipe.fleet.concurrency or self._sampled
        settings = dataclasses.replace(recipe.fleet, concurrency=concurrency)
        labels = labels_of(prepared) if settings.availability in BY_LABEL else None
        self.fleet: Simulator = build(settings, recipe.seed, roster.numbers, labels)
        self._costs = Costs(prepared, self.fleet)
        self._still = Still(dataclasses.replace(prepared))
        self._windows: Windows | None = None
        if settings.asynchronous:
            check_asynchronous(prepared, len(roster), concurrency)
            self._windows = Windows(prepared, self.fleet, self._costs, self._still)
        self._there = np.ones(len(roster), bool)
        self.line: dict[str, Any] = {}

    @staticmethod
    def of(prepared: Prepared) -> Timed | None:
        """None where the recipe has no fleet."""
        return None if prepared.recipe.fleet.preset == "none" else Timed(prepared)

    def begin(
        self, state: Any, number: int, drawn: tuple[str, ...] | None = None
    ) -> tuple[str, ...]:
        """Who is asked in round ``number``, sorted; drawn: where that is not for the fleet to say.

        Asynchronously: who begins before the server goes on, which is played here.
        """
        self._there = self.fleet.begin(number)
        if self._windows is not None:
            return self._windows.begin(state, number, self._there)
        return self._draw(number) if drawn is None else drawn

    def play(
        self,
        state: Any,
        federation: Federation,
        number: int,
        names: tuple[str, ...],
        post: Postprocessor,
    ) -> tuple[Any, RoundReport]:
        """One round of those that ``begin`` named; see ``fedpeft.engine.play_round``."""
        if self._windows is not None:
            try:
                return self._windows.play(state, federation, number, names, post)
            finally:
                self.line = self._windows.line
        recipe, strategy = self._prepared.recipe, self._prepared.strategy
        wanted = self._sampled if recipe.fleet.policy == "over_select" else 0
        turn = _Turn(self, number, wanted)
        seam = Seam(post, names, turn, min(wanted, len(names)))
        try:
            after, report = play_round(
                strategy, state, federation, recipe.rounds, recipe.seed, number, seam
            )
        except AbortedRoundError:
            self.line = turn.line({})
            raise
        times = {n: t for n, t in turn.times.items() if n not in report.excluded}
        self.fleet.deliver(self._positions(list(times)))
        self.line = turn.line(times)
        if not times:
            return after, report
        post.told(times)
        return strategy.told(after, times), report

    def measured(self, score: Score) -> None:
        """Notes a score of the global test set, as of now."""
        self.fleet.books.curve.append((self.fleet.clock.now, score.accuracy))

    def summary(self) -> FleetSummary:
        """What the run took so far."""
        fleet, books = self.fleet, self.fleet.books
        total, count = books.waits
        target = fleet.settings.target
        return FleetSummary(
            seconds=fleet.clock.now,
            idle=total / count if count else math.nan,
            wasted=books.wasted / books.compute if books.compute else 0.0,
            lost=dict(sorted(books.lost.items())),
            in_flight=len(fleet.buffered.flights),
            jain=jain(books.delivered),
            gini=gini(books.delivered),
            joules=books.energy,
            adapted=self._costs.adapted,
            target=target,
            time_to_target=time_to(books.curve, target) if target else math.nan,
            events=fleet.clock.count,
            digest=fleet.clock.digest,
        )

    def memory(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        own = {} if self._windows is None else self._windows.memory()
        return {"fleet": self.fleet.memory(), "pending": own}

    def restore(
        self, memory: Mapping[str, Any], kept: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    ) -> None:
        """Puts back what ``memory`` gave; kept: what clients keep, of the same checkpoint."""
        self.fleet.restore(memory["fleet"])
        self._still.restore({c: {n: dict(t) for n, t in own.items()} for c, own in kept.items()})
        if self._windows is not None:
            self._windows.pending = {n: Pending.restored(p) for n, p in memory["pending"].items()}

    def _draw(self, number: int) -> tuple[str, ...]:
        """As ``sampling.draw`` does, of the clients that are there."""
        recipe, fleet = self._prepared.recipe, self.fleet
        kind, there = recipe.rounds.sampling.kind, np.flatnonzero(self._there)
        if kind in ("poisson", "cyclic"):
            roster = self._prepared.population.clients.roster
            drawn = sampling.draw(recipe.rounds.sampling, roster, recipe.seed, number)
            return tuple(n for n in drawn if self._there[self._names.find(n)])
        size = self._sampled
        if fleet.settings.policy == "over_select":
            size = math.ceil(size * fleet.settings.overcommit)
        stream = numpy_stream(recipe.seed, "sampling", number)
        index = stream.choice(len(there), size=min(size, len(there)), replace=False)
        return tuple(self._names[i] for i in there[np.sort(index)].tolist())

    def _positions(self, names: Sequence[str]) -> np.ndarray:
        return np.array([self._names.find(name) for name in names], np.int64)


class _Turn:
    """A round that waits for its clients; see ``fedpeft.engine.Timing``.

    times: client -> seconds from the round's begin to its last reply, of those that are in time.
    """

    def __init__(self, timed: Timed, number: int, wanted: int) -> None:
        self._timed, self._number, self._wanted = timed, number, wanted
        self._began, self._exchange = timed.fleet.clock.now, 0
        self._dropped: dict[str, str] = {}
        books = timed.fleet.books
        self._computed, self._wasted = books.compute, books.wasted
        self.times: dict[str, float] = {}

    def lost(self, state: Any, sent: Sequence[Messages]) -> dict[str, Lost]:
        timed, fleet = self._timed, self._timed.fleet
        names = [name for stack in sent for name in stack.clients]
        at, first = timed._positions(names), self._exchange == 0
        self._exchange += 1
        down, up = self._bytes(sent, names)
        away = ~timed._there[at] if first else np.zeros(len(at), bool)
        found = {names[k]: Lost(REASONS[ABSENT], False) for k in np.flatnonzero(away)}
        fleet.books.miss([ABSENT] * len(found))
        self._dropped |= dict.fromkeys(found, ABSENT)
        here = np.flatnonzero(~away)
        work = timed._costs.nothing(at[here])
        if first:
            efforts = timed._prepared.strategy.efforts(state, names)
            numbers = {timed._names.find(name): one for name, one in efforts.items()}
            work = timed._costs.of(at[here], numbers)
        spent = fleet.clock.now - self._began
        jobs = fleet.jobs(at[here], self._number, down[here], up[here], work)
        ends = fleet.wait(jobs, self._number, first, spent, self._wanted if first else 0)
        came, self.times = jobs.arrived(ends.time), {}
        for k, kind, time, part in zip(here, ends.kind, ends.time, came, strict=True):
            if kind == "delivered":
                self.times[names[k]] = spent + float(time)
            else:
                found[names[k]] = Lost(REASONS[str(kind)], str(kind) != "before", int(part))
                self._dropped[names[k]] = str(kind)
        return found

    def line(self, times: Mapping[str, float]) -> dict[str, Any]:
        """The round for the record; times: of the replies that counted."""
        fleet, seconds = self._timed.fleet, self._timed.fleet.clock.now - self._began
        computed = fleet.books.compute - self._computed
        waiting = idle(np.array(list(times.values())), seconds)
        fleet.books.wait(waiting)
        return {
            "time": fleet.clock.now,
            "seconds": seconds,
            "idle": waiting,
            "wasted": (fleet.books.wasted - self._wasted) / computed if computed else 0.0,
            "dropped": dict(sorted(self._dropped.items())),
            "times": dict(sorted(times.items())),
            "digest": fleet.clock.digest,
        }

    def _bytes(self, sent: Sequence[Messages], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Of each client's message and of its reply, in the order of ``names``."""
        down, up = dict[str, int](), dict[str, int]()
        for stack in sent:
            for entry in entries(stack):
                down.update(dict.fromkeys(entry.clients, sum(entry.each.values())))
            for part in alike(stack):
                size = reply_bytes(self._timed._still, self._number, part)
                up.update(dict.fromkeys(part.clients, size))
        return np.array([down[n] for n in names]), np.array([up[n] for n in names])


def reply_bytes(still: Still, number: int, sent: Messages) -> int:
    """Bytes of one client's reply to ``sent``."""
    [entry] = entries(still.reply(number, sent))
    return sum(entry.each.values())
