"""The plan says what the run then does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedpeft.config import Engine, Output, Rounds, Sampling
from fedpeft.engine import RoundReport
from fedpeft.events import Watcher
from fedpeft.metrics import Score
from fedpeft.plan import Plan, make_plan
from fedpeft.prepare import prepare
from fedpeft.run import run
from fedpeft.steps import steps_of
from tests.tiny import tiny_recipe, write_tiny


class Books(Watcher):
    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.reports: list[RoundReport] = []
        self.tokens: list[int] = []
        self.trained = 0

    def planned(self, plan: Plan, folder: str) -> None:
        self.plan = plan

    def round_began(self, number: int, clients: int, tokens: int) -> None:
        self.tokens.append(tokens)

    def chunk_done(self, clients: int, tokens: int) -> None:
        self.trained += tokens

    def round_done(self, report: RoundReport, score: Score | None) -> None:
        self.reports.append(report)


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "local"])
def test_planned_bytes_and_clients_are_what_the_run_counts(tmp_path: Path, strategy: str) -> None:
    write_tiny(tmp_path)
    made = dataclasses.replace(
        tiny_recipe(tmp_path, name=strategy),
        rounds=Rounds(count=2, sampling=Sampling("fixed", size=3)),
        engine=Engine(device="cpu", threads=1),
        output=Output(folder=str(tmp_path / "run")),
        baselines=(),
    )
    planned = make_plan(prepare(made))
    assert not (tmp_path / "run").exists()
    books = Books()
    run(made, books)
    assert books.plan is not None and books.plan.down == planned.down
    for report in books.reports:
        assert len(report.sampled) == planned.sampled == 3
        assert report.down == {kind: 3 * size for kind, size in planned.down.items()}
        assert report.up == {kind: 3 * size for kind, size in planned.up.items()}
    assert books.trained == sum(books.tokens)
    assert planned.clients == 4 and planned.examples[0] >= 1
    assert planned.trainable["head"] == 16 * 3 + 3


def test_the_plan_spreads_clients_as_a_loop_would(tmp_path: Path) -> None:
    write_tiny(tmp_path, sizes=(14, 4, 4, 11, 4, 4))
    prepared = prepare(dataclasses.replace(tiny_recipe(tmp_path), engine=Engine(device="cpu")))
    sizes = sorted(len(client.train) for client in prepared.population.clients)
    steps = sorted(steps_of(size, prepared.recipe.local) for size in sizes)
    plan = make_plan(prepared)
    assert len(set(steps)) > 1
    assert plan.steps == (steps[0], (steps[2] + steps[3]) // 2, steps[-1])
    assert plan.examples == (sizes[0], (sizes[2] + sizes[3]) // 2, sizes[-1])


def test_of_many_clients_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path, sizes=(6, 11, 4, 14, 4))
    prepared = prepare(dataclasses.replace(tiny_recipe(tmp_path), engine=Engine(device="cpu")))
    every = prepared.federation()
    monkeypatch.setattr("fedpeft.plan.SOME", 2)
    assert make_plan(prepared).tokens == round(5 * (every.tokens("c0") + every.tokens("c3")) / 2)
