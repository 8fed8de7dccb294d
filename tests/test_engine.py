"""The round loop: sampling, failures and rejoin, exclusion, quorum, and the books."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedpeft import tree
from fedpeft.cohort.federation import CohortFederation
from fedpeft.cohort.lanes import FoldLane, LoopLane
from fedpeft.comms.ledger import message_bytes
from fedpeft.config import Rounds, Sampling
from fedpeft.data.clients import Clients
from fedpeft.engine import RoundReport, play_round
from fedpeft.errors import FedpeftError, QuorumError
from fedpeft.federation import Failure
from fedpeft.strategies.fedask import FedASK
from fedpeft.strategies.fedavg import FedAvg, State
from fedpeft.strategies.local import Local
from fedpeft.strategy import Cohort, Messages, Strategy, build
from tests.tiny import IA3, LORA, Tiny


def play(
    tiny: Tiny, strategy: Strategy[Any], federation: CohortFederation, rounds: Rounds
) -> tuple[Any, list[RoundReport]]:
    state, reports = strategy.init(tiny.problem), []
    for number in range(1, rounds.count + 1):
        state, report = play_round(strategy, state, federation, rounds, tiny.seed, number)
        reports.append(report)
    return state, reports


def relative(found: tree.Tree, wanted: tree.Tree) -> float:
    return tree.norm(tree.sub(found, wanted)) / tree.norm(wanted)


@pytest.mark.parametrize(
    ("name", "settings", "adapter"),
    [
        ("fedavg", {}, LORA),
        ("fedavg", {}, IA3),
        ("fedprox", {"mu": 0.1}, LORA),
        ("fedprox", {"mu": 0.1}, IA3),
        ("fedprox", {"mu": 0.1, "space": "product"}, LORA),
        ("ffa_lora", {}, LORA),
    ],
)
def test_cohort_equals_sequential(
    name: str, settings: dict[str, Any], adapter: dict[str, Any]
) -> None:
    found = []
    for chunk, lane in ((1, LoopLane), (3, None), (8, None)):
        tiny, strategy = Tiny(adapter=adapter), build(name, settings)
        federation = tiny.federation(strategy, chunk, *([lane] if lane else []))
        state, _ = play(tiny, strategy, federation, tiny.rounds)
        found.append(strategy.adapter(state))
    tiny = Tiny(adapter=adapter)
    begin = strategy.adapter(strategy.init(tiny.problem))
    assert relative(found[1], found[0]) < 1e-5 and relative(found[2], found[0]) < 1e-5
    assert relative(found[0], begin) > 1e-3


def test_a_frozen_head_is_the_seeds_and_does_not_travel() -> None:
    """Batched as one by one; the head keeps its bits; another seed draws another."""
    frozen = {**LORA, "head": "frozen"}
    found, heads = [], []
    for lane in (LoopLane, FoldLane):
        tiny = Tiny(adapter=frozen)
        own = {n: p for n, p in tiny.network.model.named_parameters() if ".modules_to_save." in n}
        before = {name: value.detach().clone() for name, value in own.items()}
        state, reports = play(tiny, FedAvg(), tiny.federation(FedAvg(), 3, lane), tiny.rounds)
        assert before and all(torch.equal(before[n], p) for n, p in own.items())
        assert not any("modules_to_save" in name for name in state.adapter)
        assert not any(r.up.get("head") or r.down.get("head") for r in reports)
        found.append(state.adapter)
        heads.append(before)
    assert relative(found[1], found[0]) < 1e-5
    other = Tiny(adapter=frozen, seed=1).network.model.named_parameters()
    assert any(not torch.equal(heads[0][n], p) for n, p in other if n in heads[0])
    digests = {Tiny(adapter=frozen, seed=seed).network.digest for seed in (0, 1)}
    assert len(digests) == 2, "parties with another head must not train together"


def test_a_head_that_is_not_there_cannot_be_frozen() -> None:
    with pytest.raises(FedpeftError, match=r"adapter\.head='sometimes'"):
        Tiny(adapter={**LORA, "head": "sometimes"})


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    rounds = Rounds(count=2, sampling=Sampling("uniform", fraction=0.5))

    def adapter(seed: int) -> tree.Tree:
        tiny = Tiny(rounds=rounds, seed=seed)
        state, _ = play(tiny, FedAvg(), tiny.federation(FedAvg()), rounds)
        return FedAvg().adapter(state)

    first, again, other = adapter(0), adapter(0), adapter(1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_weights_are_examples_or_equal() -> None:
    for weighting in ("examples", "equal"):
        rounds = Rounds(count=1, weighting=weighting)  # type: ignore[arg-type]
        tiny = Tiny(rounds=rounds)
        federation = tiny.federation(FedAvg())
        sent = FedAvg().send(FedAvg().init(tiny.problem), 1, ("c0", "c1", "c2", "c3"))
        (reply,) = [r for r in federation.run(1, sent) if isinstance(r, Messages)]
        expected = [5, 9, 3, 12] if weighting == "examples" else [1, 1, 1, 1]
        assert reply.scalars["weight"].tolist() == expected
        own = reply.trees["adapter"]
        p = torch.tensor(expected, dtype=torch.float64)
        p /= p.sum()
        wanted = {n: torch.tensordot(p, v.double(), 1).float() for n, v in own.items()}
        state, _ = play_round(FedAvg(), FedAvg().init(tiny.problem), federation, rounds, 0, 1)
        assert relative(state.adapter, wanted) < 1e-6


def test_books_count_every_participant_down_and_every_delivery_up() -> None:
    rounds = Rounds(count=6, failure_rate=0.4, quorum=0.0)
    tiny = Tiny(rounds=rounds)
    state, reports = play(tiny, FedAvg(), tiny.federation(FedAvg()), rounds)
    one = message_bytes(FedAvg().send(state, 1, ["c0"])[0])
    assert any(r.dropped for r in reports) and any(not r.dropped for r in reports)
    for report in reports:
        assert report.replied + len(report.dropped) == len(report.sampled) == 4
        assert {k: v for k, v in report.down.items() if v} == {k: 4 * v for k, v in one.items()}
        assert report.up["adapter"] == report.replied * one["adapter"]
        assert report.up["head"] == report.replied * one["head"]
        assert math.isfinite(report.loss)
    dropped = {name for r in reports for name in r.dropped}
    rejoined = {n for n in dropped for r in reports if n in r.sampled and n not in r.dropped}
    assert dropped == rejoined


def test_an_empty_poisson_round_keeps_the_state() -> None:
    rounds = Rounds(count=1, sampling=Sampling("poisson", rate=1e-9))
    tiny = Tiny(rounds=rounds)
    begin = FedAvg().init(tiny.problem)
    state, report = play_round(FedAvg(), begin, tiny.federation(FedAvg()), rounds, 0, 1)
    assert state is begin and report.sampled == () and report.down == report.up == {}


@dataclass(frozen=True)
class Spoiler(Strategy[State]):
    """FedAvg whose client c1 replies with a fault."""

    fault: str = "nan"

    def init(self, problem: Any) -> State:
        return FedAvg().init(problem)

    def send(self, state: State, round: int, clients: Any) -> Messages:
        return FedAvg().send(state, round, clients)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if self.fault == "raise" and "c1" in cohort.clients:
            raise OSError("disk on fire")
        reply = FedAvg().train(messages, cohort)
        if "c1" not in cohort.clients:
            return reply
        k = cohort.clients.index("c1")
        if self.fault == "nan":
            reply.trees["adapter"][next(iter(cohort.initial))][k] = torch.nan
        if self.fault == "weight":
            reply.scalars["weight"][k] = 1e6
        return reply

    def receive(self, state: State, replies: Any) -> State:
        return FedAvg().receive(state, replies)

    def adapter(self, state: State) -> tree.Tree:
        return state.adapter


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("nan", "NaN or Inf in tensor"),
        ("weight", "registered with 9.0"),
        ("raise", "OSError: disk on fire"),
    ],
)
def test_one_faulty_client_is_excluded_named_and_the_round_goes_on(fault: str, said: str) -> None:
    rounds = Rounds(count=2)
    tiny = Tiny(rounds=rounds)
    state, reports = play(tiny, Spoiler(fault), tiny.federation(Spoiler(fault)), rounds)
    for report in reports:
        assert list(report.excluded) == ["c1"] and said in report.excluded["c1"]
        assert report.replied == 3
    data = tiny.population
    others = dataclasses.replace(
        data, clients=Clients.of(c for c in data.clients if c.name != "c1")
    )
    tiny.population = others
    wanted, _ = play(tiny, FedAvg(), tiny.federation(FedAvg()), rounds)
    assert relative(state.adapter, wanted.adapter) < 1e-6


def test_too_few_replies_end_the_run_with_reasons_and_keep_the_state() -> None:
    rounds = Rounds(count=1, quorum=0.9)
    tiny = Tiny(rounds=rounds)
    begin = FedAvg().init(tiny.problem)
    before = {n: v.clone() for n, v in begin.adapter.items()}
    with pytest.raises(QuorumError, match=r"round 1: 3 valid replies of 4.*c1: NaN.*quorum"):
        play_round(Spoiler(), begin, tiny.federation(Spoiler()), rounds, 0, 1)
    assert all(torch.equal(before[n], begin.adapter[n]) for n in before)


@dataclass(frozen=True)
class Halting(FedASK):
    """FedASK whose client c1 fails in the second exchange."""

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if "basis" in messages.trees and "c1" in cohort.clients:
            raise OSError("gone")
        return super().train(messages, cohort)


def test_who_fails_in_a_second_exchange_is_out_of_the_round_and_of_the_next_one_not() -> None:
    rounds = Rounds(count=2)
    tiny = Tiny(rounds=rounds)
    federation = tiny.federation(Halting())
    state, reports = play(tiny, Halting(), federation, rounds)
    other = Tiny(rounds=rounds)
    _, clean = play(other, FedASK(), other.federation(FedASK()), rounds)
    assert not state.basis
    for report, whole in zip(reports, clean, strict=True):
        assert list(report.excluded) == ["c1"] and report.replied == 3 and whole.replied == 4
        assert report.down == whole.down, "it was sent both messages"
        assert report.up["adapter"] < whole.up["adapter"], "its second reply never came"
        assert math.isfinite(report.loss)
    assert reports[0].loss == pytest.approx(clean[0].loss), "all four trained"
    kept = federation.memory()
    assert kept["c1"]["own"] and not any(kept[c]["own"] for c in kept if c != "c1")


def test_a_quorum_that_is_missed_in_a_second_exchange_keeps_the_state() -> None:
    rounds = Rounds(count=1, quorum=0.9)
    tiny = Tiny(rounds=rounds)
    begin = Halting().init(tiny.problem)
    with pytest.raises(QuorumError, match=r"round 1: 3 valid replies of 4.*c1: OSError"):
        play_round(Halting(), begin, tiny.federation(Halting()), rounds, 0, 1)
    assert not begin.basis


def test_private_memory_survives_rounds_in_which_a_client_is_absent() -> None:
    rounds = Rounds(count=5, sampling=Sampling("uniform", fraction=0.5))
    tiny = Tiny(rounds=rounds)
    federation = tiny.federation(Local(), chunk=3)
    state, reports = play(tiny, Local(), federation, rounds)
    times = {name: sum(name in r.sampled for r in reports) for name in federation.clients()}
    assert min(times.values()) < max(times.values())
    alone = Tiny(rounds=rounds)
    for name in (n for n, t in times.items() if t):
        one = alone.federation(Local(), 1, LoopLane)
        for r in reports:
            if name in r.sampled:
                list(one.run(r.round, Local().send(state, r.round, [name])))
        kept = one.memory()[name]["adapter"]
        assert relative(federation.memory()[name]["adapter"], kept) < 1e-5


def test_every_client_appears_once_and_in_order_whatever_the_chunk() -> None:
    tiny = Tiny()
    names = ("c0", "c1", "c2", "c3")
    for chunk in (1, 2, 3, 4):
        federation = tiny.federation(Spoiler("raise"), chunk)
        seen: list[str] = []
        sent = FedAvg().send(FedAvg().init(tiny.problem), 1, names)
        found: Iterator[Messages | Failure] = federation.run(1, sent)
        for each in found:
            seen.extend([each.client] if isinstance(each, Failure) else each.clients)
        assert tuple(seen) == names
