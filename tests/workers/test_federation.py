"""Several workers give the round that one process gives: state, books, memory, scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.config import Engine, Recipe, Rounds, Sampling
from fedpeft.engine import RoundReport, play_round
from fedpeft.federation import Failure, Federation, Partial
from fedpeft.prepare import Prepared, prepare
from fedpeft.strategies.fedavg import FedAvg, State
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy
from fedpeft.workers.federation import WorkersFederation
from tests.tiny import tiny_recipe, write_tiny
from tests.workers.fake import FakePool

SIZES = (6, 11, 4, 14, 7, 9, 5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, SIZES)
    return folder


@pytest.fixture(scope="module")
def fedavg(files: Path) -> Prepared:
    return prepare(recipe(files))


def recipe(files: Path, **strategy: Any) -> Recipe:
    rounds = Rounds(count=3, sampling=Sampling("uniform", fraction=0.8), failure_rate=0.1)
    engine = Engine(chunk=2, device="cpu", workers=3)
    return dataclasses.replace(tiny_recipe(files, **strategy), rounds=rounds, engine=engine)


def with_strategy(prepared: Prepared, strategy: Strategy[Any]) -> Prepared:
    return dataclasses.replace(prepared, strategy=strategy)


def play(
    prepared: Prepared, federation: Federation, start: int = 1, state: Any = None
) -> tuple[Any, list[RoundReport]]:
    """Rounds ``start`` to 3; the state after them and the reports, less the time."""
    rounds, reports = prepared.recipe.rounds, []
    state = prepared.strategy.init(prepared.problem) if state is None else state
    for number in range(start, rounds.count + 1):
        state, report = play_round(prepared.strategy, state, federation, rounds, 0, number)
        reports.append(dataclasses.replace(report, seconds=0.0))
    return state, reports


def same_books(found: Sequence[RoundReport], wanted: Sequence[RoundReport]) -> bool:
    """Equal reports; the loss up to the rounding of sums in another order."""
    return all(
        dataclasses.replace(f, loss=w.loss) == w and f.loss == pytest.approx(w.loss, rel=1e-6)
        for f, w in zip(found, wanted, strict=True)
    )


def apart(found: tree.Tree, wanted: tree.Tree) -> float:
    return tree.norm(tree.sub(found, wanted)) / tree.norm(wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "fedex_lora"},
        {"name": "flora"},
        {"name": "fed_sb", "start": "weights"},
        {"name": "fedmomentum", "energy": 1.0},
        {"name": "fedask"},
    ],
)
def test_what_clients_keep_goes_with_their_shard(files: Path, settings: dict[str, Any]) -> None:
    """Clients miss rounds and change worker; base, books and memory are one process's."""
    prepared = prepare(recipe(files, **settings))
    at = WorkersFederation(prepared, FakePool(prepared, 3))
    (state, reports), (wanted, books) = play(prepared, at), play(prepared, prepared.federation())
    assert same_books(reports, books) and not any(r.excluded for r in reports)
    assert len({r.sampled for r in reports}) > 1
    strategy = prepared.strategy
    assert apart(strategy.adapter(state), strategy.adapter(wanted)) <= 1e-6
    if strategy.folds:
        assert apart(strategy.base(state), strategy.base(wanted)) <= 1e-5
        assert tree.norm(strategy.base(wanted)) > 0


@dataclass(frozen=True)
class Median(Strategy[State]):
    """Coordinatewise median: not linear, so it needs every reply."""

    def init(self, problem: Problem) -> State:
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return FedAvg().send(state, round, clients)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        return FedAvg().train(messages, cohort)

    def receive(self, state: State, replies: Replies) -> State:
        stacks = [reply.trees["adapter"] for reply in replies]
        return State({n: torch.cat([s[n] for s in stacks]).median(0).values for n in stacks[0]})

    def adapter(self, state: State) -> tree.Tree:
        return state.adapter


@dataclass(frozen=True)
class Faults(FedAvg):  # type: ignore[misc]
    """FedAvg in which c1's reply is NaN and c3's training fails."""

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if "c3" in cohort.clients:
            raise OSError("disk on fire")
        reply = super().train(messages, cohort)
        if "c1" in cohort.clients:
            name = next(iter(cohort.initial))
            reply.trees["adapter"][name][cohort.clients.index("c1")] = torch.nan
        return reply


@pytest.mark.parametrize("strategy", [FedAvg(), Faults(), Median()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("workers", [2, 3, 9])
def test_workers_give_the_state_and_the_books_of_one_process(
    fedavg: Prepared, strategy: Strategy[Any], workers: int
) -> None:
    prepared = with_strategy(fedavg, strategy)
    wanted, books = play(prepared, prepared.federation())
    found, reports = play(prepared, WorkersFederation(prepared, FakePool(prepared, workers)))
    assert apart(found.adapter, wanted.adapter) <= 1e-6
    assert apart(wanted.adapter, prepared.network.initial) > 1e-3
    assert same_books(reports, books)
    assert any(r.dropped for r in books)
    if strategy == Faults():
        assert {"c1", "c3"} <= {name for report in reports for name in report.excluded}


def test_partial_sums_come_back_of_linear_strategies_and_whole_replies_of_others(
    fedavg: Prepared,
) -> None:
    for strategy in (FedAvg(), Median()):
        prepared = with_strategy(fedavg, strategy)
        federation = WorkersFederation(prepared, FakePool(prepared, 2))
        sent = strategy.send(strategy.init(prepared.problem), 1, tuple(federation.clients()))
        found = list(federation.run(1, sent))
        if strategy.linear:
            assert [type(f) for f in found] == [Partial, Partial]
            rows = [f.replies for f in found if isinstance(f, Partial)]
            assert [len(r) for r in rows] == [1, 1]
            assert sum(float(r.scalars["weight"]) for r in rows) == sum(
                federation.clients().values()
            )
        else:
            names = [name for f in found if isinstance(f, Messages) for name in f.clients]
            assert sorted(names) == sorted(sent.clients)


def test_the_order_of_arrival_changes_no_bit(fedavg: Prepared) -> None:
    class FirstInFirstOut(FakePool):
        def first(self, waiting: Sequence[Any]) -> Any:
            return waiting[0]

    pools = [FakePool(fedavg, 3), FirstInFirstOut(fedavg, 3)]
    one, two = (play(fedavg, WorkersFederation(fedavg, pool)) for pool in pools)
    assert pools[0].order[:3] == [2, 1, 0] and pools[1].order[:3] == [0, 1, 2]
    assert all(torch.equal(one[0].adapter[n], v) for n, v in two[0].adapter.items())
    assert one[1] == two[1]


def test_a_worker_that_dies_changes_no_bit(fedavg: Prepared) -> None:
    pool = FakePool(fedavg, 3, deaths=(1, 0, 2))
    wanted = play(fedavg, WorkersFederation(fedavg, FakePool(fedavg, 3)))
    found = play(fedavg, WorkersFederation(fedavg, pool))
    assert sorted(pool.replaced) == [0, 2, 2]
    assert all(torch.equal(found[0].adapter[n], v) for n, v in wanted[0].adapter.items())
    assert found[1] == wanted[1]


def test_a_worker_that_dies_again_and_again_costs_its_clients_and_the_round_goes_on(
    fedavg: Prepared,
) -> None:
    pool = FakePool(fedavg, 2, deaths=(3,))
    federation = WorkersFederation(fedavg, pool)
    state = FedAvg().init(fedavg.problem)
    sent = FedAvg().send(state, 1, tuple(federation.clients()))
    found = list(federation.run(1, sent))
    lost = [f for f in found if isinstance(f, Failure)]
    (kept,) = [f for f in found if isinstance(f, Partial)]
    assert len(lost) + kept.clients == len(SIZES) and len(lost) >= 1
    for failure in lost:
        assert failure.reason == (
            "its worker died 3 times in a row: killed. If memory ran out, lower engine.chunk or "
            "engine.workers."
        )
    assert all(not isinstance(f, Failure) for f in federation.run(1, sent))


def test_private_memory_lives_here_and_goes_with_the_shard(files: Path) -> None:
    prepared = prepare(recipe(files, name="local"))
    strategy, rounds = prepared.strategy, prepared.recipe.rounds
    alone, federation, half, rest = (
        prepared.federation(),
        *(WorkersFederation(prepared, FakePool(prepared, 3)) for _ in range(3)),
    )
    _, books = play(prepared, alone)
    _, reports = play(prepared, federation)
    assert same_books(reports, books)
    one, two = alone.memory(), federation.memory()
    assert one.keys() == two.keys() and len(one) >= len(SIZES) - 1
    for client, kept in one.items():
        assert apart(two[client]["adapter"], kept["adapter"]) <= 1e-6

    state, _ = play_round(strategy, strategy.init(prepared.problem), half, rounds, 0, 1)
    rest.restore(half.memory())  # as in a run that is resumed: other workers
    play(prepared, rest, start=2, state=state)
    for client, kept in two.items():
        own = rest.memory()[client]["adapter"]
        assert all(torch.equal(own[n], v) for n, v in kept["adapter"].items())


def test_scores_are_those_of_one_process(files: Path) -> None:
    prepared = prepare(recipe(files, name="local"))
    alone, federation = prepared.federation(), WorkersFederation(prepared, FakePool(prepared, 3))
    state, _ = play(prepared, alone)
    federation.restore(alone.memory())
    sent = prepared.strategy.send(state, 3, tuple(federation.clients()))
    index = dict.fromkeys(federation.clients(), np.arange(5, dtype=np.int64))
    for found, wanted in (
        (federation.evaluate(3, sent), alone.evaluate(3, sent)),
        (federation.evaluate_test(3, index, sent), alone.evaluate_test(3, index, sent)),
    ):
        mine = {n: s for part in found if isinstance(part, dict) for n, s in part.items()}
        theirs = {n: s for part in wanted if isinstance(part, dict) for n, s in part.items()}
        assert mine.keys() == theirs.keys() and len(mine) == len(SIZES)
        for name, own in mine.items():
            assert own.items == theirs[name].items
            assert own.loss == pytest.approx(theirs[name].loss, rel=1e-5, nan_ok=True)


def test_progress_is_told_shard_by_shard_and_adds_up(fedavg: Prepared) -> None:
    told: list[tuple[int, int]] = []
    federation = WorkersFederation(
        fedavg, FakePool(fedavg, 3), lambda clients, tokens: told.append((clients, tokens))
    )
    names = tuple(federation.clients())
    list(federation.run(1, FedAvg().send(FedAvg().init(fedavg.problem), 1, names)))
    own = fedavg.federation()
    assert len(told) == 3
    assert sum(clients for clients, _ in told) == len(names)
    assert sum(tokens for _, tokens in told) == sum(own.tokens(name) for name in names)
