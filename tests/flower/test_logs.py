"""A node's structured log: where each line belongs, and that nothing of it leaves the node."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeft.engine import play_round
from fedpeft.flower import client_app
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.prepare import prepare
from tests.flower.nodes import InProcess
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.usefixtures("flower_task")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A node's log lasts as long as its process."""
    root, own = logging.getLogger(), logging.getLogger("fedpeft")
    handlers, level = list(root.handlers), own.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    own.setLevel(level)
    client_app.log_to.cache_clear()


def play(tiny: Path, log: Path) -> dict[str, str]:
    """A round in which c1 fails with what it knows of its data; why clients were excluded."""
    recipe = tiny_recipe(tiny)
    nodes: dict[int, dict[str, Any]] = {k: {"client": f"c{k}", "log": str(log)} for k in range(4)}
    federation = FlowerFederation(
        InProcess(nodes), recipe, 4, None, Patience(0.05, 5.0), run="ab12"
    )
    prepared = prepare(recipe)
    strategy = prepared.strategy
    state = strategy.init(prepared.problem)
    _, report = play_round(strategy, state, federation, recipe.rounds, recipe.seed, 1)
    return report.excluded


def test_a_failure_is_logged_with_run_round_and_client(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = client_app._trained

    def failing(*arguments: Any) -> Any:
        if arguments[1].clients == ("c1",):
            raise RuntimeError("the patient's name")
        return train(*arguments)

    monkeypatch.setattr(client_app, "_trained", failing)
    excluded = play(tiny, tmp_path / "log.jsonl")
    assert excluded == {"c1": "RuntimeError (the traceback is in the node's log)"}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if "traceback" in line]
    assert (line["run"], line["round"], line["client"]) == ("ab12", 1, "c1")
    assert line["traceback"].endswith("RuntimeError: the patient's name")
    assert line["message"] == "train failed"


def test_the_path_of_a_log_does_not_leave_the_node(tiny: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny)
    nodes: dict[int, dict[str, Any]] = {0: {"client": "c0", "log": str(tmp_path / "no" / "log")}}
    federation = FlowerFederation(InProcess(nodes), recipe, 1, None, Patience(0.05, 5.0))
    with pytest.raises(ValueError, match="FileNotFoundError .the traceback is") as failure:
        federation.clients()
    assert str(tmp_path) not in str(failure.value)
