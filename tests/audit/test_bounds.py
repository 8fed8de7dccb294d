"""Bounds on epsilon: reference values, exact arithmetic, and how often they are wrong."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from fedpeft.audit.bounds import (
    Counts,
    gdp,
    gdp_delta,
    gdp_epsilon,
    one_run,
    one_run_p_value,
    one_shot,
    two_sets,
)
from fedpeft.errors import FedpeftError

DELTA = 1e-5


def exact_p_value(m: int, r: int, v: int, q: Fraction, delta: Fraction) -> Fraction:
    """Theorem 5.2 of Steinke et al., term by term, in fractions."""
    pmf = [math.comb(r, w) * q**w * (1 - q) ** (r - w) for w in range(r + 1)]
    beta = sum(pmf[v:], Fraction(0))
    terms = [(sum(pmf[v - i :], Fraction(0)) - beta) / i for i in range(1, v + 1)]
    return beta + 2 * m * delta * max(terms)


@pytest.mark.parametrize(
    ("m", "r", "v", "bound"),
    [
        (1000, 1000, 1000, 5.7823),
        (1000, 1000, 600, 0.2972),
        (1000, 100, 100, 3.4654),
        (1000, 100, 95, 2.1652),
        (1000, 200, 180, 1.7963),
        (5000, 500, 480, 2.7830),
        (100, 100, 100, 3.4902),
    ],
)
def test_one_run_reference_values(m: int, r: int, v: int, bound: float) -> None:
    found = one_run(m, r, v, DELTA)
    assert found == pytest.approx(bound, abs=5e-5)
    assert one_run_p_value(m, r, v, found, DELTA) <= 0.05
    assert one_run_p_value(m, r, v, found + 1e-6, DELTA) > 0.05


@pytest.mark.parametrize(("m", "r", "v"), [(40, 30, 25), (300, 60, 1), (9, 9, 9), (50, 50, 0)])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_one_run_p_value_is_that_of_fractions(m: int, r: int, v: int, delta: float) -> None:
    for q in (Fraction(1, 2), Fraction(3, 4), Fraction(99, 100)):
        epsilon = math.log(q / (1 - q))
        wanted = 1.0 if v == 0 else min(1.0, float(exact_p_value(m, r, v, q, Fraction(delta))))
        assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(wanted, rel=1e-12)


def test_one_run_p_value_with_100_000_canaries() -> None:
    m = r = 100_000
    v, epsilon, delta = 60_000, 0.39, 1e-6
    q = 1 / (1 + math.exp(-epsilon))
    choose = math.lgamma(r + 1) - math.lgamma(v + 1) - math.lgamma(r - v + 1)
    at_v = math.exp(choose + v * math.log(q) + (r - v) * math.log1p(-q))
    above, term = [at_v], at_v
    for w in range(v, v + 2000):
        term *= (r - w) / (w + 1) * q / (1 - q)
        above.append(term)
    inside, worst, term = 0.0, 0.0, at_v
    for i in range(1, 3000):
        term *= (v - i + 1) / (r - v + i) * (1 - q) / q
        inside += term
        worst = max(worst, inside / i)
    wanted = math.fsum(above) + 2 * m * delta * worst
    assert 1e-4 < wanted < 0.05
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(wanted, rel=1e-6)
    assert 0.38 < one_run(m, r, v, delta) < 0.41


def test_one_run_grows_with_what_is_right_and_shrinks_with_delta() -> None:
    by_right = [one_run(500, 100, v, DELTA) for v in range(40, 101, 5)]
    assert by_right[0] == 0 and by_right == sorted(by_right) and by_right[-1] > 3
    by_delta = [one_run(500, 100, 95, delta) for delta in (0.0, 1e-6, 1e-4, 1e-2)]
    assert by_delta == sorted(by_delta, reverse=True) and by_delta[0] > by_delta[-1]


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_one_run_is_wrong_in_at_most_one_run_in_twenty(epsilon: float) -> None:
    # randomised response has all guesses right with probability e^eps / (1 + e^eps): the worst case
    stream = np.random.default_rng(1)
    right = stream.binomial(200, 1 / (1 + math.exp(-epsilon)), 2000)
    bounds = {int(v): one_run(200, 200, int(v), 0.0) for v in np.unique(right)}
    wrong = np.mean([bounds[int(v)] > epsilon for v in right])
    assert 0.01 < wrong <= 0.06


@pytest.mark.parametrize(
    ("counts", "delta", "bound"),
    [
        (Counts(90, 100, 10, 100), 0.0, 1.5422),
        (Counts(100, 100, 0, 100), 0.0, 3.2813),
        (Counts(500, 500, 0, 500), 1e-5, 4.9056),
        (Counts(1000, 1000, 0, 1000), 1e-5, 5.6006),
    ],
)
def test_two_sets_reference_values(counts: Counts, delta: float, bound: float) -> None:
    assert two_sets(counts, delta) == pytest.approx(bound, abs=5e-5)


def tail_at_most(count: int, n: int, p: float) -> float:
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count + 1))


def clopper_pearson_upper(count: int, n: int) -> float:
    """The rate at which ``count`` or fewer of n come with probability 0.025, by bisection."""
    low, high = count / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail_at_most(count, n, middle) > 0.025 else (low, middle)
    return low


@pytest.mark.parametrize("counts", [Counts(60, 80, 12, 90), Counts(88, 90, 40, 80)])
def test_two_sets_and_gdp_are_those_of_binomial_tails(counts: Counts) -> None:
    fpr = clopper_pearson_upper(counts.alarms, counts.others)
    fnr = clopper_pearson_upper(counts.members - counts.hits, counts.members)
    both = ((1 - fnr - 0.01) / fpr, (1 - fpr - 0.01) / fnr)
    assert two_sets(counts, 0.01) == pytest.approx(math.log(max(both)), rel=1e-6)
    normal = NormalDist()
    mu = normal.inv_cdf(1 - fpr) - normal.inv_cdf(fnr)
    assert gdp(counts) == pytest.approx(mu, rel=1e-6)


def test_an_attack_that_guesses_bounds_nothing() -> None:
    for counts in (Counts(50, 100, 50, 100), Counts(0, 10, 0, 10), Counts(10, 10, 10, 10)):
        assert two_sets(counts, DELTA) == 0
        assert gdp(counts) == 0


@pytest.mark.parametrize(
    ("mu", "epsilon"), [(1.0, 4.377178), (2.5, 13.206712), (math.sqrt(1000), 633.93)]
)
def test_gdp_epsilon_reference_values(mu: float, epsilon: float) -> None:
    found = gdp_epsilon(mu, DELTA)
    assert found == pytest.approx(epsilon, rel=1e-6)
    assert gdp_delta(mu, found) == pytest.approx(DELTA, rel=1e-9)


def test_gdp_epsilon_at_the_ends() -> None:
    assert gdp_epsilon(0.0, DELTA) == gdp_epsilon(-1.0, DELTA) == gdp_epsilon(1e-6, DELTA) == 0
    assert gdp_epsilon(0.5, 0.0) == math.inf


def test_gdp_delta_is_the_integral() -> None:
    mu, epsilon = 1.3, 0.7
    x = np.linspace(-12, 14, 400_001)
    likely, other = (np.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (mu, 0))
    more = np.maximum(likely - math.exp(epsilon) * other, 0)
    assert gdp_delta(mu, epsilon) == pytest.approx(float(more.sum() * (x[1] - x[0])), rel=1e-6)


@pytest.mark.parametrize(
    ("estimate", "low"), [(2.801, 2.265), (7.657, 6.996), (4.706, 4.115)]
)  # measured once with k = 200; they hang together by mu and its lower end alone
def test_one_shot_reference_values(estimate: float, low: float) -> None:
    size, mu = 5000, 0.0
    for step in (1.0, 0.1, 0.01, 1e-3, 1e-4):
        while gdp_epsilon(mu + step, DELTA) < estimate:
            mu += step
    found = one_shot(np.full(200, mu / math.sqrt(size)), size, DELTA)
    assert found.mu == pytest.approx(mu)
    assert found.epsilon == pytest.approx(estimate, abs=2e-3)
    assert found.epsilon_low == pytest.approx(low, abs=2e-3)
    assert found.mu_low == pytest.approx(mu - 1.6449 / math.sqrt(200), abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_run(10, 11, 3, DELTA), "correct=3, guesses=11, canaries=10"),
        (lambda: one_run(10, 5, 6, DELTA), "correct=6, guesses=5"),
        (lambda: one_run(10, 5, 3, 1.0), "delta=1.0"),
        (lambda: one_run(10, 5, 3, math.nan), "delta=nan"),
        (lambda: one_run(10, 5, 3, DELTA, level=1.0), "level=1.0"),
        (lambda: two_sets(Counts(5, 4, 0, 4), DELTA), "hits=[5] of members=4"),
        (lambda: two_sets(Counts(0, 0, 0, 4), DELTA), "no set empty"),
        (lambda: gdp(Counts(1, 4, 5, 4)), "alarms=[5] of others=4"),
        (lambda: gdp_epsilon(1.0, -1.0), "delta=-1.0"),
        (lambda: one_shot(np.array([0.1]), 10, DELTA), "cosines of 1 canary"),
        (lambda: one_shot(np.array([0.1, math.nan]), 10, DELTA), "2 finite numbers"),
    ],
)
def test_what_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(FedpeftError) as error:
        call()
    assert message in str(error.value)
