"""The clock: time goes forward only, ties go by order, equal runs have equal logs."""

from __future__ import annotations

import math

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.fleet.clock import Clock


def played(clock: Clock) -> list[tuple[float, str, int]]:
    found = []
    while (event := clock.step()) is not None:
        found.append((event.time, event.kind, event.client))
    return found


def filled() -> Clock:
    clock = Clock()
    for client, time in enumerate((3.0, 1.0, 2.0, 1.0)):
        clock.at(time, "delivered", client)
    return clock


def test_the_clock_is_monotone_and_ties_go_by_order() -> None:
    assert [(t, c) for t, _, c in played(filled())] == [(1.0, 1), (1.0, 3), (2.0, 2), (3.0, 0)]


@pytest.mark.parametrize("time", [0.5, -1.0, math.nan])
def test_nothing_can_be_planned_in_the_past(time: float) -> None:
    clock = filled()
    clock.step()
    with pytest.raises(FedpeftError, match=r"stands at 1\.0 s"):
        clock.at(time, "late", 0)


def test_the_clock_jumps_over_no_event() -> None:
    clock = filled()
    clock.forward(1.0)
    with pytest.raises(FedpeftError, match="cannot jump"):
        clock.forward(1.5)
    played(clock)
    clock.forward(2.0)
    assert clock.now == 3.0


def test_equal_events_have_equal_digests_and_any_change_another() -> None:
    clocks = [filled() for _ in range(4)]
    clocks[2].at(3.0, "delivered", 9)
    clocks[3] = Clock()
    for client, time in enumerate((3.0, 1.0, 2.0, math.nextafter(1.0, 2.0))):
        clocks[3].at(time, "delivered", client)
    for clock in clocks:
        played(clock)
    digests = [clock.digest for clock in clocks]
    assert digests[0] == digests[1] and len(set(digests)) == 3 and clocks[0].count == 4


def test_a_clock_goes_on_from_its_memory() -> None:
    whole, half = filled(), filled()
    half.step()
    other = Clock()
    other.restore(half.memory())
    whole.step()
    for clock in (whole, other):
        clock.at(2.0, "late", 7)
    assert played(whole) == played(other) and whole.digest == other.digest
