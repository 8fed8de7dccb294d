from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedpeft.cli import bars as module
from fedpeft.cli.bars import Bars


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "monotonic", lambda: found.now)
    return found


def drawn(bars: Bars, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(bars.draw())
    lines = out.getvalue().splitlines()
    assert len(lines) == 2, "the height must never change"
    return [" ".join(line.translate(dict.fromkeys(map(ord, "━╸╺"))).split()[1:]) for line in lines]


def make() -> Bars:
    return Bars(Console(file=io.StringIO()))


def test_loading() -> None:
    assert drawn(make()) == ["loading", ""]


def test_a_round(clock: Clock) -> None:
    bars = make()
    bars.stage("fedavg", 4)
    bars.round_began(1, 8)
    clock.now += 10
    bars.chunk_done(2, 5000)
    top, below = drawn(bars)
    assert top == "fedavg round 1/4 ETA 02:30"  # a sixteenth in 10 s
    assert below.endswith("2/8 500 tokens/s ETA 00:30")
    clock.now += 5
    assert [line[-5:] for line in drawn(bars)] == ["02:25", "00:25"]  # counts down by itself
    clock.now += 200
    assert [line[-5:] for line in drawn(bars)] == ["00:00", "00:00"]


def test_the_next_round_and_hours(clock: Clock) -> None:
    bars = make()
    bars.stage("fedavg", 11)
    bars.round_began(1, 8)
    clock.now += 1000
    bars.chunk_done(7, 7)
    bars.round_done()  # one client of the eight is missing: the round is over all the same
    bars.round_began(2, 5)
    top, below = drawn(bars)
    assert top == "fedavg round 2/11 ETA 2:46:40"
    assert below == "0/5 ETA --:--"


def test_a_resumed_run_counts_only_its_own_rounds(clock: Clock) -> None:
    bars = make()
    bars.stage("fedavg", 10)
    bars.round_began(6, 4)
    clock.now += 20
    bars.chunk_done(4, 100)
    bars.round_done()
    assert drawn(bars)[0] == "fedavg round 6/10 ETA 01:20"


def test_a_stage_begins_anew(clock: Clock) -> None:
    bars = make()
    bars.stage("fedavg", 1)
    bars.round_began(1, 4)
    clock.now += 20
    bars.chunk_done(4, 100)
    bars.round_done()
    bars.stage("local", 1)
    bars.round_began(1, 4)
    assert drawn(bars) == ["local round 1/1 ETA --:--", "0/4 ETA --:--"]


def test_a_round_without_clients(clock: Clock) -> None:
    bars = make()
    bars.stage("fedavg", 2)
    bars.round_began(1, 0)
    bars.round_done()
    assert drawn(bars)[1].startswith("0/0")


@pytest.mark.parametrize("width", [80, 40])
def test_big_figures_keep_to_two_lines(clock: Clock, width: int) -> None:
    bars = make()
    bars.stage("centralised", 1000)
    bars.round_began(1000, 10000)
    clock.now += 1
    bars.chunk_done(10000, 10**7)
    assert "10,000,000 tokens/s" in drawn(bars)[1] or width < 80
    drawn(bars, width)
