"""FedKSeed against its rule in numpy, what it sends, and what it is exact about."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fedpeft import philox, tree
from fedpeft.comms.ledger import message_bytes
from fedpeft.conformance import agrees_with
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedkseed import FedKSeed, State, probabilities
from fedpeft.strategy import Messages, Problem, build
from fedpeft.streams import derive, numpy_stream
from tests.strategies.oracle import shares
from tests.strategies.toy import Arrays, Present, Toy, arrays, everyone, make, play, some
from tests.test_philox import oracle as words

Draw = Literal["uniform", "pro", "unbiased"]
DRAWS: list[Draw] = ["uniform", "pro", "unbiased"]
K, REACH = 16, 5e-4


def direction(seed: int, like: Arrays) -> Arrays:
    """z(s), from Philox in Python's integers and the table of normal numbers."""
    found = {}
    for stream, name in enumerate(sorted(like)):
        size = like[name].size
        own = words(seed, stream, (size + 1) // 2)
        halves = [half for word in own for half in (word & 0xFFFF, word >> 16)]
        found[name] = philox.table()[halves[:size]].astype(np.float64).reshape(like[name].shape)
    return found


def loss(toy: Toy, client: str, w: Arrays) -> float:
    return sum(0.5 * float((e**2).sum()) for e in toy.errors(client, w).values())


class Rule:
    """Algorithm 1 of the paper: w_0, a, and the history of the seeds."""

    def __init__(self, toy: Toy, draw: Draw) -> None:
        self.toy, self.draw, self.initial = toy, draw, arrays(toy.initial)
        self.seed = derive(7, "fedkseed") >> 1
        self.z = [direction(self.seed + j, self.initial) for j in range(K)]
        self.a, self.history = np.zeros(K), [[0.0] for _ in range(K)]

    def model(self) -> Arrays:
        return {
            n: w - sum(self.a[j] * self.z[j][n] for j in range(K)) for n, w in self.initial.items()
        }

    def p(self) -> np.ndarray:
        if self.draw == "uniform":
            return np.full(K, 1 / K)
        mean = np.array([np.mean(own) for own in self.history])
        raised = np.exp((mean - mean.min()) / (mean.max() - mean.min() + 1e-10))
        return np.asarray(raised / raised.sum())

    def round(self, number: int, clients: list[str]) -> dict[str, Arrays]:
        p, added, told, trained = self.p(), np.zeros(K), list[tuple[int, float]](), {}
        for client, share in zip(clients, shares(self.toy, clients), strict=True):
            w = self.model()
            stream = numpy_stream(self.seed, "draws", client, number)
            for j in stream.choice(K, 4, p=p).tolist():
                plus, minus = (
                    loss(self.toy, client, {n: x + s * self.z[j][n] for n, x in w.items()})
                    for s in (REACH, -REACH)
                )
                rho = (plus - minus) / (2 * REACH)
                step = self.toy.stride * rho / (K * p[j] if self.draw == "unbiased" else 1)
                w = {n: x - step * self.z[j][n] for n, x in w.items()}
                added[j] += share * step
                told.append((j, rho))
            trained[client] = w
        self.a += added
        for j, rho in told:
            self.history[j].append(min(abs(rho), 1000.0))
        return trained


def rule_of(draw: Draw) -> Any:
    def fedkseed_rule(toy: Toy, rounds: int, present: Present) -> Arrays:
        own = Rule(toy, draw)
        for number in range(1, rounds + 1):
            own.round(number, list(present(number, toy.clients)))
        return own.model()

    return fedkseed_rule


@pytest.mark.parametrize("draw", DRAWS)
def test_three_rounds_equal_the_rule_in_numpy(draw: Draw) -> None:
    agrees_with(rule_of(draw))(FedKSeed(K, draw=draw))


@pytest.mark.parametrize("draw", DRAWS)
def test_the_history_of_the_seeds_is_that_of_the_rule(draw: Draw) -> None:
    own, state = Rule(make(), draw), play(FedKSeed(K, draw=draw), make(), 3, some).states[-1]
    for number in (1, 2, 3):
        own.round(number, list(some(number, own.toy.clients)))
    assert np.allclose(state.sums.numpy(), own.a, rtol=1e-9)
    assert state.counts.tolist() == [len(h) for h in own.history]
    assert np.allclose(state.totals.numpy(), [sum(h) for h in own.history], rtol=1e-9)


@pytest.mark.parametrize("present", [everyone, some])
def test_the_replay_is_the_mean_of_the_clients_models(present: Present) -> None:
    """KS1."""
    toy = make()
    strategy = FedKSeed(K)
    state = play(strategy, toy, 3, present).states[-1]
    names = list(present(3, toy.clients))
    weight = torch.tensor([toy.weights[c] for c in names], dtype=torch.float64)
    mean = tree.mean([(tree.stack([toy.trained[c] for c in names]), weight)])
    found = strategy.adapter(state)
    assert max(float((found[n] - x).abs().max()) for n, x in mean.items()) <= 1e-10


def test_without_a_step_the_model_is_the_start() -> None:
    """KS2."""
    toy, strategy = make(dtype=torch.float32), FedKSeed(K)
    found = strategy.adapter(strategy.init(toy.problem()))
    assert all(torch.equal(found[n], x) for n, x in toy.initial.items())


def test_a_client_that_comes_late_rebuilds_the_model_from_the_sums_alone() -> None:
    """KS9: and it is what a client has that kept its last model."""
    toy, strategy = make(), FedKSeed(K)
    state = play(strategy, toy, 3).states[-1]
    sent = strategy.send(state, 4, toy.clients)
    kept = strategy.personal(sent, toy.cohort(toy.clients))
    new = strategy.personal(sent, make().cohort(toy.clients))
    wanted = strategy.adapter(state)
    for name, value in wanted.items():
        assert float((new[name] - value).abs().max()) <= 1e-12
        assert float((kept[name] - value).abs().max()) <= 1e-12
    assert toy.shelf.kept([], "model", 0)[0] == 4


@pytest.mark.parametrize("draw", ["pro", "unbiased"])
def test_probabilities_sum_to_one_within_a_factor_of_e(draw: Draw) -> None:
    """KS8."""
    states = play(FedKSeed(K, draw=draw), make(), 3).states
    assert np.allclose(probabilities(states[0]).numpy(), 1 / K)
    p = probabilities(states[-1])
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert 1.5 < float(p.max() / p.min()) <= math.e * (1 + 1e-12)


def test_an_unbiased_step_weighs_each_seed_by_what_it_was_drawn() -> None:
    """E over j ~ p of m_j z_j is that of uniform draws: p_j / (K p_j) = 1 / K."""
    strategy = FedKSeed(K, draw="unbiased")
    p = probabilities(play(strategy, make(), 3).states[-1])
    assert torch.allclose(p * strategy._factors(p), torch.full_like(p, 1 / K))


# -- bytes


def problem_of(steps: int, size: int) -> Problem:
    toy = make(2, torch.float32)
    return dataclasses.replace(
        toy.problem(), initial={"w": torch.zeros(size)}, scaling={}, steps=steps, lr=1e-3
    )


def both_ways(strategy: FedKSeed, size: int) -> tuple[int, int]:
    state = strategy.init(problem_of(200, size))
    sent = strategy.send(state, 60, ["a client"])
    trees = strategy.expects(sent[0])
    reply = dataclasses.replace(
        sent[0], trees=trees, scalars={"weight": 1.0, "loss": 1.0}, blobs={}
    )
    return sum(message_bytes(sent[0]).values()), sum(message_bytes(reply).values())


def test_a_client_and_round_costs_less_than_18_kilobytes_whatever_the_model() -> None:
    """KS4, with names, headers, weight and loss; the payload is 4 K + 6 tau."""
    down, up = both_ways(FedKSeed(), 10)
    assert (down, up) == (16_540, 1_484)
    assert down + up == 18_024 < 18_432
    assert both_ways(FedKSeed(), 1_000_000) == (down, up)
    pro = both_ways(FedKSeed(draw="pro"), 10)
    assert pro == (down + 4 * 4096 + 128 + 1, up)
    assert both_ways(FedKSeed(40_000), 10)[1] == up + 2 * 200


def test_golden_bytes_of_a_reply() -> None:
    """Seeds, draws and slopes are what other versions make of them, or runs could not go on."""
    toy = make(2, torch.float32)
    strategy = FedKSeed(K)
    state = strategy.init(toy.problem())
    sent = strategy.send(state, 1, toy.clients)
    assert (state.seed, sent.blobs["s"][0].hex()) == GOLDEN_SEED
    reply = strategy.train(sent, toy.cohort(toy.clients))
    assert reply.trees["walk"]["j"].tolist() == GOLDEN_DRAWS
    assert reply.trees["walk"]["j"].dtype == torch.int16
    assert reply.trees["walk"]["m"].dtype == torch.float32
    assert np.allclose(reply.trees["walk"]["m"].numpy(), GOLDEN_MOVES, rtol=1e-2, atol=1e-5)


GOLDEN_SEED = (4134098246488011956, "b4b47ba873445f39")
GOLDEN_DRAWS = [[0, 12, 8, 8], [8, 7, 5, 14]]
GOLDEN_MOVES = [
    [-0.006489, 0.016251, -0.008202, -0.007759],
    [-0.010056, -8e-06, 0.005527, 0.009865],
]


# -- what does not go


def test_candidates_are_distinct_seeds() -> None:
    seeds = FedKSeed().init(make().problem()).seed + np.arange(4096)
    assert len(set(seeds.tolist())) == 4096 and seeds.max() < 2**63


def test_an_index_that_is_no_seed_cannot_end_a_round() -> None:
    toy, strategy = make(2), FedKSeed(K)
    state = strategy.init(toy.problem())
    sent = strategy.send(state, 1, toy.clients)
    reply = strategy.train(sent, toy.cohort(toy.clients))
    wild = {**reply.trees["walk"], "j": torch.full_like(reply.trees["walk"]["j"], -30_000)}
    after = strategy.receive(state, iter([dataclasses.replace(reply, trees={"walk": wild})]))
    assert isinstance(after, State) and int((after.sums != 0).sum()) == 1


def test_replies_without_weight_are_refused() -> None:
    toy, strategy = make(2), FedKSeed(K)
    state = strategy.init(toy.problem())
    reply = strategy.train(strategy.send(state, 1, toy.clients), toy.cohort(toy.clients))
    nothing = Messages(reply.clients, reply.trees, {"weight": 0 * reply.scalars["weight"]})
    with pytest.raises(ValueError, match="mean of no clients"):
        strategy.receive(state, iter([nothing]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"candidates": 0}, r"strategy\.candidates=0: must be >= 1"),
        ({"reach": 0.0}, r"strategy\.reach=0\.0"),
        ({"cap": -1.0}, r"strategy\.cap=-1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(FedpeftError, match=named):
        build("fedkseed", settings)


@pytest.mark.parametrize("changed", [{"steps": 0}, {"lr": 0.0}])
def test_steps_and_their_length_must_be_known(changed: dict[str, Any]) -> None:
    with pytest.raises(FedpeftError, match=r"local\.steps=.*local\.lr="):
        FedKSeed().init(dataclasses.replace(make().problem(), **changed))


def test_a_cap_skips_steps() -> None:
    free, held = (play(FedKSeed(K, cap=cap), make(), 1).states[-1] for cap in (0.0, 1e-9))
    assert bool(free.sums.any()) and not bool(held.sums.any())
