"""How jobs end, what a round makes of them, and where every client's time goes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedpeft.fleet.draws import Draws
from fedpeft.fleet.jobs import DELIVERED, LATE, OFFLINE, SURPLUS, Breaks, Jobs, alone, breaks
from fedpeft.fleet.measures import gini, idle, jain, time_to
from fedpeft.fleet.rounds import waited
from fedpeft.fleet.settings import Fleet
from fedpeft.fleet.simulator import Simulator, build
from fedpeft.fleet.speed import Work

N = 30


def jobs(seed: int = 0, count: int = N) -> Jobs:
    """Random parts of seconds; replies of 1000 bytes."""
    parts = np.random.default_rng(seed).uniform(0.1, 3.0, (4, count))
    return Jobs(np.arange(count), *parts, np.full(count, 1000.0))


def never(count: int = N) -> Breaks:
    return Breaks(np.full(count, np.inf), np.full(count, "compute"))


FOREVER = np.full(N, np.inf)


def test_a_synchronous_round_takes_as_long_as_its_slowest() -> None:
    own = jobs()
    ends, lasts = waited(own, alone(own, never(), FOREVER))
    assert lasts == own.total.max() and ends.good.all() and (ends.time == own.total).all()
    assert idle(ends.time, lasts) == pytest.approx(1 - own.total.mean() / own.total.max())


def test_with_an_infinite_deadline_nobody_is_late() -> None:
    own = jobs()
    ends, lasts = waited(own, alone(own, never(), FOREVER), math.inf)
    assert ends.good.all() and lasts == own.total.max()


def test_at_a_deadline_who_is_late_is_dropped_and_the_round_ends() -> None:
    own = jobs()
    limit = float(np.median(own.total))
    ends, lasts = waited(own, alone(own, never(), FOREVER), limit)
    assert lasts == limit and (ends.good == (own.total <= limit)).all()
    assert set(ends.kind[~ends.good]) == {LATE} and ends.time.max() == limit
    some = own.arrived(ends.time)
    assert (some[ends.good] == 1000).all() and (some[~ends.good] < 1000).all()


def test_over_selection_keeps_exactly_the_first_m_of_those_who_are_there() -> None:
    own, gone = jobs(), never()
    gone.time[:5] = 0.0
    for m in (1, 10, 25):
        ends, lasts = waited(own, alone(own, gone, FOREVER), wanted=m)
        fastest = np.argsort(np.where(np.arange(N) < 5, np.inf, own.total))[:m]
        assert sorted(np.flatnonzero(ends.good)) == sorted(fastest)
        assert lasts == own.total[fastest].max() and ends.time.max() <= lasts
        assert set(ends.kind[~ends.good]) <= {SURPLUS, "compute"}
    ends, lasts = waited(own, alone(own, gone, FOREVER), wanted=26)
    assert ends.good.sum() == 25 and lasts == own.total[5:].max()


def test_of_equal_times_exactly_m_count() -> None:
    same = Jobs(np.arange(4), *np.ones((4, 4)), np.full(4, 10.0))
    ends, lasts = waited(same, alone(same, never(4), np.full(4, np.inf)), wanted=2)
    assert ends.good.tolist() == [True, True, False, False] and lasts == 4.0


def test_who_goes_offline_before_the_end_is_lost() -> None:
    own, left = jobs(), FOREVER.copy()
    left[3] = own.total[3] - 1e-6
    left[4] = own.total[4]
    ends = alone(own, never(), left)
    assert ends.kind[3] == OFFLINE and ends.time[3] == left[3] and ends.kind[4] == DELIVERED


@pytest.mark.parametrize("stage", ["any", "before", "compute", "upload"])
def test_dropouts_come_with_their_probability_at_a_uniform_place_of_their_stage(
    stage: Any,
) -> None:
    count = 6000
    own = jobs(1, count)
    found = breaks(own, 0.3, stage, Draws(0, "dropout"), 1)
    out = np.isfinite(found.time)
    assert abs(out.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count)
    ready, done = own.down + own.load, own.down + own.load + own.compute
    low = {"before": 0 * ready, "compute": ready, "upload": done}
    high = {"before": 0 * ready, "compute": done, "upload": own.total}
    for name in low if stage == "any" else [stage]:
        at = out & (found.stage == name)
        inside = (found.time >= low[name]) & (found.time <= high[name])
        assert inside[at].all() and at.sum() > (500 if stage == "any" else 1700)
        if name != "before":
            place = (found.time - low[name])[at] / (high[name] - low[name])[at]
            assert abs(place.mean() - 0.5) < 4 * math.sqrt(1 / 12 / at.sum())


def heavy(count: int) -> Work:
    return Work(*(np.full(count, 1e12) for _ in range(4)))


class Told:
    """Listens to a clock: each client's stretches of work, from the log alone."""

    def __init__(self, fleet: Simulator) -> None:
        self.since: dict[int, float] = {}
        self.spans: dict[int, list[tuple[float, float]]] = {}
        self.times: list[float] = []
        fleet.clock.heard = self

    def __call__(self, time: float, kind: str, client: int) -> None:
        self.times.append(time)
        if kind == "start":
            assert client not in self.since, "no client has two jobs at once"
            self.since[client] = time
        else:
            self.spans.setdefault(client, []).append((self.since.pop(client), time))


@pytest.mark.parametrize("policy", ["sync", "deadline", "over_select"])
def test_busy_idle_and_offline_add_up_to_the_makespan(policy: Any) -> None:
    settings = Fleet("jetson80", availability="trace", policy=policy, dropout=0.2, deadline=2000.0)
    fleet = build(settings, 0, np.full(N, 10), None)
    told = Told(fleet)
    for round in range(1, 13):
        there = np.flatnonzero(fleet.begin(round))
        size = np.full(len(there), 1e7)
        own = fleet.jobs(there, round, size, size, Work(*(np.full(len(there), 1e15),) * 4))
        fleet.wait(own, round, True, 0.0, max(1, len(there) // 2) if policy[0] == "o" else 0)
    end = fleet.clock.now
    assert told.times == sorted(told.times) and not told.since and end > 10_000
    for client in range(N):
        spans = told.spans.get(client, [])
        busy = sum(b - a for a, b in spans)
        online = fleet.availability.online(client, end)
        free = online - sum(
            fleet.availability.online(client, b) - fleet.availability.online(client, a)
            for a, b in spans
        )
        assert busy == pytest.approx(fleet.books.busy[client], abs=1e-6)
        assert busy + free + (end - online) == pytest.approx(end, rel=1e-9)
        assert free >= -1e-6


def test_equal_seeds_have_equal_logs_and_others_do_not() -> None:
    digests = []
    for seed in (1, 1, 2):
        fleet = build(Fleet("jetson80", dropout=0.3, bad_spells=True), seed, np.full(N, 10), None)
        for round in range(1, 6):
            there = np.flatnonzero(fleet.begin(round))
            size = np.full(len(there), 1e5)
            fleet.wait(fleet.jobs(there, round, size, size, heavy(len(there))), round, True, 0.0, 0)
        digests.append(fleet.clock.digest)
    assert digests[0] == digests[1] != digests[2]


def test_where_nobody_is_there_the_clock_goes_on_until_somebody_is() -> None:
    fleet = build(Fleet("jetson80", availability="trace"), 0, np.full(4, 10), None)
    there = fleet.begin(1)
    assert fleet.clock.now > 0 and there.any()


def test_fairness_and_time_to_a_score() -> None:
    assert jain(np.array([2, 2, 2])) == 1 and jain(np.array([6, 0, 0])) == pytest.approx(1 / 3)
    assert gini(np.array([2, 2, 2])) == pytest.approx(0)
    x = np.array([1, 5, 0, 3])
    pairs = np.abs(x[:, None] - x).sum() / (2 * 4 * x.sum())
    assert gini(x) == pytest.approx(pairs)
    assert math.isnan(gini(np.zeros(3))) and math.isnan(jain(np.zeros(3)))
    curve = [(1.0, 0.2), (5.0, 0.7), (9.0, 0.6)]
    assert time_to(curve, 0.65) == 5.0 and math.isnan(time_to(curve, 0.9))
