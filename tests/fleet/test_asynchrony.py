"""FedBuff in plain numbers: w + sum_k p_k s(staleness_k) d_k, d_k from the client's own start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpeft.asynchrony import Pending
from fedpeft.config import Engine, Rounds
from fedpeft.federation import Failure
from fedpeft.fleet.buffered import Arrival
from fedpeft.fleet.settings import Fleet
from fedpeft.message import Messages
from fedpeft.postprocess import NOTHING
from fedpeft.prepare import Prepared, prepare
from fedpeft.timed import Timed
from tests.tiny import tiny_recipe, write_tiny

SIZES = (7, 13, 5, 16, 9, 8, 11, 6)
NAMES = [f"c{k}" for k in range(len(SIZES))]


def moved_by(name: str) -> float:
    return 0.01 * (1 + NAMES.index(name))


class Steady:
    """Clients who move every number of the adapter that they are sent by a number of their own."""

    def __init__(self, prepared: Prepared, failing: str = "") -> None:
        self._sizes, self._failing = prepared.population.clients.roster, failing

    def clients(self) -> Mapping[str, int]:
        return self._sizes

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure]:
        for sent in stacks:
            for k, name in enumerate(sent.clients):
                if name == self._failing:
                    yield Failure(name, "broken")
                    continue
                one = sent.rows([k])
                adapter = {n: x + moved_by(name) for n, x in one.trees["adapter"].items()}
                weight = torch.tensor([float(self._sizes[name])])
                yield one.reply({"adapter": adapter}, weight=weight, loss=torch.ones(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, sizes=SIZES)
    return folder


def prepared(files: Path, fleet: Fleet, weighting: Any = "examples") -> Prepared:
    own = dataclasses.replace(
        tiny_recipe(files),
        rounds=Rounds(count=30, weighting=weighting, quorum=0.1),
        engine=Engine(chunk=4, threads=1, device="cpu"),
        fleet=fleet,
    )
    return prepare(own)


FLEET = Fleet("rpi4", network="lan", sigma=2.0, policy="fedbuff", buffer=3, concurrency=6)


@pytest.mark.parametrize("weighting", ["examples", "equal"])
@pytest.mark.parametrize("policy", ["fedbuff", "semi_async"])
def test_the_server_s_steps_are_those_of_the_paper(
    files: Path, policy: Any, weighting: Any
) -> None:
    own = prepared(files, dataclasses.replace(FLEET, policy=policy))
    own = dataclasses.replace(
        own, recipe=dataclasses.replace(own.recipe, rounds=Rounds(30, weighting=weighting))
    )
    timed, federation, oldest = Timed(own), Steady(own), 0
    if weighting == "equal":
        federation._sizes = dict.fromkeys(NAMES, 1)  # type: ignore[assignment]
    state = own.strategy.init(own.problem)
    for number in range(1, 31):
        names = timed.begin(state, number)
        before = state.adapter
        state, report = timed.play(state, federation, number, names, NOTHING)  # type: ignore[arg-type]
        assert timed._windows is not None
        arrived = timed._windows._window.arrived
        weights = [federation.clients()[NAMES[one.client]] for one in arrived]
        step = sum(
            w * (1 + number - one.version) ** -0.5 * moved_by(NAMES[one.client])
            for w, one in zip(weights, arrived, strict=True)
        ) / sum(weights)
        for name, value in state.adapter.items():
            torch.testing.assert_close(value, before[name] + step, rtol=0, atol=2e-6)
        oldest = max(oldest, *(number - one.version for one in arrived))
        assert report.replied == 3
    assert oldest >= 3


def test_weights_of_staleness_are_one_over_its_square_root(files: Path) -> None:
    own = prepared(files, FLEET)
    windows = Timed(own)._windows
    assert windows is not None
    windows._number = 6
    sent = own.strategy.send(own.strategy.init(own.problem), 6, NAMES[:1])
    move = {"adapter": {n: torch.ones_like(x[0]) for n, x in sent.trees["adapter"].items()}}
    old = [Arrival(k, 6 - k, 1.0) for k in range(6)]
    stale = [Pending(move, {"weight": 1.0}, {}) for _ in old]
    found = windows._rebased(sent, old, stale, [])
    name, start = next(iter(sent.trees["adapter"].items()))
    s = (found.trees["adapter"][name] - start).flatten(1)[:, 0]
    assert s.tolist() == pytest.approx([1, 0.7071, 0.5774, 0.5, 0.4472, 0.4082], abs=5e-5)


def test_a_client_whose_training_fails_is_excluded_and_never_arrives(files: Path) -> None:
    own = prepared(files, FLEET)
    timed, federation, seen = Timed(own), Steady(own, "c2"), set[str]()
    state, excluded = own.strategy.init(own.problem), 0
    for number in range(1, 13):
        names = timed.begin(state, number)
        state, report = timed.play(state, federation, number, names, NOTHING)  # type: ignore[arg-type]
        seen |= set(timed.line["times"])
        excluded += len(report.excluded)
        assert set(report.excluded) <= {"c2"}
    assert excluded > 0 and "c2" not in seen


def test_what_is_too_stale_is_thrown_away_but_was_sent(files: Path) -> None:
    own = prepared(files, dataclasses.replace(FLEET, max_staleness=1))
    timed, federation = Timed(own), Steady(own)
    state, thrown, came = own.strategy.init(own.problem), 0, 0
    for number in range(1, 31):
        names = timed.begin(state, number)
        state, report = timed.play(state, federation, number, names, NOTHING)  # type: ignore[arg-type]
        now = [n for n, kind in timed.line["dropped"].items() if kind == "stale"]
        thrown += len(now)
        assert max(timed.line["staleness"]) <= 1 and report.replied == 3
        assert set(now) <= set(report.dropped)
        came += sum(len(entry.clients) for entry in report.came)
    assert thrown > 0 and came == 30 * 3 + thrown
