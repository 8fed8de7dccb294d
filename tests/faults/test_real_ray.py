"""Clients that take their processes with them, on Flower's real simulation engine."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch

from fedpeft.engine import RoundReport, play_round
from fedpeft.federation import Federation
from fedpeft.flower.federation import Patience
from fedpeft.flower.simulate import run_in_simulation
from fedpeft.prepare import Prepared, prepare
from fedpeft.tree import Tree
from tests.faults.register import fault
from tests.tiny import tiny_recipe, write_tiny

# Ray neither closes its handles on /dev/null nor asks its ended processes for their exit status.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

CLIENTS = 12


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Twelve clients; the actors' cache of the data too."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tiny(tmp_path, sizes=(6,) * CLIENTS)
    yield tmp_path
    gc.collect()  # while the warnings that it gives rise to are off


def rounds(
    files: Path, orders: dict[int, str], patience: Patience | None = None
) -> tuple[Tree, list[RoundReport], Prepared]:
    """The rounds on two actors, client c1 under ``orders`` in the rounds that they name."""
    file = files / "orders"
    recipe = tiny_recipe(files, name="tests.faults.crasher", orders=str(file))
    recipe = dataclasses.replace(recipe, rounds=dataclasses.replace(recipe.rounds, count=5))
    prepared = prepare(recipe)
    reports: list[RoundReport] = []

    def body(federation: Federation) -> Tree:
        state = prepared.strategy.init(prepared.problem)
        for number in range(1, 6):
            file.write_text(orders.get(number, "0"))
            state, report = play_round(
                prepared.strategy, state, federation, recipe.rounds, recipe.seed, number
            )
            reports.append(report)
        return prepared.strategy.adapter(state)

    adapter = run_in_simulation(recipe, CLIENTS, 2, body, patience=patience)
    assert not ray.is_initialized()
    alive = psutil.Process().children(recursive=True)
    assert [c for c in alive if c.status() != psutil.STATUS_ZOMBIE] == []
    return adapter, reports, prepared


def without_c1(prepared: Prepared, files: Path) -> Tree:
    """The adapter of the same rounds in this process, c1 missing in round 2."""
    (files / "orders").write_text("0")
    strategy, federation = prepared.strategy, prepared.federation()
    state = strategy.init(prepared.problem)
    for number in range(1, 6):
        names = tuple(n for n in federation.clients() if n != "c1" or number != 2)
        replies = list(federation.run(number, strategy.send(state, number, names)))
        state = strategy.receive(state, iter(replies))  # type: ignore[arg-type]
    return strategy.adapter(state)


def close(left: Tree, right: Tree) -> bool:
    return all(torch.allclose(left[name], value, atol=1e-5) for name, value in right.items())


@fault(30, "X")
def test_a_process_that_dies_takes_no_other_client_with_it(files: Path) -> None:
    """Twice in round 2: the client is excluded there, and every other round has all twelve."""
    adapter, reports, prepared = rounds(files, {2: "2", 4: "1"})
    assert [report.replied for report in reports] == [12, 11, 12, 12, 12]
    [(client, reason)] = reports[1].excluded.items()
    assert client == "c1" and "its process died 2 times in a row" in reason
    assert close(adapter, without_c1(prepared, files))


@fault(29, "X")
def test_a_client_that_hangs_is_killed_in_time_and_the_run_ends(files: Path) -> None:
    patience = Patience(reply=20.0)
    adapter, reports, prepared = rounds(files, {2: "hang"}, patience)
    assert [report.replied for report in reports] == [12, 11, 12, 12, 12]
    [(client, reason)] = reports[1].excluded.items()
    assert client == "c1" and "within 20 seconds" in reason
    assert close(adapter, without_c1(prepared, files))
