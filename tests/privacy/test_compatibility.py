"""What goes together, what does not, and the table that says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.attacks.settings import Attack
from fedpeft.codecs.settings import Codec
from fedpeft.config import Comms, Privacy, Recipe, SecureAggregation
from fedpeft.errors import FedpeftError
from fedpeft.privacy.compatibility import COLUMNS, check_compatible, table
from fedpeft.robust.settings import Robust
from fedpeft.strategy import available, build
from tests.privacy.federated import CLIENT, RECORD, flat, play, prepared_of, recipe_of

ASKS: dict[str, dict[str, Any]] = {
    "record": {"privacy": RECORD},
    "client": {"privacy": CLIENT},
    "secure aggregation": {"secure_aggregation": SecureAggregation(enabled=True)},
    "robust rule": {"robust": Robust(rule="median")},
    "uplink codec": {"comms": Comms(up=Codec("topk", "int8"))},
    "downlink codec": {"comms": Comms(down=Codec("topk", "fp16"))},
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"


def cells() -> dict[tuple[str, str], str]:
    """(strategy, column) -> what the table says."""
    lines = [line.strip("| ").split(" | ") for line in table().splitlines() if line[:1] == "|"]
    head, _, *rows = lines
    return {
        (row[0].strip("`"), column): mark
        for row in rows
        for column, mark in zip(head[1:], row[1:], strict=True)
    }


def test_the_table_has_every_strategy_and_every_column() -> None:
    assert list(COLUMNS) == list(ASKS)
    assert cells().keys() == {(name, column) for name in available() for column in COLUMNS}


def test_the_document_holds_the_table() -> None:
    """Generated: python -c "from fedpeft.privacy.compatibility import table; print(table())"."""
    assert DOCUMENT.read_text(encoding="utf-8").endswith("\n\n" + table())


def test_every_no_has_a_reason_below_the_table() -> None:
    notes = [line for line in table().splitlines() if line[:1].isdigit()]
    numbers = {mark.removeprefix("no ") for mark in cells().values() if mark != "yes"}
    assert numbers == {f"[{note.split('.')[0]}]" for note in notes}
    assert all(note.endswith(".") and ": " in note for note in notes)  # what, and the way out


@pytest.mark.parametrize("column", list(ASKS))
@pytest.mark.parametrize("name", sorted(available()))
def test_every_cell_is_played_or_refused(name: str, column: str) -> None:
    recipe = recipe_of(name, **ASKS[column])
    strategy = build(name, {})
    if cells()[name, column] != "yes":
        with pytest.raises(FedpeftError, match=rf"with strategy\.name='{name}': .*: use "):
            check_compatible(recipe, strategy)
        return
    check_compatible(recipe, strategy)
    prepared = prepared_of(recipe)
    states, reports = play(prepared, 1)
    assert not reports[0].excluded and reports[0].replied == len(prepared.population.clients)
    assert bool(torch.isfinite(flat(prepared.strategy.adapter(states[-1]))).all())


ROBUST, ATTACK = Robust(rule="median"), Attack(kind="sign_flip")
SECURE = SecureAggregation(enabled=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"robust": ROBUST, "secure_aggregation": SECURE},
            r"robust\.rule=median with secure_aggregation\.enabled: it works on single updates",
        ),
        (
            {"robust": ROBUST, "privacy": CLIENT},
            r"robust\.rule=median with privacy\.unit=client: how far one client moves",
        ),
        (
            {"attack": ATTACK, "secure_aggregation": SECURE},
            r"attack\.kind=sign_flip with secure_aggregation\.enabled: it works on single updates",
        ),
        (
            {"attack": ATTACK, "privacy": CLIENT},
            r"attack\.kind=sign_flip with privacy\.unit=client: noise hides what an attack does",
        ),
    ],
)
def test_what_is_impossible_together_says_why(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FedpeftError, match=sentence):
        check_compatible(recipe_of(**changes), build("fedavg", {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"robust": ROBUST, "privacy": RECORD},
        {"attack": ATTACK, "privacy": RECORD},
        {"robust": ROBUST, "attack": ATTACK},
        {"privacy": CLIENT, "secure_aggregation": SECURE},
        {"privacy": RECORD, "secure_aggregation": SECURE},
    ],
)
def test_what_is_possible_together_is_played(changes: dict[str, Any]) -> None:
    recipe: Recipe = recipe_of(**changes)
    check_compatible(recipe, build("fedavg", {}))
    states, reports = play(prepared_of(recipe), 1)
    assert reports[0].replied == 4 and bool(torch.isfinite(flat(states[-1].adapter)).all())


def test_a_users_own_settings_count_and_not_the_name() -> None:
    """Fed-SB asks for gradients only where its start is made of private ones."""
    plain = build("fed_sb", {})
    check_compatible(recipe_of("fed_sb", privacy=RECORD), plain)
    asking = dataclasses.replace(recipe_of("lora_a2"), privacy=Privacy())
    check_compatible(asking, build("lora_a2", {}))
