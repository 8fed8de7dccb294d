"""From a budget to noise and to counts: the safe side, the least noise, and few evaluations."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedpeft.errors import FedpeftError
from fedpeft.privacy.accountants import Accountant, epsilon, epsilon_of, gaussian_multiplier
from fedpeft.privacy.calibrate import (
    MOST_REPETITIONS,
    affordable,
    affordable_of,
    noise_multiplier,
)
from fedpeft.privacy.events import Composed, Event, Gaussian, Nothing, Repeated, SampledGaussian


def steps(rate: float, noise: float, times: int) -> Event:
    return Repeated(SampledGaussian(rate, noise), times)


# Noise for a target epsilon at delta 1e-5, rate 0.02, 1000 steps: by RDP, by PLD, by PRV's upper
# end with Opacus's own search (tolerance 0.01 in epsilon)
TARGETS = {
    0.5: (4.96057, 4.55403, 4.6875),
    1.0: (2.71353, 2.51211, 2.5390625),
    3.0: (1.21640, 1.15044, 1.15478),
    8.0: (0.76771, 0.73399, 0.73456),
}


@pytest.mark.parametrize("target", TARGETS)
def test_the_noise_multiplier_by_rdp(target: float) -> None:
    found = noise_multiplier(target, 1e-5, lambda z: steps(0.02, z, 1000), "rdp")
    assert TARGETS[target][0] * (1 - 1e-4) < found < TARGETS[target][0] * 1.0012
    assert epsilon(steps(0.02, found, 1000), 1e-5, "rdp") <= target


def check_prv(target: float) -> None:
    _, pld, prv = TARGETS[target]
    epsilon_of.cache_clear()
    found = noise_multiplier(target, 1e-5, lambda z: steps(0.02, z, 1000))
    assert epsilon_of.cache_info().misses <= 22  # a dozen of them by RDP
    assert pld < found <= prv * 1.001
    assert epsilon(steps(0.02, found, 1000), 1e-5) <= target
    assert epsilon(steps(0.02, found / 1.0011, 1000), 1e-5) > target


def test_the_noise_multiplier_by_prv() -> None:
    check_prv(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_the_noise_multiplier_by_prv_for_other_targets(target: float) -> None:
    check_prv(target)


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 100.0])
def test_the_noise_multiplier_of_gaussians_is_the_analytic_one(target: float) -> None:
    found = noise_multiplier(target, 1e-6, lambda z: Repeated(Gaussian(z), 7))
    exact = gaussian_multiplier(target, 1e-6) * math.sqrt(7)
    assert exact * (1 - 1e-9) <= found <= exact * 1.001
    closer = noise_multiplier(target, 1e-6, lambda z: Repeated(Gaussian(z), 7), tolerance=1e-6)
    assert exact * (1 - 1e-9) <= closer <= exact * (1 + 1.1e-6)


def test_a_fixed_part_of_the_event_is_paid_for() -> None:
    start = Gaussian(20.0)
    found = noise_multiplier(2.0, 1e-5, lambda z: Composed((start, Gaussian(z))))
    assert found > noise_multiplier(2.0, 1e-5, Gaussian) * 1.002
    assert epsilon(Composed((start, Gaussian(found))), 1e-5) <= 2.0


@pytest.mark.parametrize(
    ("event_of", "match"),
    [
        (lambda z: Composed((Gaussian(1.0), Gaussian(z))), "is not met with the most"),
        (lambda z: Gaussian(100.0), "is met already with the least"),
        (lambda z: Nothing(), "is met already with the least"),
    ],
)
def test_noise_that_decides_nothing_is_refused(event_of: Any, match: str) -> None:
    for accountant in ("rdp", "prv"):
        with pytest.raises(FedpeftError, match=match):
            noise_multiplier(1.0, 1e-5, event_of, accountant)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.0, 1e-5, Gaussian), "epsilon=0.0"),
        ((math.nan, 1e-5, Gaussian), "epsilon=nan"),
        ((math.inf, 1e-5, Gaussian), "epsilon=inf"),
        ((1.0, 1.0, Gaussian), "delta=1.0"),
        ((1.0, 1e-5, Gaussian, "gdp"), "accountant='gdp'"),
        ((1.0, 1e-5, Gaussian, "rdp", 0.0), "tolerance=0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Any, match: str) -> None:
    with pytest.raises(FedpeftError, match=match):
        noise_multiplier(*arguments)


def counted(event: Event, budget: float, accountant: Accountant, after: Event) -> int:
    """By trying one after another."""
    times = 0
    while epsilon(Composed((after, Repeated(event, times + 1))), 1e-5, accountant) <= budget:
        times += 1
    return times


@pytest.mark.parametrize("budget", [0.05, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("after", [Nothing(), Gaussian(3.0), Repeated(Gaussian(5.0), 4)])
def test_affordable_is_what_counting_finds(budget: float, after: Event) -> None:
    accountants: list[Accountant] = ["rdp", "prv"]
    for event in (Gaussian(5.0), Composed((Gaussian(9.0), Gaussian(12.0)))):
        for accountant in accountants:
            expected = counted(event, budget, accountant, after)
            assert affordable(event, budget, 1e-5, accountant, after) == expected
    assert affordable(Gaussian(5.0), 8.0, 1e-5) == 69


def test_affordable_by_prv_is_the_last_within_and_asks_seldom() -> None:
    event = steps(0.02, 1.0, 10)
    epsilon_of.cache_clear()
    affordable_of.cache_clear()
    times = affordable(event, 4.0, 1e-5)
    assert epsilon_of.cache_info().misses <= 20  # a dozen of them by RDP
    assert epsilon(Repeated(event, times), 1e-5) <= 4.0 < epsilon(Repeated(event, times + 1), 1e-5)
    assert times > affordable(event, 4.0, 1e-5, "rdp") * 1.1
    misses = epsilon_of.cache_info().misses
    assert affordable(event, 4.0, 1e-5) == times
    assert epsilon_of.cache_info().misses == misses


def test_affordable_of_many_is_within_a_thousandth() -> None:
    event = SampledGaussian(0.02, 1.0)
    times = affordable(event, 8.0, 1e-5, "rdp")
    assert epsilon(Repeated(event, times), 1e-5, "rdp") <= 8.0
    assert epsilon(Repeated(event, times + times // 1000 + 1), 1e-5, "rdp") > 8.0


def test_affordable_has_a_least_and_a_most() -> None:
    assert affordable(Gaussian(0.5), 1.0, 1e-5) == 0
    assert affordable(Gaussian(500.0), 1.0, 1e-5, after=Gaussian(1.0)) == 0
    assert affordable(Gaussian(1e9), 1.0, 1e-5) == MOST_REPETITIONS
    assert affordable(Nothing(), 1.0, 1e-5, after=Gaussian(1.0)) == MOST_REPETITIONS
    assert affordable(Gaussian(1.0), math.inf, 1e-5) == MOST_REPETITIONS


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_must_be_positive(budget: float) -> None:
    with pytest.raises(FedpeftError, match="budget_epsilon"):
        affordable(Gaussian(1.0), budget, 1e-5)
