"""What clients keep between rounds is kept on Flower's nodes, and gives what one process gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from flwr.app import RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft.config import Rounds, Sampling
from fedpeft.engine import play_round
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.federation import Failure
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.prepare import prepare
from fedpeft.strategy import addressed
from fedpeft.tree import Tree
from tests.flower.nodes import InProcess
from tests.tiny import tiny_recipe, write_tiny

NODES = {900 - k: {"partition-id": k, "num-partitions": 4} for k in range(4)}


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        write_tiny(folder)
        yield folder


def gap(left: Tree, right: Tree) -> float:
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).abs().max()) for n in left)


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedex_lora"},
        {"name": "flora", "ranks": [1, 2]},
        {"name": "fedmomentum", "energy": 1.0},
        {"name": "fed_plora", "ranks": [1, 2]},
        {"name": "fedask"},
        {"name": "ravan"},
        {"name": "hetlora", "ranks": [1, 2]},
        {"name": "fedspine", "step": 0.9},
        {"name": "light_peft", "estimate": 1, "modules": 0.5},
        {"name": "fed_sb", "start": "weights"},
        {"name": "fed_sb", "start": "gradients", "first_step": 0.01},
    ],
    ids=lambda own: "-".join(str(v) for v in own.values()),
)
def test_what_clients_keep_is_kept_on_the_nodes(folder: Path, strategy: dict[str, Any]) -> None:
    """Some clients miss rounds; bytes, adapter and base are those of one process."""
    recipe = tiny_recipe(folder, **strategy)
    rounds = Rounds(count=4, sampling=Sampling("uniform", fraction=0.5))
    recipe = dataclasses.replace(recipe, rounds=rounds)
    prepared = prepare(recipe)
    federation = FlowerFederation(InProcess(NODES), recipe, 4, patience=Patience(0.05, 5.0))
    states, books = [], []
    for at in (federation, prepared.federation()):
        state, own = prepared.strategy.init(prepared.problem), []
        for number in range(1, 5):
            state, report = play_round(prepared.strategy, state, at, rounds, 0, number)
            own.append((report.sampled, report.down, report.up, report.excluded))
        states.append(state)
        books.append(own)
    assert books[0] == books[1] and not any(excluded for *_, excluded in books[0])
    found, wanted = (prepared.strategy.adapter(state) for state in states)
    assert gap(found, wanted) <= 1e-6
    ours, theirs = (prepared.strategy.base(state) for state in states)
    if prepared.strategy.folds:
        assert gap(ours, theirs) <= 1e-6 and any("base" in down for _, down, *_ in books[0])
        assert len({sampled for sampled, *_ in books[0]}) > 1
    sent = addressed(prepared.strategy, states[0], 4, ("c0", "c1", "c2", "c3"))
    assert not [part for part in federation.evaluate(4, *sent) if isinstance(part, Failure)]


def test_a_node_that_lost_the_base_is_refused(folder: Path) -> None:
    recipe = tiny_recipe(folder, name="fedex_lora")
    prepared = prepare(recipe)
    grid = InProcess(NODES)
    federation = FlowerFederation(grid, recipe, 4, patience=Patience(0.05, 5.0))
    state = prepared.strategy.init(prepared.problem)
    for number in (1, 2):
        state, _ = play_round(prepared.strategy, state, federation, recipe.rounds, 0, number)
    for record in grid.contexts.values():
        record.state = RecordDict()
    rounds = dataclasses.replace(recipe.rounds, quorum=1.0)
    with pytest.raises(QuorumError, match=r"keeps version 0 of 'base'.*after version 1"):
        play_round(prepared.strategy, state, federation, rounds, 0, 3)


def test_a_run_whose_clients_keep_something_is_not_resumed_on_new_nodes(folder: Path) -> None:
    recipe = tiny_recipe(folder, name="fedex_lora")
    federation = FlowerFederation(InProcess(NODES), recipe, 4)
    with pytest.raises(FedpeftError, match=r"cannot resume.*engine\.kind=cohort"):
        federation.restore({"c0": {}})
