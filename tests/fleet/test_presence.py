"""Who is there: flgo's formulas, and traces of FedScale's and FLASH's forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import FedpeftError
from fedpeft.fleet import lookalike, traces
from fedpeft.fleet.availability import Intervals, Labels, Traced, by_round
from fedpeft.fleet.draws import Draws

N = 20
SIZES = np.arange(1, N + 1)
LABELS = Labels(np.arange(N) % 4, np.arange(N) % 4 + 2, np.full(N, 3), 6)


def rate(kind: str, beta: float, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Each client's share of the rounds, and the mean of its probabilities."""
    own = by_round(kind, beta, SIZES, Draws(4, "availability"), LABELS)
    there = np.zeros(N)
    chance = np.zeros(N)
    for round in range(1, rounds + 1):
        there += own.there(0.0, round)
        chance += own.now(round)
    return there / rounds, chance / rounds


def test_over_ten_thousand_rounds_the_rate_is_p() -> None:
    """Each of 20 clients within 3 deviations, as often as that holds; none beyond 4.5."""
    rounds = 10_000
    found, p = rate("homo", 0.3, rounds)
    off = np.abs(found - p) / np.sqrt(p * (1 - p) / rounds)
    assert (p == 0.7).all() or np.allclose(p, 0.7)
    assert (off < 3).mean() >= 0.95 and off.max() < 4.5


@pytest.mark.parametrize("kind", ["ln", "sln", "mdf", "ldf", "ymf", "yff", "yc"])
def test_the_other_kinds_keep_to_their_own_probabilities(kind: str) -> None:
    rounds = 2400
    found, p = rate(kind, 0.4, rounds)
    off = np.abs(found - p) / np.sqrt(np.maximum(p * (1 - p), 1e-9) / rounds)
    assert off.max() < 5 and 0 < p.min() <= p.max() <= 1 and len(set(p.round(6))) > (kind != "yff")


def test_the_formulas() -> None:
    def chance(kind: str, beta: float) -> np.ndarray:
        return by_round(kind, beta, SIZES, Draws(4, "availability"), LABELS).chance

    assert (chance("idl", 0.4) == 1).all()
    np.testing.assert_allclose(chance("mdf", 0.5), np.sqrt(SIZES / N))
    np.testing.assert_allclose(chance("ldf", 0.5), np.sqrt(1 / SIZES))
    np.testing.assert_allclose(chance("ymf", 0.4), 0.4 * LABELS.least / 3 + 0.6)
    np.testing.assert_allclose(chance("yff", 0.4), 0.4 * 0.5 + 0.6)
    day = by_round("sln", 0.4, SIZES, Draws(4, "availability"))
    np.testing.assert_allclose(day.now(6), 0.9 * day.chance)
    np.testing.assert_allclose(day.now(18), 0.1 * day.chance, atol=1e-12)


def test_kinds_by_label_need_labels() -> None:
    with pytest.raises(FedpeftError, match=r"fleet\.availability=yc goes by clients' labels"):
        by_round("yc", 0.1, SIZES, Draws(0, "availability"))


TRACE = Intervals(np.array([10.0, 50.0]), np.array([20.0, 100.0]), 100.0)


@pytest.mark.parametrize(
    ("time", "there"), [(9, False), (10, True), (20, True), (21, False), (99, True), (110, True)]
)
def test_a_trace_begins_again_at_finish_time(time: float, there: bool) -> None:
    assert TRACE.there(time) is there and TRACE.there(time + 700) is there


def test_when_a_traced_client_leaves_and_comes() -> None:
    assert TRACE.until(15) == 20 and TRACE.until(170) == 200
    assert TRACE.next(0) == 10 and TRACE.next(15) == 15 and TRACE.next(25) == 50
    assert TRACE.next(101) == 110
    wraps = Intervals(np.array([0.0, 50.0]), np.array([20.0, 100.0]), 100.0)
    assert wraps.until(60) == 120 and wraps.until(10) == 20
    assert Intervals(np.array([0.0]), np.array([100.0]), 100.0).until(5) == math.inf


def test_seconds_online_are_those_of_the_grid() -> None:
    grid = np.arange(0.5, 437.0)
    assert TRACE.online(437.0) == pytest.approx(sum(TRACE.there(t) for t in grid), abs=5)
    assert TRACE.online(100.0) == 60.0


def test_clients_share_traces_and_the_clock_finds_the_next() -> None:
    never = Intervals(np.empty(0), np.empty(0), 1.0)
    some = Traced([TRACE, never], 3)
    assert some.there(15, 1).tolist() == [True, False, True]
    assert some.next(25.0, np.ones(3, bool)) == 50.0
    assert some.next(25.0, np.array([False, True, False])) == math.inf


def test_look_alikes_are_read_like_the_traces_themselves() -> None:
    first, again = (lookalike.availabilities(5, 30) for _ in range(2))
    assert first == again != lookalike.availabilities(6, 30)
    json.dumps([first, lookalike.states(5, 3), lookalike.capacities(5, 3)])
    scale = traces.availabilities(first, "fleet.trace")
    flash = traces.availabilities(lookalike.states(5, 30), "fleet.trace")
    for one, other in zip(scale, flash, strict=True):  # FLASH's messages have whole seconds
        assert one.period == other.period == lookalike.PERIOD
        assert abs(one.online(1e6) - other.online(1e6)) < 30
    each, bits = traces.capacities(lookalike.capacities(5, 2000), "fleet.capacities")
    assert np.median(each) == pytest.approx(lookalike.SECONDS_PER_EXAMPLE, rel=0.1)
    assert np.median(bits) == pytest.approx(1e3 * lookalike.KBPS, rel=0.1)


def test_flash_s_messages_need_idle_and_charging_and_wifi() -> None:
    lines = [
        "2020-01-29 00:00:00\tscreen_on",
        "2020-01-29 00:00:10\tbattery_charged_on",
        "2020-01-29 00:00:20\tscreen_off",
        "2020-01-29 00:00:30\twifi",
        "2020-01-29 00:00:35\t87.0%",
        "broken line",
        "2020-01-29 00:00:40\t4G",
        "2020-01-29 00:00:50\twifi",
        "2020-01-29 00:01:00\tbattery_charged_off",
        "2020-01-29 00:01:40\tphone_off",
    ]
    found = traces.flash("\n".join(lines), "x")
    assert found.on.tolist() == [30, 50] and found.off.tolist() == [40, 60]
    assert found.period == 100


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04\x95", "looks like a pickle"),
        (b"(dp0\n", "looks like a pickle"),
        (b"{", "is not JSON"),
        (b"[]", "an object for each client"),
        (b'{"a": 3}', "an object for each client"),
        (b'{"a": {"active": [1], "inactive": [2]}}', "finish_time=None"),
        (b'{"a": {"active": "x", "inactive": [2], "finish_time": 9}}', "active='?x"),
        (b'{"a": {"active": [true], "inactive": [2], "finish_time": 9}}', "active="),
        (b'{"a": {"active": [], "inactive": [], "finish_time": 9}}', "no client is ever there"),
        (b'{"a": {"messages": 3}}', "messages must be text"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_reason(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "trace"
    path.write_bytes(data)
    with pytest.raises(FedpeftError, match=message):
        traces.availabilities(traces.read_json(str(path), "fleet.trace"), "fleet.trace")


@pytest.mark.parametrize("value", ["true", "0", "-1", '"5"', "null"])
def test_capacities_are_numbers_above_zero(tmp_path: Path, value: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(f'{{"a": {{"computation": {value}, "communication": 1}}}}')
    with pytest.raises(FedpeftError, match=r"fleet\.capacities: client 'a' has computation="):
        traces.capacities(traces.read_json(str(path), "fleet.capacities"), "fleet.capacities")
