"""Epsilon against published and independent figures; bounds stay bounds where libraries fail."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy.special import logsumexp  # type: ignore[import-untyped]

from fedpeft.errors import FedpeftError
from fedpeft.privacy import accountants
from fedpeft.privacy.accountants import (
    Accountant,
    epsilon,
    epsilon_of,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_multiplier,
)
from fedpeft.privacy.events import Composed, Event, Gaussian, Nothing, Repeated, SampledGaussian


def phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def steps(rate: float, noise: float, times: int) -> Event:
    return Repeated(SampledGaussian(rate, noise), times)


# (rate, noise multiplier, steps, delta): RDP, PRV's estimate, its upper end at error 0.01. Opacus
# 1.6.0; dp-accounting's PLD agrees with the estimate to 3e-5.
REFERENCE = {
    (0.02, 1.0, 1000, 1e-5): (4.324153, 3.899090, 3.909336),
    (0.02, 1.0, 1, 1e-5): (1.164018, 0.438869, 0.448977),
    (0.02, 1.0, 100, 1e-5): (1.843472, 1.427342, 1.437488),
    (0.01, 0.7, 1000, 1e-5): (5.421397, 4.618289, 4.628654),
    (0.1, 1.0, 100, 1e-5): (7.899255, 7.046603, 7.057056),
    (0.25, 1.0, 200, 1e-5): (30.161113, 27.854279, 27.865485),
    (0.001, 0.5, 2000, 1e-6): (5.772662, 4.655116, 4.665539),
    (0.05, 8.0, 100, 1e-5): (0.232501, 0.209335, 0.219353),
}


@pytest.mark.parametrize("case", REFERENCE)
def test_prv_and_rdp_have_the_reference_values(case: tuple[float, float, int, float]) -> None:
    rdp, estimate, upper = REFERENCE[case]
    event, delta = steps(*case[:3]), case[3]
    assert epsilon(event, delta, "rdp") == pytest.approx(rdp, abs=2e-6)
    found = epsilon(event, delta)
    assert estimate < found <= rdp
    # its upper end, which above 10 is one of a coarser grid
    assert found == pytest.approx(upper, abs=1e-5 if rdp < 10 else 1e-3 * rdp)


GRID = {  # (rate, steps, delta): PRV and RDP at noise multipliers 0.6, 1, 2
    (0.01, 1000, 1e-5): ((7.444, 8.666), (1.838, 2.101), (0.632, 0.686)),
    (0.02, 500, 1e-5): ((10.291, 11.817), (2.784, 3.144), (0.931, 1.015)),
    (0.05, 200, 1e-4): ((13.13, 15.23), (4.010, 4.594), (1.314, 1.469)),
    (0.1, 100, 1e-3): ((14.51, 17.10), (4.795, 5.641), (1.554, 1.799)),
}


SLOW = {(0.02, 500, 1e-5), (0.05, 200, 1e-4)}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in GRID]
)
def test_record_level_grid(case: tuple[float, int, float]) -> None:
    rate, times, delta = case
    for noise, (prv, rdp) in zip((0.6, 1.0, 2.0), GRID[case], strict=True):
        event = steps(rate, noise, times)
        assert epsilon(event, delta) == pytest.approx(prv, rel=0.01)
        assert epsilon(event, delta, "rdp") == pytest.approx(rdp, rel=2e-3)
        assert epsilon(event, delta) <= epsilon(event, delta, "rdp")


@pytest.mark.parametrize(
    ("noise", "times", "expected"),
    [
        (1.0, 1, 4.377178), (4.0, 100, 13.206712), (1.0, 1000, 633.93), (1.0, 100, 91.8173),
        (0.7, 1000, 1212.1208), (1.0, 200, 159.4415), (8.0, 100, 5.6796), (1.0, 5, 11.480),
        (2.0, 5, 4.983), (4.0, 5, 2.258), (2.0, 100, 33.104), (4.0, 1, 0.926), (2.0, 1, 1.993),
        (1.0, 50, 54.40), (4.0, 50, 8.60), (8.0, 50, 3.80), (16.0, 50, 1.74),
    ],
)  # fmt: skip
def test_without_sampling_epsilon_is_the_closed_form(
    noise: float, times: int, expected: float
) -> None:
    digits = len(str(expected).split(".")[1])
    for event in (Repeated(Gaussian(noise), times), steps(1.0, noise, times)):
        assert epsilon(event, 1e-5) == pytest.approx(expected, abs=0.51 * 10**-digits)
        assert epsilon(event, 1e-5) < epsilon(event, 1e-5, "rdp")


def test_user_level_poisson_rounds() -> None:
    """N = 1000, n = 50, T = 100 at noise 1, 2, 4: the figures are PLD's, ours are upper ends."""
    for noise, pld in ((1.0, 3.502), (2.0, 1.097), (4.0, 0.462)):
        assert pld < epsilon(steps(0.05, noise, 100), 1e-5) < pld + 0.0125


def test_gaussians_compose_by_adding_squares() -> None:
    mixed = Composed((Repeated(Gaussian(3.0), 9), Gaussian(2.0), steps(1.0, 5.0, 25)))
    mu = math.sqrt(9 / 9 + 1 / 4 + 25 / 25)
    assert epsilon(mixed, 1e-6) == gaussian_epsilon(mu, 1e-6)


@pytest.mark.parametrize("mu", [0.01, 0.1, 0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_the_closed_form_inverts_the_exact_delta(mu: float, delta: float) -> None:
    """Against the formula in plain floating point, where that still works."""
    found = gaussian_epsilon(mu, delta)
    exact = [phi(mu / 2 - e / mu) - math.exp(e) * phi(-mu / 2 - e / mu) for e in (0.0, found)]
    if found == 0.0:
        assert exact[0] <= delta
    else:
        assert exact[1] == pytest.approx(delta, rel=1e-6)
        assert gaussian_delta(found, mu) <= delta


def quadrature(rate: float, noise: float, order: float) -> float:
    """Renyi divergence of the sampled Gaussian, integrated over a fine grid."""
    z = np.linspace(-30 * noise, order + 30 * noise, 100_001)
    density = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))
    return float(logsumexp(density + order * ratio) + math.log(z[1] - z[0])) / (order - 1)


@pytest.mark.parametrize(
    ("rate", "noise", "times"), [(0.02, 1.0, 1000), (0.5, 1.0, 3), (0.01, 4.0, 50)]
)
def test_rdp_is_the_least_bound_over_orders(rate: float, noise: float, times: int) -> None:
    orders = [*np.arange(1.1, 11, 0.1), *range(12, 64, 3), *range(64, 1000, 32)]
    delta = 1e-5
    bounds = [
        times * quadrature(rate, noise, a)
        - (math.log(delta) + math.log(a)) / (a - 1)
        + math.log((a - 1) / a)
        for a in orders
    ]
    found = epsilon(steps(rate, noise, times), delta, "rdp")
    assert found == pytest.approx(min(bounds), rel=2e-3)


def test_rdp_of_a_small_epsilon_needs_high_orders() -> None:
    event = steps(0.001, 8.0, 100)
    exact = 0.0032  # order 63 alone would leave log(1/delta)/62 = 0.12
    assert exact < epsilon(event, 1e-5, "rdp") < 0.02
    assert epsilon(event, 1e-5) <= epsilon(event, 1e-5, "rdp")


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_epsilon_is_monotone(accountant: Accountant) -> None:
    base = (0.02, 1.0, 100)
    lines = [
        [steps(0.02, 1.0, times) for times in (1, 10, 100, 1000)],
        [steps(rate, 1.0, 100) for rate in (0.001, 0.02, 0.1, 1.0)],
        [steps(0.02, noise, 100) for noise in (4.0, 2.0, 1.0, 0.7)],
        [steps(*base), Composed((steps(*base), Gaussian(8.0)))],
    ]
    for line in lines:
        found = [epsilon(event, 1e-5, accountant) for event in line]
        assert all(a < b for a, b in itertools.pairwise(found)), found
    assert epsilon(steps(*base), 1e-3, accountant) < epsilon(steps(*base), 1e-7, accountant)


def test_equal_entries_are_composed_as_one() -> None:
    a, b = SampledGaussian(0.02, 1.0), SampledGaussian(0.02, 1.1)
    epsilon_of.cache_clear()
    alternating = epsilon(Composed((a, b) * 200), 1e-5)
    grouped = epsilon(Composed((Repeated(b, 200), Repeated(a, 200))), 1e-5)
    assert alternating == grouped
    assert epsilon_of.cache_info().misses == 1
    either = epsilon(Repeated(b, 400), 1e-5), epsilon(Repeated(a, 400), 1e-5)
    assert either[0] < alternating < either[1]


ACCOUNTANTS: list[Accountant] = ["rdp", "prv"]


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_no_release_costs_nothing(accountant: Accountant) -> None:
    for event in (Nothing(), Composed(()), Repeated(Nothing(), 9)):
        assert epsilon(event, 1e-5, accountant) == 0.0


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize(
    ("event", "least"),
    [
        (steps(0.5, 0.3, 1000), 1000.0),  # PRV of Opacus says infinity
        (steps(0.02, 1e-3, 10), 1e6),  # PRV overflows
        (steps(0.02, 1e-200, 10), math.inf),  # RDP divides by zero
        (Gaussian(1e-200), math.inf),
        (Repeated(SampledGaussian(0.5, 1e-9), 10**12), 1e20),
    ],
)
def test_hardly_any_noise_is_a_huge_or_infinite_epsilon(
    accountant: Accountant, event: Event, least: float
) -> None:
    assert epsilon(event, 1e-5, accountant) >= least


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_enormous_noise_is_a_tiny_epsilon(accountant: Accountant) -> None:
    for event in (steps(0.02, 1e200, 10), Gaussian(1e200), steps(0.5, 1e5, 10)):
        assert 0 <= epsilon(event, 1e-5, accountant) < 0.005


def test_rdp_bounds_prv_where_that_is_out_of_its_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = accountants._prv

    def spy(*args: Any) -> float:
        called.append(args)
        return original(*args)

    monkeypatch.setattr(accountants, "_prv", spy)
    for event, delta in (
        (steps(0.02, 1.0, 20), 1e-12),  # rounding in Fourier transforms
        (steps(0.5, 0.3, 1000), 1e-5),  # exp(epsilon) overflows
        (steps(0.02, 1.0, 10**6), 1e-5),  # millions of points
        (steps(1e-4, 20.0, 10), 1e-5),  # below the accountant's own error
    ):
        assert epsilon(event, delta) == epsilon(event, delta, "rdp") > 0
    assert len(called) == 1  # the size of the grid is found out there
    epsilon(steps(0.02, 1.0, 7), 1e-5)
    assert len(called) == 2


@pytest.mark.parametrize("answer", [math.nan, math.inf, OverflowError(), ValueError("NaN"), 99.0])
def test_rdp_bounds_prv_where_that_fails(
    answer: float | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(accountants, "_prv", fails)
    epsilon_of.cache_clear()
    event = steps(0.03, 1.0, 10)
    assert epsilon(event, 1e-5) == epsilon(event, 1e-5, "rdp")
    epsilon_of.cache_clear()


ANALYTIC = {
    1e-5: {0.5: 7.032, 1: 3.731, 2: 1.994, 3: 1.391, 6: 0.764, 8: 0.600, 10: 0.500},
    1e-6: {1: 4.225, 3: 1.544, 8: 0.653},
}


@pytest.mark.parametrize("delta", ANALYTIC)
def test_the_analytic_gaussian_multiplier(delta: float) -> None:
    for target, noise in ANALYTIC[delta].items():
        found = gaussian_multiplier(target, delta)
        assert found == pytest.approx(noise, abs=6e-4)
        assert epsilon(Gaussian(found), delta) <= target * (1 + 1e-9)
        assert epsilon(Gaussian(found * (1 - 1e-6)), delta) > target


def test_the_analytic_gaussian_multiplier_at_extremes() -> None:
    for target in (1e-6, 1e-3, 50.0, 1e4):
        for delta in (0.5, 1e-5, 1e-30):
            found = gaussian_multiplier(target, delta)
            assert gaussian_epsilon(1 / found, delta) == pytest.approx(target, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_delta_must_be_in_its_range(delta: float) -> None:
    with pytest.raises(FedpeftError, match=r"delta=.*between 0 and 1"):
        epsilon(Gaussian(1.0), delta)
    with pytest.raises(FedpeftError, match="delta="):
        gaussian_multiplier(1.0, delta)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_epsilon_must_be_in_its_range(target: float) -> None:
    with pytest.raises(FedpeftError, match="epsilon="):
        gaussian_multiplier(target, 1e-5)


def test_the_central_limit_theorem_is_no_accountant() -> None:
    for name in ("gdp", "clt", "PRV"):
        with pytest.raises(FedpeftError, match="Known: pld, prv, rdp"):
            epsilon(Gaussian(1.0), 1e-5, name)  # type: ignore[arg-type]


def test_pld_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    epsilon_of.cache_clear()
    with pytest.raises(FedpeftError, match=r"fedpeft\[pld\]"):
        epsilon(steps(0.02, 1.0, 10), 1e-5, "pld")
    assert epsilon(Gaussian(1.0), 1e-5, "pld") == pytest.approx(4.377178, abs=1e-6)


def test_importing_privacy_does_not_import_opacus() -> None:
    code = (
        "import sys, fedpeft.privacy.ledger, fedpeft.privacy.matrix, fedpeft.privacy.clipping\n"
        "print([m for m in ('opacus', 'dp_accounting', 'scipy') if m in sys.modules])"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n"
