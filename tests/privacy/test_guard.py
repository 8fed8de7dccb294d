"""Runs under a budget: who may take part, when a run ends, what a resume may not change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config import (
    Privacy,
    Rounds,
    SecureAggregation,
)
from fedpeft.errors import FedpeftError
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.events import (
    Gaussian,
    Nothing,
    Repeated,
    SampledGaussian,
)
from fedpeft.privacy.guard import BudgetSpentError, Guard
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.terms import EVERYONE, terms_of
from tests.privacy.federated import charged, recipe_of, rounds_of

FREE = Budget(math.inf, 1e-5)
CLIENTS = {f"c{k}": 40 for k in range(6)}


def guard_of(
    path: Path,
    rounds: Rounds,
    privacy: Privacy,
    sizes: Mapping[str, int] = CLIENTS,
    head: str | None = None,
    **changes: Any,
) -> Guard:
    recipe = recipe_of(privacy=privacy, rounds=rounds, **changes)
    terms = terms_of(recipe, np.array(list(sizes.values())), 1)
    assert terms is not None
    return Guard(terms, path / "privacy.jsonl", recipe, head)


# -- who may take part


def test_clients_are_charged_before_the_round_each_for_its_own_size(tmp_path: Path) -> None:
    """DP10: what one client spends does not depend on the others' sizes."""
    sizes = {"a": 4, "b": 40}
    guard = guard_of(
        tmp_path, rounds_of(), Privacy("record", noise_multiplier=1.0, delta=1e-3), sizes
    )
    assert guard.admit(1, sizes) == ("a", "b")
    assert charged(tmp_path) == [(1, ["a", "b"])]  # on disk already
    assert guard.ledger.spent("a") == Gaussian(1.0)
    assert guard.ledger.spent("b") == Repeated(SampledGaussian(0.1, 1.0), 10)
    guard.close()


def test_a_client_whose_budget_is_spent_stays_out_and_others_go_on(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=1.0, max_rounds=2, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of("fixed", 12, size=3), privacy)
    taken = dict.fromkeys(CLIENTS, 0)
    for number in range(1, 13):
        try:
            names = guard.admit(number, CLIENTS)
        except BudgetSpentError as error:
            assert "of 3 clients that were drawn 0 have privacy budget left" in str(error)
            break
        for name in names:
            taken[name] += 1
    guard.close()
    assert max(taken.values()) == 2
    assert any(len(names) < 3 for _, names in charged(tmp_path)), "somebody was left out alone"


def test_a_budget_of_epsilon_stops_a_client_by_what_it_spent(tmp_path: Path) -> None:
    """The second client's noise is weaker: it may go on only half as long."""
    privacy = Privacy("record", epsilon=3.0, delta=1e-3, accountant="rdp")
    guard = guard_of(tmp_path, rounds_of(count=4), privacy)
    guard.ledger.charge(0, {"c1": Repeated(guard.terms.event(40), 2)})
    admitted = [guard.admit(number, CLIENTS) for number in range(1, 5)]
    assert [("c1" in names) for names in admitted] == [True, True, False, False]
    assert all("c0" in names for names in admitted)
    worst = guard.ledger.worst()
    guard.close()
    assert 2.9 <= worst <= 3.0


def test_without_a_cap_rounds_are_only_recorded(tmp_path: Path) -> None:
    """A round that is played again costs more; nobody asked for a limit."""
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of(count=2), privacy)
    for number in (1, 2, 2, 2):
        assert guard.admit(number, CLIENTS) == tuple(sorted(CLIENTS))
    assert guard.ledger.spent("c0") == Repeated(Gaussian(1.0), 4)
    guard.close()


def test_poisson_charges_everybody_whoever_is_drawn(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of("poisson", rate=0.05), privacy)
    drawn = [guard.admit(number, CLIENTS) for number in range(1, 21)]
    assert () in drawn and guard.ledger.clients() == [EVERYONE]
    assert guard.ledger.spent(EVERYONE) == Repeated(SampledGaussian(0.05, 1.0), 20)
    assert not any(f'"{name}"' in (tmp_path / "privacy.jsonl").read_text() for name in CLIENTS)
    guard.close()


def test_a_secret_draw_does_not_follow_from_the_seed(tmp_path: Path) -> None:
    drawn = []
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3)
        guard = guard_of(tmp_path / str(k), rounds_of("poisson", rate=0.5), privacy)
        drawn.append([guard.admit(number, CLIENTS) for number in range(1, 21)])
        guard.close()
    assert drawn[0] != drawn[1]


def test_a_spent_poisson_run_ends(tmp_path: Path) -> None:
    privacy = Privacy("client", epsilon=2.0, delta=1e-3, accountant="rdp")
    guard = guard_of(tmp_path, rounds_of("poisson", rate=0.5, count=3), privacy)
    for number in range(1, 4):
        guard.admit(number, CLIENTS)
    with pytest.raises(BudgetSpentError, match="the run has spent its privacy budget"):
        guard.admit(4, CLIENTS)
    guard.close()


def test_a_run_of_correlated_noise_is_charged_once(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3, bands=-1)
    guard = guard_of(tmp_path, rounds_of("cyclic", groups=3), privacy)
    groups = [guard.admit(number, CLIENTS) for number in range(1, 7)]
    assert guard.ledger.spent(EVERYONE) == Gaussian(2.0)
    assert groups[:3] == groups[3:] and sorted(sum(groups[:3], ())) == sorted(CLIENTS)
    guard.close()


def test_fewer_than_must_share_the_noise_end_the_run(tmp_path: Path) -> None:
    """Else the round's own quorum, a share of those that are left, would be met by too few."""
    privacy = Privacy("client", noise_multiplier=1.0, delta=1e-3, noise="shares", max_rounds=1)
    guard = guard_of(
        tmp_path,
        rounds_of("fixed", 9, size=4),
        privacy,
        secure_aggregation=SecureAggregation(enabled=True),
    )
    assert isinstance(guard.terms.mechanism, ClientLevel) and guard.terms.mechanism.least == 2
    sizes = []
    with pytest.raises(BudgetSpentError, match="and 2 are needed"):
        for number in range(1, 10):
            sizes.append(len(guard.admit(number, CLIENTS)))
    guard.close()
    assert sizes[0] == 4 and min(sizes) >= 2


# -- what must agree on resume


def test_a_changed_recipe_is_refused(tmp_path: Path) -> None:
    privacy = Privacy("client", epsilon=2.0, delta=1e-3, accountant="rdp")
    guard_of(tmp_path, rounds_of(), privacy).close()
    guard_of(tmp_path, rounds_of(), privacy).close()
    for changed in (
        dataclasses.replace(privacy, epsilon=8.0),
        dataclasses.replace(privacy, clip_norm=2.0),
        dataclasses.replace(privacy, delta=1e-4),
        dataclasses.replace(privacy, max_rounds=1),
    ):
        with pytest.raises(FedpeftError, match="began with other terms of privacy.*'epsilon': 2.0"):
            guard_of(tmp_path, rounds_of(), changed)
    for rounds in (rounds_of(count=7), rounds_of("poisson", rate=0.1)):
        with pytest.raises(FedpeftError, match="began with other terms of privacy"):
            guard_of(tmp_path, rounds, privacy)
    with pytest.raises(FedpeftError, match="seed=1, was 0"):
        guard_of(tmp_path, rounds_of(), privacy, seed=1)


def test_terms_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3)
    guard_of(tmp_path, rounds_of(), privacy).close()
    for damage in ("{", "[]", "{}"):
        (tmp_path / "privacy.json").write_text(damage)
        with pytest.raises(FedpeftError, match=r"privacy\.json is damaged .* Restore it"):
            guard_of(tmp_path, rounds_of(), privacy)


def test_a_ledger_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    """Test 55 of the list: also where it is gone altogether, so that no spending is forgotten."""
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of(), privacy)
    for number in (1, 2):
        guard.admit(number, CLIENTS)
    head = guard.ledger.head
    guard.close()
    path = tmp_path / "privacy.jsonl"
    guard_of(tmp_path, rounds_of(), privacy, head=head).close()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(FedpeftError, match="does not hold the line"):
        guard_of(tmp_path, rounds_of(), privacy, head=head)
    path.unlink()
    with pytest.raises(FedpeftError, match="does not hold the line"):
        guard_of(tmp_path, rounds_of(), privacy, head=head)


def test_rounds_that_are_played_again_are_named(tmp_path: Path) -> None:
    privacy = Privacy("client", noise_multiplier=2.0, delta=1e-3)
    guard = guard_of(tmp_path, rounds_of(), privacy)
    assert guard.again(0) == []
    for number in (1, 2, 3):
        guard.admit(number, CLIENTS)
    assert guard.again(3) == []
    [text] = guard.again(1)
    assert "rounds up to 3" in text and "from 2 on are charged once more" in text
    guard.close()


def test_nothing_is_charged_to_nobody(tmp_path: Path) -> None:
    guard = guard_of(tmp_path, rounds_of(), Privacy("client", noise_multiplier=2.0, delta=1e-3))
    assert guard.ledger.clients() == [] and guard.ledger.spent("c0") == Nothing()
    assert guard.statement().epsilon == (0.0, 0.0, 0.0)
    guard.close()
