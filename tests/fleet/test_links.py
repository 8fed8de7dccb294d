"""Links: latency and bandwidth, jetson80's groups, bad spells."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.fleet.draws import Draws
from fedpeft.fleet.network import GROUPS, LINKS, SLOWEST, Network, gilbert, grouped, uniform

N = 400
EVERY = np.arange(N)
GOOD = np.zeros(N, bool)


def steady(bits: float, latency: float = 0.0) -> Network:
    rate = np.full(N, bits)
    return Network(rate, rate, np.full(N, latency), Draws(0, "network"), jitter=0.0)


def seconds(network: Network, down: float, up: float, round: int = 1) -> tuple[np.ndarray, ...]:
    return network.seconds(EVERY, round, np.full(N, down), np.full(N, up), GOOD)


def test_both_ways_at_ten_megabits_are_the_spec_s_golden() -> None:
    down, up = seconds(steady(10e6), 589_824, 589_824)
    assert down[0] + up[0] == pytest.approx(0.9437, abs=5e-5)


def test_doubling_the_bandwidth_halves_the_time_without_latency() -> None:
    draws = Draws(3, "network")
    one = Network(np.full(N, 1e6), np.full(N, 2e6), np.full(N, 0.3), draws)
    two = Network(np.full(N, 2e6), np.full(N, 4e6), np.full(N, 0.3), draws)
    for slow, fast in zip(seconds(one, 1e5, 7e4), seconds(two, 1e5, 7e4), strict=True):
        np.testing.assert_allclose(slow - 0.3, 2 * (fast - 0.3), rtol=1e-12)


def test_an_empty_message_costs_its_latency_alone() -> None:
    for name, link in LINKS.items():
        down, up = seconds(uniform(link, N, Draws(1, name)), 0, 0)
        assert (down == link.trip / 2).all() and (up == link.trip / 2).all()


def test_no_link_is_slower_than_the_floor() -> None:
    down, _ = seconds(steady(1.0), 1000, 0)
    assert down[0] == 8000 / SLOWEST


def test_what_a_client_draws_does_not_depend_on_who_else_is_there() -> None:
    network = uniform(LINKS["wifi"], N, Draws(5, "network"))
    some = np.array([7, 300])
    size = np.full(2, 1e6)
    alone = network.seconds(some, 4, size, size, GOOD[some])
    for own, all_ in zip(alone, seconds(network, 1e6, 1e6, 4), strict=True):
        assert (own == all_[some]).all()
    assert (seconds(network, 1e6, 1e6, 5)[0] != seconds(network, 1e6, 1e6, 4)[0]).all()


def test_the_groups_of_jetson80_are_even_and_clipped() -> None:
    network = grouped(N, Draws(2, "network"))
    assert [int((network.down == rate).sum()) for rate in GROUPS] == [N // 4] * 4
    rates = 8e6 / (seconds(network, 1e6, 0)[0] - 0.01)
    assert rates.min() >= 1e6 and rates.max() <= 30e6 * (1 + 1e-12)


def test_bad_spells_come_and_go_with_their_probabilities() -> None:
    """The share of bad links settles at p_gb / (p_gb + p_bg) = 1/6, within 5 deviations."""
    bad, draws, seen = np.zeros(N, bool), Draws(0, "weather"), []
    for round in range(1, 301):
        bad = gilbert(bad, round, draws)
        seen.append(bad.mean())
    assert abs(np.mean(seen[20:]) - 1 / 6) < 5 * np.sqrt((1 / 6) * (5 / 6) / (280 * N) * 3)
    slow = steady(1e6).seconds(EVERY, 1, np.full(N, 1e3), np.full(N, 1e3), ~GOOD)[0]
    assert slow[0] == pytest.approx(8e3 / 2e5)
