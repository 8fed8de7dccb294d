"""A real node's own ledger: charged before its records are used, and it outlives the node."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedpeft.config import Local, Privacy, Recipe, Rounds, SecureAggregation
from fedpeft.flower import client_app
from fedpeft.flower.client_app import app, simulated
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.identity import read_identities
from fedpeft.flower.secure import SecureFlowerFederation
from fedpeft.message import Messages
from fedpeft.prepare import Prepared, prepare
from fedpeft.privacy.events import compose
from fedpeft.privacy.ledger import Budget, Ledger
from tests.flower.nodes import InProcess
from tests.flower.securely import NAMES, partial, sent, write_keys
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("flower_task")

RECORD = Privacy(unit="record", noise_multiplier=1.0, clip_norm=0.5, delta=1e-3, max_rounds=2)


def recipe_of(folder: Path, privacy: Privacy = RECORD, **strategy: Any) -> Recipe:
    return dataclasses.replace(
        tiny_recipe(folder, **strategy),
        privacy=privacy,
        rounds=Rounds(count=2),
        local=Local(optimizer="sgd", lr=0.1, batch_size=4),
    )


def real(ledgers: Path, names: tuple[str, ...] = NAMES) -> dict[int, dict[str, Any]]:
    """Every node with a ledger of its own."""
    return {
        10 + k: {"client": name, "privacy-ledger": str(ledgers / f"{name}.jsonl")}
        for k, name in enumerate(names)
    }


def on_flower(prepared: Prepared, grid: InProcess) -> FlowerFederation:
    return FlowerFederation(grid, prepared.recipe, 4, None, Patience(0.05, 5.0))


def outcomes(
    federation: Any, number: int, prepared: Prepared, names: tuple[str, ...] = NAMES
) -> set[str]:
    """What came of the clients: their reasons, or that they answered."""
    found: list[str] = []
    for one in federation.run(number, sent(prepared, names)):
        found += ["answered"] * len(one) if isinstance(one, Messages) else [one.reason]
    assert len(found) == len(names)
    return set(found)


def rounds_spent(path: Path) -> list[int]:
    return [text.count('"round"') for text in path.read_text().splitlines()[1:]]


def test_each_round_is_on_the_nodes_ledger_before_its_records_are_used(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(recipe_of(tiny))
    lines: list[int] = []
    plan = type(prepared.terms.mechanism).plan  # type: ignore[union-attr]

    def watched(self: Any, train: Any) -> Any:
        lines.append(sum(len(rounds_spent(path)) for path in tmp_path.iterdir()))
        return plan(self, train)

    monkeypatch.setattr(type(prepared.terms.mechanism), "plan", watched)  # type: ignore[union-attr]
    federation = on_flower(prepared, InProcess(real(tmp_path)))
    assert outcomes(federation, 1, prepared) == {"answered"}
    assert sorted(lines) == [1, 2, 3, 4]
    assert outcomes(federation, 2, prepared) == {"answered"}
    with Ledger.open(tmp_path / "c1.jsonl", Budget(100.0, 1e-3)) as ledger:
        assert ledger.clients() == ["c1"]
        terms = prepared.terms
        assert terms is not None
        assert ledger.spent("c1") == compose([terms.event(9)] * 2)


def test_without_a_ledger_no_record_is_used(tiny: Path) -> None:
    prepared = prepare(recipe_of(tiny))
    grid = InProcess({k: {"client": name} for k, name in enumerate(NAMES)})
    [reason] = outcomes(on_flower(prepared, grid), 1, prepared)
    assert "privacy.unit=record needs node config privacy-ledger=FILE" in reason


def restart(grid: InProcess) -> None:
    """Node processes that begin anew: nothing is left but files."""
    client_app._prepared.cache_clear()
    for number, old in grid.contexts.items():
        grid.contexts[number] = Context(1, number, dict(old.node_config), RecordDict(), {})


def test_a_node_that_starts_again_still_refuses_when_its_rounds_are_spent(
    tiny: Path, tmp_path: Path
) -> None:
    prepared = prepare(recipe_of(tiny))
    grid = InProcess(real(tmp_path))
    for number in (1, 2):
        restart(grid)
        assert outcomes(on_flower(prepared, grid), number, prepared) == {"answered"}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for number in (2, 3, 1):
        restart(grid)
        reasons = outcomes(on_flower(prepared, grid), number, prepared)
        assert len(reasons) == 4
        assert all("has taken part in 2 rounds" in reason for reason in reasons)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_node_that_starts_again_still_refuses_when_its_epsilon_is_spent(
    tiny: Path, tmp_path: Path
) -> None:
    spent = dataclasses.replace(RECORD, accountant="rdp")
    first = prepare(recipe_of(tiny, spent))
    grid = InProcess(real(tmp_path))
    assert outcomes(on_flower(first, grid), 1, first, ("c1",)) == {"answered"}
    budget = dataclasses.replace(spent, noise_multiplier=0.0, epsilon=3.0)
    second = prepare(recipe_of(tiny, budget))
    restart(grid)
    [reason] = outcomes(on_flower(second, grid), 1, second, ("c1",))
    assert "over its budget of 3 at delta=0.001" in reason


def test_a_second_exchange_is_free_and_cannot_train_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(recipe_of(tiny, name="fedask"))
    grid = InProcess(real(tmp_path))
    federation = on_flower(prepared, grid)
    strategy, state = prepared.strategy, prepared.strategy.init(prepared.problem)
    for number in (1, 2):
        for _ in range(2):
            replies = list(federation.run(number, strategy.send(state, number, NAMES)))
            assert all(isinstance(reply, Messages) for reply in replies)
            state = strategy.receive(state, iter(replies))  # type: ignore[arg-type]
    assert [len(rounds_spent(tmp_path / f"{name}.jsonl")) for name in NAMES] == [2] * 4
    fresh = prepare(
        recipe_of(tiny, name="fedask", privacy=dataclasses.replace(RECORD, max_rounds=2))
    )
    again = InProcess(real(tmp_path / "again"))
    (tmp_path / "again").mkdir()
    federation = on_flower(fresh, again)
    assert outcomes(federation, 1, fresh) == {"answered"}
    kept = {n: c.state["memory.own"] for n, c in again.contexts.items()}
    reasons = outcomes(federation, 1, fresh)  # the first message once more, as a later exchange
    assert reasons == {
        "FedpeftError: exchange 1 of round 1 trained again, which is not charged: a round's data "
        "are used in its first exchange only."
    }
    assert kept == {n: c.state["memory.own"] for n, c in again.contexts.items()}


def test_a_node_with_a_ledger_trains_for_no_recipe_without_one(tiny: Path, tmp_path: Path) -> None:
    prepared = prepare(tiny_recipe(tiny))
    [reason] = outcomes(on_flower(prepared, InProcess(real(tmp_path))), 1, prepared)
    assert "this node trains with privacy.unit=record only, not 'none'" in reason


def test_noise_that_the_recipe_tells_is_refused_by_real_nodes(tiny: Path, tmp_path: Path) -> None:
    seeded = dataclasses.replace(RECORD, randomness="seeded")
    recipe = recipe_of(tiny, seeded)
    recipe = dataclasses.replace(
        recipe, engine=dataclasses.replace(recipe.engine, kind="cohort", workers=1)
    )
    prepared = prepare(recipe)
    [reason] = outcomes(on_flower(prepared, InProcess(real(tmp_path))), 1, prepared)
    assert "privacy.randomness=seeded on a real node" in reason


def test_a_simulated_node_leaves_the_books_to_the_run(tiny: Path) -> None:
    prepared = prepare(recipe_of(tiny))
    nodes = {k: {"partition-id": k, "num-partitions": 4} for k in range(4)}
    assert outcomes(on_flower(prepared, InProcess(nodes, app=simulated)), 1, prepared) == {
        "answered"
    }


def test_under_secure_aggregation_too_a_round_is_charged_once(tiny: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        recipe_of(tiny), secure_aggregation=SecureAggregation(enabled=True, clip_norm=10.0)
    )
    prepared, config = prepare(recipe), write_keys(tmp_path / "keys")
    for number, own in real(tmp_path).items():
        config[number] |= own
    inner = on_flower(prepared, InProcess(config, app=app))
    keys = read_identities(tmp_path / "keys" / "all.json")
    federation = SecureFlowerFederation(prepared, inner, keys)
    for number in (1, 2):
        assert partial(federation.run(number, sent(prepared))).clients == 4
    assert [len(rounds_spent(tmp_path / f"{name}.jsonl")) for name in NAMES] == [2] * 4
    reasons = outcomes(federation, 3, prepared)
    assert all(r.startswith("stage mask: FedpeftError: client 'c") for r in reasons)
    assert all("has taken part in 2 rounds" in reason for reason in reasons)
