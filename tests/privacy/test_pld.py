"""The second opinion: PLD by dp-accounting against PRV by Opacus. Needs the extra ``pld``."""

from __future__ import annotations

import pytest

pytest.importorskip("dp_accounting", reason="needs fedpeft[pld]")

from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.calibrate import affordable, noise_multiplier
from fedpeft.privacy.events import Composed, Event, Gaussian, Repeated, SampledGaussian


def steps(rate: float, noise: float, times: int) -> Event:
    return Repeated(SampledGaussian(rate, noise), times)


REFERENCE = {  # PLD at its default interval, and PRV's estimate
    (0.02, 1.0, 1000, 1e-5): (3.899092, 3.899090),
    (0.02, 1.0, 1, 1e-5): (0.438864, 0.438869),
    (0.02, 1.0, 100, 1e-5): (1.427340, 1.427342),
    (0.01, 0.7, 1000, 1e-5): (4.618291, 4.618289),
    (0.1, 1.0, 100, 1e-5): (7.046603, 7.046603),
    (0.25, 1.0, 200, 1e-5): (27.854282, 27.854279),
    (0.001, 0.5, 2000, 1e-6): (4.655120, 4.655116),
    (0.05, 8.0, 100, 1e-5): (0.209318, 0.209335),
}


QUICK = list(REFERENCE)[2:5]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in REFERENCE]
)
def test_pld_has_the_reference_values(case: tuple[float, float, int, float]) -> None:
    pld, estimate = REFERENCE[case]
    event, delta = steps(*case[:3]), case[3]
    found = epsilon(event, delta, "pld")
    assert found == pytest.approx(pld, abs=2e-6)
    assert found == pytest.approx(estimate, abs=2e-3)
    assert found < epsilon(event, delta) <= epsilon(event, delta, "rdp")


@pytest.mark.parametrize(
    "event",
    [
        Composed((steps(0.02, 1.0, 500), steps(0.05, 2.0, 300), Gaussian(8.0))),
        Composed((Gaussian(3.0), steps(0.1, 1.5, 50))),
        steps(0.9, 3.0, 20),
    ],
)
def test_prv_of_mixed_histories_is_pld_and_its_error(event: Event) -> None:
    pld, prv = epsilon(event, 1e-5, "pld"), epsilon(event, 1e-5)
    assert pld < prv < pld + 0.0125
    assert prv < epsilon(event, 1e-5, "rdp")


@pytest.mark.slow
def test_prv_of_many_steps_and_of_a_large_epsilon_is_pld_and_its_error() -> None:
    for event in (steps(0.02, 1.0, 100_000), steps(0.5, 1.0, 1000)):
        pld, prv = epsilon(event, 1e-5, "pld"), epsilon(event, 1e-5)
        assert pld < prv < pld * 1.0015


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "noise"), [(0.5, 4.55403), (1, 2.51211), (3, 1.15044), (8, 0.73399)]
)
def test_calibrated_by_pld(target: float, noise: float) -> None:
    found = noise_multiplier(target, 1e-5, lambda z: steps(0.02, z, 1000), "pld", 2e-4)
    assert noise * (1 - 1e-4) < found < noise * 1.0004


@pytest.mark.slow
def test_pld_affords_at_least_what_prv_affords() -> None:
    event = Repeated(SampledGaussian(0.02, 1.0), 10)
    pld, prv = (affordable(event, 4.0, 1e-5, by) for by in ("pld", "prv"))  # type: ignore[arg-type]
    assert prv <= pld <= prv + 2
