"""From a recipe to the terms: who is protected, by how much noise, at what price per round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedpeft.config import Local, Privacy, Recipe, Rounds, SecureAggregation
from fedpeft.errors import FedpeftError
from fedpeft.privacy.accountants import epsilon
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.events import Gaussian, Repeated, SampledGaussian
from fedpeft.privacy.record_level import RecordLevel
from fedpeft.privacy.terms import Terms, clipped_for_sums, randomness_of, terms_of
from tests.privacy.federated import recipe_of, rounds_of

SIZES = np.array([40] * 12)


def terms(rounds: Rounds | None = None, exchanges: int = 1, **privacy: Any) -> Terms:
    given = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3} | privacy
    recipe = recipe_of(
        privacy=Privacy(**given), rounds=rounds or rounds_of(), local=Local(batch_size=10)
    )
    found = terms_of(recipe, SIZES, exchanges)
    assert found is not None
    return found


def level(found: Terms) -> ClientLevel:
    assert isinstance(found.mechanism, ClientLevel)
    return found.mechanism


def test_no_unit_no_terms() -> None:
    assert terms_of(recipe_of(), SIZES, 1) is None


@pytest.mark.parametrize(
    ("unit", "delta", "units"),
    [("client", 1 / 12, 12), ("client", 0.5, 12), ("record", 1 / 480, 480), ("record", 0.01, 480)],
)
def test_delta_must_be_below_one_over_what_is_protected(
    unit: str, delta: float, units: int
) -> None:
    with pytest.raises(FedpeftError, match=rf"below one over the number of {unit}s .* {units}:"):
        terms(unit=unit, delta=delta)
    below = (1 - 1e-9) / units
    assert terms(unit=unit, delta=below).delta == below


@pytest.mark.parametrize(
    ("kind", "privacy", "sampled", "most"),
    [
        ("uniform", {}, "each", 6),
        ("fixed", {}, "each", 6),
        ("uniform", {"max_rounds": 2}, "cap", 2),
        ("uniform", {"max_rounds": 9}, "cap", 6),
        ("poisson", {}, "poisson", 6),
        ("poisson", {"max_rounds": 2}, "cap", 2),
        ("poisson", {"noise": "client"}, "each", 6),
        ("poisson", {"unit": "record"}, "each", 6),
        ("cyclic", {}, "cap", 2),
        ("cyclic", {"unit": "record"}, "cap", 2),
        ("cyclic", {"max_rounds": 1}, "cap", 1),
    ],
)
def test_one_of_three_statements_about_participation(
    kind: str, privacy: dict[str, Any], sampled: str, most: int
) -> None:
    """Six rounds, four groups: at most two turns. A sample without replacement earns nothing."""
    found = terms(rounds_of(kind, groups=4, rate=0.25), **privacy)
    assert (found.sampled, found.rounds) == (sampled, most)
    assert found.everyone == (sampled == "poisson")


def test_poisson_earns_its_rate_and_nothing_else_does() -> None:
    assert terms(rounds_of("poisson", rate=0.25)).event(1) == SampledGaussian(0.25, 1.0)
    assert terms(rounds_of("poisson", rate=1.0)).event(1) == Gaussian(1.0)
    for kind in ("uniform", "fixed", "cyclic"):
        found = terms(rounds_of(kind, fraction=0.25, size=3, rate=0.25, groups=4))
        assert found.event(1) == Gaussian(1.0)


def test_a_records_rate_is_its_own_clients_whatever_the_sampler_of_clients() -> None:
    """No q x fraction."""
    for rounds in (rounds_of("poisson", rate=0.25), rounds_of("uniform", fraction=0.25)):
        found = terms(rounds, unit="record")
        assert isinstance(found.mechanism, RecordLevel)
        assert found.event(40) == Repeated(SampledGaussian(10 / 40, 1.0), 4)


@pytest.mark.parametrize(
    ("rounds", "privacy", "whole"),
    [
        (rounds_of("uniform"), {}, lambda z: Repeated(Gaussian(z), 6)),
        (rounds_of("uniform"), {"max_rounds": 2}, lambda z: Repeated(Gaussian(z), 2)),
        (rounds_of("cyclic", groups=3), {}, lambda z: Repeated(Gaussian(z), 2)),
        (rounds_of("cyclic", groups=3), {"bands": -1}, lambda z: Gaussian(z)),
        (rounds_of("poisson", rate=0.2), {}, lambda z: Repeated(SampledGaussian(0.2, z), 6)),
    ],
)
def test_the_noise_that_is_found_costs_the_budget(
    rounds: Rounds, privacy: dict[str, Any], whole: Any
) -> None:
    found = terms(rounds, epsilon=2.0, noise_multiplier=0.0, accountant="rdp", **privacy)
    z = level(found).noise_multiplier
    spent = epsilon(whole(z), 1e-3, "rdp")
    assert 1.98 <= spent <= 2.0
    assert found.event(1) == (
        Gaussian(z) if found.sampled != "poisson" else SampledGaussian(0.2, z)
    )


def test_two_exchanges_need_more_noise_than_one() -> None:
    given = {"epsilon": 2.0, "noise_multiplier": 0.0, "accountant": "rdp"}
    one, two = (level(terms(exchanges=n, **given)).noise_multiplier for n in (1, 2))
    assert two == pytest.approx(math.sqrt(2) * one, rel=5e-3)


def test_the_least_clients_are_those_of_the_quorum() -> None:
    found = level(terms(rounds_of("uniform", fraction=0.5)))
    assert (found.expected, found.least) == (6.0, 3)
    assert level(terms(rounds_of("fixed", size=5))).least == 3
    assert level(terms(rounds_of("poisson", rate=0.01))).least == 1


def test_bands_need_a_sampler_that_keeps_clients_apart() -> None:
    for kind in ("uniform", "fixed", "poisson"):
        with pytest.raises(FedpeftError, match=r"needs rounds\.sampling\.kind=cyclic, not"):
            terms(rounds_of(kind, size=3), bands=4)
    with pytest.raises(FedpeftError, match="of 2 exchanges a round"):
        terms(rounds_of("cyclic", groups=3), bands=2, exchanges=2)
    found = terms(rounds_of("cyclic", groups=3, count=9), bands=-1)
    assert found.whole_run and found.everyone
    own = level(found).bands
    assert own is not None and (own.bands, own.rounds, own.separation) == (3, 9, 3)


def test_an_adapting_bound_needs_clients_enough_for_its_bits() -> None:
    with pytest.raises(FedpeftError, match="a multiplier below a tenth of the expected 12 clients"):
        terms(adaptive=True, noise_multiplier=1.2)
    found = level(terms(adaptive=True, noise_multiplier=1.1, quantile=0.3, clip_rate=0.1)).adaptive
    assert found is not None
    assert (found.quantile, found.rate, found.bits_std) == (0.3, 0.1, 12 / 20)


def test_noise_is_secret_unless_it_is_asked_to_repeat() -> None:
    assert randomness_of(recipe_of(privacy=Privacy("client", noise_multiplier=1.0))).safe
    again = Privacy("client", noise_multiplier=1.0, randomness="seeded")
    a, b = (randomness_of(recipe_of(privacy=again, seed=7)) for _ in range(2))
    assert not a.safe and a.key == b.key != randomness_of(recipe_of(privacy=again, seed=8)).key


def test_sums_alone_are_clipped_and_not_noised() -> None:
    recipe: Recipe = recipe_of(secure_aggregation=SecureAggregation(enabled=True, clip_norm=3.0))
    own = clipped_for_sums(recipe, randomness_of(recipe))
    assert (own.clip_norm, own.place, own.always) == (3.0, "nobody", False)
