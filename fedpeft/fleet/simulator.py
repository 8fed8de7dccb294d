"""The fleet of a run: its devices, links and availability under one clock, and its books."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedpeft.errors import FedpeftError
from fedpeft.fleet import lookalike, traces
from fedpeft.fleet.availability import Availability, Labels, Traced, by_round
from fedpeft.fleet.buffered import Buffered, Window
from fedpeft.fleet.clock import Clock
from fedpeft.fleet.draws import Draws
from fedpeft.fleet.jobs import DELIVERED, Ends, Jobs, alone, breaks
from fedpeft.fleet.measures import Books
from fedpeft.fleet.network import LINKS, Network, gilbert, grouped, uniform
from fedpeft.fleet.profiles import JETSON80, TRANSMIT
from fedpeft.fleet.rounds import waited
from fedpeft.fleet.settings import Fleet
from fedpeft.fleet.speed import (
    FLASH,
    FLASH_CLASSES,
    Peaks,
    PerBatch,
    PerExample,
    Speed,
    Work,
    mixed,
    slowness,
)

SOME = 500
"""Clients of a synthetic look-alike of traces."""


@dataclass
class Simulator:
    """N clients' devices. ``clock`` and ``books`` are what has been; the rest does not change.

    usable: who has memory enough to train, bool ``[N]``.
    """

    settings: Fleet
    seed: int
    count: int
    speed: Speed
    network: Network
    availability: Availability
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.usable = np.ones(self.count, bool)
        self.books = Books.of(self.count)
        self.bad = np.zeros(self.count, bool)
        self._weather, self._dropouts = Draws(self.seed, "weather"), Draws(self.seed, "dropout")
        settings = self.settings
        eager = settings.policy == "fedbuff"
        self.buffered = Buffered(
            self.clock, settings.buffer, settings.concurrency, eager, settings.max_staleness
        )

    def begin(self, round: int) -> np.ndarray:
        """Who can take part in the round that begins: bool ``[N]``.

        Where nobody can, the clock goes on to when somebody does, if time alone decides.
        """
        if self.settings.bad_spells:
            self.bad = gilbert(self.bad, round, self._weather)
        there = self.availability.there(self.clock.now, round) & self.usable
        if there.any() or self.buffered.flights:
            return there
        soon = self.availability.next(self.clock.now, self.usable)
        if math.isnan(soon):
            return there
        if math.isinf(soon):
            raise FedpeftError(
                f"fleet.trace={self.settings.trace!r}: nobody who can train is ever there. Give "
                f"another trace, or devices with more memory."
            )
        self.clock.forward(soon)
        return self.availability.there(self.clock.now, round) & self.usable

    def jobs(
        self, clients: np.ndarray, round: int, down: np.ndarray, up: np.ndarray, work: Work
    ) -> Jobs:
        """The jobs of K clients that are sent and reply so many bytes (``[K]`` each)."""
        bad = self.bad[clients]
        seconds = self.network.seconds(clients, round, down, up, bad)
        compute = self.speed.seconds(clients, round, work)
        load = np.full(len(clients), self.settings.load)
        return Jobs(clients, seconds[0], load, compute, seconds[1], up)

    def alone(self, jobs: Jobs, round: int, first: bool = True) -> Ends:
        """How jobs that begin now end by themselves; ``first``: of a round's exchanges."""
        chance = self.settings.dropout if first else 0.0
        broken = breaks(jobs, chance, self.settings.stage, self._dropouts, round)
        left = self.availability.until(jobs.clients, self.clock.now) - self.clock.now
        return alone(jobs, broken, left)

    def wait(self, jobs: Jobs, round: int, first: bool, spent: float, wanted: int) -> Ends:
        """Plays an exchange of a round that waits, and moves the clock on.

        spent: seconds of the round so far. wanted: go on with the first so many replies (0: all).
        """
        limit = self.settings.deadline or math.inf
        if self.settings.policy == "sync":
            limit = math.inf
        ends, lasts = waited(jobs, self.alone(jobs, round, first), limit - spent, wanted)
        began = self.clock.now
        for client in jobs.clients:
            self.clock.log("start", int(client))
        for client, kind, time in zip(jobs.clients, ends.kind, ends.time, strict=True):
            self.clock.at(began + float(time), str(kind), int(client))
        while self.clock.step() is not None:
            pass
        self.clock.forward(began + lasts)
        done = jobs.computed(ends.time)
        self.books.busy[jobs.clients] += ends.time
        self.books.compute += float(done.sum())
        self.books.wasted += float(done[~ends.good].sum())
        self.books.miss([str(kind) for kind in ends.kind[~ends.good]])
        self.charge(jobs, ends, round)
        return ends

    def charge(self, jobs: Jobs, ends: Ends, round: int) -> None:
        """Adds the energy of jobs to the totals."""
        done = jobs.computed(ends.time)
        moved = np.clip(ends.time - done - jobs.load, 0.0, None)
        watts = self.speed.watts(jobs.clients, round)
        self.books.energy += float((watts * done + TRANSMIT * moved).sum())

    def land(self, window: Window) -> None:
        """Adds what ended in a window to the totals."""
        for one in window.landed:
            self.books.busy[one.client] += one.seconds
            self.books.compute += one.computed
            if one.kind != DELIVERED:
                self.books.wasted += one.computed
                self.books.miss([one.kind])

    def deliver(self, clients: np.ndarray) -> None:
        """Notes whose replies counted; a client may be named twice."""
        np.add.at(self.books.delivered, clients, 1)

    def idle_of(self, window: Window, began: float) -> float:
        """Share of a window that the clients at work could have worked, and did not."""
        most = self.buffered.concurrency * (self.clock.now - began)
        return 1.0 - window.busy / most if most > 0 else math.nan

    def memory(self) -> dict[str, Any]:
        """What has been, as plain values and tensors, for a checkpoint."""
        flights = [(client, *own) for client, own in self.buffered.flights.items()]
        return {
            "clock": self.clock.memory(),
            "books": self.books.memory(),
            "flights": flights,
            "bad": torch.from_numpy(self.bad.copy()),
        }

    def restore(self, memory: dict[str, Any]) -> None:
        """Puts back what ``memory`` gave."""
        self.clock.restore(memory["clock"])
        self.books = Books.restored(memory["books"])
        self.buffered.flights = {c: (v, t, s) for c, v, t, s in memory["flights"]}
        self.bad = memory["bad"].numpy()


def build(settings: Fleet, seed: int, examples: np.ndarray, labels: Labels | None) -> Simulator:
    """The fleet of clients with so many ``examples``, int64 ``[N]``; labels where they have any."""
    count = len(examples)
    return Simulator(
        settings,
        seed,
        count,
        _speed(settings, seed, count),
        _network(settings, seed, count),
        _availability(settings, seed, examples, labels),
    )


def _speed(settings: Fleet, seed: int, count: int) -> Speed:
    devices, modes = Draws(seed, "devices"), Draws(seed, "speed")
    factor = slowness(settings.sigma, count, Draws(seed, "slowness"))
    if settings.preset == "flash":
        drawn = devices.uniforms(np.arange(count), 0)[:, 0]
        which = np.searchsorted(np.cumsum(FLASH_CLASSES[:-1]), drawn, side="right")
        table = np.array(FLASH[settings.workload])[which] / 1e3 * factor[:, None]
        return PerBatch(table[:, 0], table[:, 1], modes)
    if settings.preset == "fedscale":
        return PerExample(_capacities(settings, seed, count)[0] * factor)
    shares: dict[str, int] = {str(settings.preset): 1}
    if settings.preset == "jetson80":
        shares = JETSON80
    profiles, kind = mixed(shares, count, devices)
    return Peaks(
        tuple(profiles),
        kind,
        factor,
        modes,
        settings.utilization,
        settings.redraw,
        settings.roofline,
    )


def _network(settings: Fleet, seed: int, count: int) -> Network:
    draws, name = Draws(seed, "network"), settings.network
    if name == "auto" and settings.preset == "fedscale":
        rate = _capacities(settings, seed, count)[1]
        return Network(rate, rate, np.zeros(count), draws, jitter=0.0)
    if name == "groups" or (name == "auto" and settings.preset == "jetson80"):
        return grouped(count, draws)
    return uniform(LINKS["wifi" if name == "auto" else name], count, draws)


def _capacities(settings: Fleet, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds per example and bits per second of every client; devices are drawn from the file."""
    found = (
        traces.read_json(settings.capacities, "fleet.capacities")
        if settings.capacities
        else lookalike.capacities(seed, SOME)
    )
    each, rate = traces.capacities(found, "fleet.capacities")
    drawn = Draws(seed, "devices").uniforms(np.arange(count), 0)[:, 0]
    which = (drawn * len(each)).astype(np.int64)
    return each[which], rate[which]


def _availability(
    settings: Fleet, seed: int, examples: np.ndarray, labels: Labels | None
) -> Availability:
    if settings.availability != "trace":
        draws = Draws(seed, "availability")
        return by_round(settings.availability, settings.beta, examples, draws, labels)
    found = (
        traces.read_json(settings.trace, "fleet.trace")
        if settings.trace
        else lookalike.availabilities(seed, SOME)
    )
    return Traced(traces.availabilities(found, "fleet.trace")[: len(examples)], len(examples))
