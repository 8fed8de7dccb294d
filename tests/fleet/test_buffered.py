"""FedBuff's windows: nothing is lost, nobody works twice at once, equal speeds are rounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpeft.fleet.buffered import Buffered, Window
from fedpeft.fleet.clock import Clock
from fedpeft.fleet.jobs import DELIVERED, STALE, Breaks, Ends, Jobs, alone


def begin_with(seconds: np.ndarray, dropping: set[int] = frozenset()):  # type: ignore[no-untyped-def,assignment]
    """Jobs whose computation takes so long; some clients drop out half way."""

    def begin(clients: np.ndarray) -> tuple[Jobs, Ends]:
        none = np.zeros(len(clients))
        jobs = Jobs(clients, none, none, seconds[clients], none, none)
        out = np.array([int(c) in dropping for c in clients])
        at = Breaks(np.where(out, 0.5 * jobs.total, np.inf), np.full(len(clients), "compute"))
        return jobs, alone(jobs, at, np.full(len(clients), np.inf))

    return begin


def windows(
    policy: Buffered, seconds: np.ndarray, count: int, dropping: set[int] | None = None
) -> list[Window]:
    order, begin = np.arange(len(seconds)), begin_with(seconds, dropping or set())
    return [policy.window(number, order, begin) for number in range(1, count + 1)]


@pytest.mark.parametrize("eager", [True, False])
def test_equal_speeds_are_synchronous_rounds(eager: bool) -> None:
    found = windows(Buffered(clock := Clock(), 6, 6, eager), np.full(6, 2.0), 5)
    for number, window in enumerate(found, start=1):
        assert window.started == tuple(range(6))
        assert [(a.client, a.version) for a in window.arrived] == [(k, number) for k in range(6)]
    assert clock.now == 10.0


@pytest.mark.parametrize(("eager", "most"), [(True, 0), (False, 0), (True, 2)])
def test_what_was_started_has_arrived_was_lost_or_is_under_way(eager: bool, most: int) -> None:
    seconds = np.random.default_rng(0).lognormal(0, 1.5, 20)
    policy = Buffered(Clock(), 4, 9, eager, most)
    found = windows(policy, seconds, 40, {3, 11})
    started = sum(len(w.started) for w in found)
    landed = sum(len(w.landed) for w in found)
    assert started == landed + len(policy.flights)
    assert landed == sum(len(w.arrived) for w in found) + sum(
        one.kind != DELIVERED for w in found for one in w.landed
    )
    for number, window in enumerate(found, start=1):
        assert len(window.arrived) == 4 and len(set(window.started)) == len(window.started)
        staleness = [number - a.version for a in window.arrived]
        assert min(staleness) >= 0 and (not most or max(staleness) <= most)
        assert {a.client for a in window.arrived}.isdisjoint({3, 11})
    assert not most or any(STALE in w.lost.values() for w in found)


def test_no_client_has_two_jobs_at_once_and_so_many_work_at_all_times() -> None:
    seconds = np.random.default_rng(1).lognormal(0, 1.0, 30)
    clock, at_work, most = Clock(), set[int](), list[int]()

    def heard(time: float, kind: str, client: int) -> None:
        if kind == "start":
            assert client not in at_work
            at_work.add(client)
        else:
            at_work.remove(client)
        most.append(len(at_work))

    clock.heard = heard
    windows(Buffered(clock, 3, 8), seconds, 30)
    assert max(most) == 8


def test_fast_clients_come_more_often_and_the_server_waits_less() -> None:
    seconds = np.where(np.arange(10) < 5, 1.0, 10.0)
    clock = Clock()
    found = windows(Buffered(clock, 5, 10), seconds, 20)
    counts = np.bincount([a.client for w in found for a in w.arrived], minlength=10)
    assert counts[:5].min() > 3 * counts[5:].max()
    assert clock.now < 20 * 10.0 / 3


def test_semi_asynchronous_clients_begin_only_when_the_server_has_gone_on() -> None:
    clock, starts = Clock(), list[float]()
    clock.heard = lambda time, kind, client: starts.append(time) if kind == "start" else None
    ends = []
    policy = Buffered(clock, 2, 4, eager=False)
    begin = begin_with(np.array([1.0, 2.0, 3.0, 4.0]))
    for number in range(1, 6):
        policy.window(number, np.arange(4), begin)
        ends.append(clock.now)
    assert set(starts) <= {0.0, *ends}


def test_a_buffer_that_cannot_fill_is_handed_over_as_it_is() -> None:
    [window] = windows(Buffered(Clock(), 4, 4), np.ones(4), 1, {0, 1, 2})
    assert len(window.arrived) == 1 and set(window.lost) == {0, 1, 2}
    assert math.isclose(window.busy, 3 * 0.5 + 1.0)
