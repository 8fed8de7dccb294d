"""How many clients a sum must have: the recipe's threshold, and as many as must share the noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedpeft.federation import Failure
from fedpeft.flower.summed import Rules
from fedpeft.prepare import Prepared, prepare
from tests.flower.securely import (
    NAMES,
    SERVER_NOISE,
    STAGES,
    grid_of,
    in_process,
    on_flower,
    partial,
    recipe_of,
    sent,
    silent,
)

pytestmark = pytest.mark.usefixtures("flower_task")


def sharing(tiny: Path) -> Prepared:
    """All four clients must share the noise; the threshold alone would let three."""
    recipe = recipe_of(tiny, dataclasses.replace(SERVER_NOISE, noise="shares"))
    return prepare(
        dataclasses.replace(recipe, rounds=dataclasses.replace(recipe.rounds, quorum=1.0))
    )


def test_without_enough_shares_of_the_noise_there_is_no_sum(tiny: Path) -> None:
    prepared = sharing(tiny)
    assert Rules(prepared).least(4) == 4 > Rules(prepare(recipe_of(tiny))).least(4) == 3
    assert partial(on_flower(prepared, grid_of()).run(1, sent(prepared))).clients == 4
    grid = grid_of(silent(STAGES["mask"], "c1"))
    found = list(on_flower(prepared, grid, wait=0.05).run(1, sent(prepared)))
    assert all(isinstance(one, Failure) for one in found) and len(found) == 4
    assert "3 of 4 clients are left, and the threshold is 4" in found[0].reason
    for federation in (on_flower(prepared, grid_of()), in_process(prepared.recipe)):
        few = list(federation.run(1, sent(prepared, NAMES[:3])))
        assert [one.client for one in few if isinstance(one, Failure)] == list(NAMES[:3])
        assert all("3 clients, 4 are needed" in one.reason for one in few)


def test_clients_refuse_a_sum_with_too_few_shares_of_the_noise(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = sharing(tiny)
    federation = on_flower(prepared, grid_of())
    monkeypatch.setattr(federation._rules, "least", lambda clients: 3)  # the server's alone
    found = list(federation.run(1, sent(prepared)))
    assert all(isinstance(one, Failure) for one in found) and len(found) == 4
    assert all("threshold=3, and by the recipe it must be at least 4" in f.reason for f in found)
