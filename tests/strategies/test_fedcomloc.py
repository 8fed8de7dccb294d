"""FedComLoc against Scaffnew as printed in numpy; to the optimum; through codecs, on a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.codecs.settings import Codec
from fedpeft.comms.uplink import Uplink
from fedpeft.config import Comms, Local, Rounds
from fedpeft.errors import FedpeftError
from fedpeft.prepare import check_needs
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedcomloc import FedComLoc
from fedpeft.strategy import Messages, build
from fedpeft.streams import numpy_stream
from tests.privacy.federated import play as play_on_a_model
from tests.privacy.federated import prepared_of, recipe_of
from tests.strategies.oracle import average, close, shares
from tests.strategies.toy import (
    Arrays,
    Played,
    Present,
    Toy,
    ToyCohort,
    arrays,
    everyone,
    make,
    play,
    some,
)
from tests.tiny import Tiny

SGD = Local(optimizer="sgd", lr=0.1, batch_size=4, steps=5)


def largest(x: Arrays, density: float) -> Arrays:
    """The largest of all numbers of an adapter, zero elsewhere."""
    every = np.sort(np.concatenate([abs(v).ravel() for v in x.values()]))[::-1]
    least = every[math.ceil(density * len(every)) - 1]
    return {n: np.where(abs(v) >= least, v, 0.0) for n, v in x.items()}


def oracle(strategy: FedComLoc, toy: Toy, rounds: int, present: Present) -> tuple[Arrays, Any]:
    """x and all h_i, as algorithm 1 is printed, coin by coin; then h_i are centred again.

    By d = (pi / gamma)(x - x'), which is how far h_i lag behind for those who were away.
    """
    pi, gamma = strategy.pi, toy.lr
    x = arrays(toy.initial)
    h = {k: {n: np.zeros(v.shape) for n, v in x.items()} for k in toy.clients}
    for t in range(1, rounds + 1):
        coins = int(numpy_stream(7, "fedcomloc", t).geometric(pi))
        there = list(present(t, toy.clients))
        own = dict.fromkeys(there, x)
        for coin in range(1, coins + 1):
            for k in there:
                g = toy.gradient(k, largest(own[k], strategy.density))
                own[k] = {n: own[k][n] - gamma * (g[n] - h[k][n]) for n in x}
            if coin == coins:  # the only one that shows heads
                new = average([own[k] for k in there], shares(toy, there))
        for k in there:
            h[k] = {n: h[k][n] + pi / gamma * (new[n] - own[k][n]) for n in x}
        away = 1 - len(there) / len(toy.clients)
        for k in toy.clients:
            part = away if k in there else away - 1
            lag = {n: pi / gamma * (x[n] - new[n]) for n in x}
            h[k] = {n: h[k][n] + part * lag[n] for n in x} if away else h[k]
        x = new
    return x, h


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("strategy", [FedComLoc(0.4), FedComLoc(0.2), FedComLoc(0.4, 0.3)])
def test_three_rounds_equal_the_rule_in_numpy(
    present: Present, lora: bool, strategy: FedComLoc
) -> None:
    toy = make(lora=lora)
    states = play(strategy, toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        x, h = oracle(strategy, make(lora=lora), rounds, present)
        assert close(states[rounds].adapter, x, 1e-12)
    for k in toy.clients:
        moved = tree.sub(toy.memory[k]["moved"], states[-1].moved)
        assert close(tree.scale(moved, strategy.pi / toy.lr), h[k], 1e-11)


class Curved(Toy):
    """Quadratics of another curvature for every client, so that local steps drift apart."""

    def curvature(self, client: str) -> float:
        return 0.5 * (1 + self.clients.index(client))

    def gradient(self, client: str, adapter: Any, base: Any = None) -> Any:
        plain = super().gradient(client, adapter, base)
        return {n: self.curvature(client) * g for n, g in plain.items()}

    def distance(self, adapter: tree.Tree) -> float:
        """From the minimum of the mean loss by weight."""
        share = {k: self.weights[k] * self.curvature(k) for k in self.clients}
        total = sum(share.values())
        best = {
            n: sum(share[k] * self.targets[k][n] for k in self.clients) / total for n in adapter
        }
        return max(float((adapter[n] - v).abs().max()) for n, v in best.items())


def curved() -> Curved:
    toy = Curved(**vars(make(lora=False)))
    toy.steps = dict.fromkeys(toy.steps, 5)
    return toy


def distances(strategy: Any, toy: Curved, rounds: int, present: Present = everyone) -> Any:
    played: Played = play(strategy, toy, rounds, present)
    return played, [toy.distance(strategy.adapter(state)) for state in played.states]


@pytest.mark.parametrize("pi", [0.1, 0.2, 0.5])
def test_it_converges_linearly_to_the_exact_optimum(pi: float) -> None:
    toy = curved()
    _, found = distances(FedComLoc(pi), toy, 120)
    assert found[-1] < 1e-8
    assert all(found[at + 20] < max(0.1 * found[at], 1e-13) for at in (0, 20, 40))
    assert distances(FedAvg(), curved(), 120)[1][-1] > 1e-2


def test_the_variates_sum_to_zero_with_all_clients() -> None:
    """Whatever their weights: sum_k p_k s_k = s = x_0 - x, so nothing beside x need be sent."""
    toy = curved()
    played, _ = distances(FedComLoc(0.2), toy, 20)
    owns = [arrays(toy.memory[k]["moved"]) for k in toy.clients]
    mean = average(owns, shares(toy, toy.clients))
    state = played.states[-1]
    assert state.complete and close(state.moved, mean, 1e-13)
    assert close(tree.sub(toy.initial, state.adapter), mean, 1e-13)
    assert all(set(sent.trees) == {"adapter"} for sent in played.sent)


def two(round: int, clients: tuple[str, ...]) -> tuple[str, ...]:
    picked = numpy_stream(3, "two", round).choice(len(clients), 2, replace=False)
    return tuple(clients[k] for k in sorted(picked))


def test_it_converges_to_the_optimum_with_two_clients_of_five() -> None:
    """With equal weights; from the second round on s is sent as well."""
    toy = curved()
    toy.weights = dict.fromkeys(toy.weights, 1.0)
    played, found = distances(FedComLoc(0.2), toy, 200, two)
    assert found[-1] < 1e-8
    assert [set(sent.trees) == {"adapter"} for sent in played.sent[:3]] == [True, False, False]


def test_with_a_meeting_after_every_step_it_is_gradient_descent() -> None:
    """pi = 1: FedSGD, which is FedAvg of one step."""
    for lora in (True, False):
        toy, other = make(lora=lora), make(lora=lora)
        other.steps = dict.fromkeys(other.steps, 1)
        found, wanted = play(FedComLoc(1.0), toy, 4), play(FedAvg(), other, 4)
        for one, state in zip(found.states, wanted.states, strict=True):
            assert close(one.adapter, arrays(state.adapter), 1e-13)


def test_a_rounds_steps_are_one_draw_for_all_of_mean_one_over_pi() -> None:
    strategy, toy = FedComLoc(0.25), make()
    state = strategy.init(toy.problem())
    drawn = [strategy.send(state, t, toy.clients).scalars["steps"] for t in range(1, 2001)]
    assert all(bool((one == one[0]).all()) and float(one[0]) >= 1 for one in drawn)
    assert float(torch.stack(drawn).mean()) == pytest.approx(4, abs=4 * 12**0.5 / 2000**0.5)
    other = strategy.init(toy.problem(seed=8))
    again = [strategy.send(other, t, toy.clients).scalars["steps"] for t in range(1, 51)]
    assert [float(x[0]) for x in again] != [float(x[0]) for x in drawn[:50]]


@pytest.mark.parametrize("key", ["pi", "density"])
@pytest.mark.parametrize("value", [0.0, 1.5, float("nan")])
def test_settings_out_of_range_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(FedpeftError, match=rf"strategy\.{key}="):
        build("fedcomloc", {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", "adamw"),
        ("momentum", 0.9),
        ("weight_decay", 0.01),
        ("schedule", "cosine"),
        ("warmup", 0.1),
        ("steps", 0),
        ("steps", 4),
    ],
)
def test_all_but_plain_sgd_is_refused_by_name(key: str, value: object) -> None:
    strategy = FedComLoc(0.2)
    check_needs(recipe_of("fedcomloc", local=SGD), strategy)
    wrong = recipe_of("fedcomloc", local=dataclasses.replace(SGD, **{key: value}))  # type: ignore[arg-type]
    with pytest.raises(FedpeftError, match=rf"local\.{key}=.*'fedcomloc': its rule holds for"):
        check_needs(wrong, strategy)
    check_needs(wrong, FedAvg())


def test_error_feedback_is_refused_by_name() -> None:
    """What a codec loses comes back through h_i; fed back as well it would count twice."""
    for feedback, name in (("auto", "topk"), ("always", "topk"), ("always", "randk")):
        codec = Codec(codec=name, feedback=feedback)  # type: ignore[arg-type]
        recipe = recipe_of("fedcomloc", local=SGD, comms=Comms(up=codec))
        with pytest.raises(FedpeftError, match=r"up\.feedback=always with .*feedback=never alone"):
            check_needs(recipe, FedComLoc(0.2))
    off = Comms(up=Codec(codec="topk", feedback="never"))
    for comms in (Comms(), off, Comms(up=Codec(codec="randk"))):
        check_needs(recipe_of("fedcomloc", local=SGD, comms=comms), FedComLoc(0.2))


@pytest.mark.parametrize("chunk", [1, 3])
def test_on_a_model_clients_take_the_steps_they_are_sent(chunk: int) -> None:
    """What plain SGD on g - h_i does of the recipe's ``steps``; s_i is how far it moved."""
    tiny, strategy = Tiny(local=SGD), FedComLoc(0.2)
    federation = tiny.federation(strategy, chunk)
    state = strategy.init(tiny.problem)
    for number in (1, 2):
        before = {k: dict(own["moved"]) for k, own in federation.memory().items()}
        sent = strategy.send(state, number, tuple(federation.clients()))
        count = int(sent.scalars["steps"][0])
        plain = Tiny(local=dataclasses.replace(SGD, steps=count)).federation(Shifted(), chunk)
        drift = tree.sub(tiny.problem.initial, state.adapter)
        control = {k: tree.scale(tree.sub(own, drift), 0.2 / 0.1) for k, own in before.items()}
        zero = tree.zeros_like(drift)
        rows = tree.stack([control.get(k, zero) for k in sent.clients])
        asked = Messages(sent.clients, {**sent.trees, "control": rows})
        replies = [r for r in federation.run(number, sent) if isinstance(r, Messages)]
        wanted = [r for r in plain.run(number, asked) if isinstance(r, Messages)]
        for reply, like in zip(replies, wanted, strict=True):
            for k, client in enumerate(reply.clients):
                own, other = (tree.row(x.trees["adapter"], k) for x in (reply, like))
                assert tree.norm(tree.sub(own, other)) < 1e-5 * tree.norm(other)
                moved = tree.add(before.get(client, zero), tree.sub(state.adapter, own))
                kept = federation.memory()[client]["moved"]
                assert tree.norm(tree.sub(kept, moved)) < 1e-6
        state = strategy.receive(state, iter(replies))


class Shifted(FedAvg):
    """Plain SGD on g - control, as many steps as the recipe says."""

    def train(self, messages, cohort):  # type: ignore[no-untyped-def]
        own = {"control": messages.trees["control"]}
        fit = cohort.fit(
            messages.trees["adapter"], adjust=lambda g, x, own: tree.sub(g, own["control"]), own=own
        )
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)


@dataclass(frozen=True)
class Kept:
    """What a link has at hand on the toy's clients."""

    cohort: ToyCohort
    round: int

    def recall(self, name: str, default: tree.Tree) -> tree.Tree:
        return self.cohort.recall(name, default)

    def remember(self, name: str, value: tree.Tree) -> None:
        self.cohort.remember(name, value)


@pytest.mark.parametrize("codec", [{"codec": "topk", "density": 0.2}, {"values": "int8"}])
def test_com_converges_to_the_optimum_through_a_codec(codec: dict[str, Any]) -> None:
    """As h_i go by what arrives; by what was trained, top-k would stop it 1.6 away, int8 0.01."""
    toy, strategy = curved(), FedComLoc(0.2)
    link = Uplink(Codec(**{"codec": "dense", "feedback": "never", **codec}), 0, "base")
    state = strategy.init(toy.problem())
    for number in range(1, 201):
        sent, cohort = strategy.send(state, number, toy.clients), toy.cohort(toy.clients)
        reply = link.leave(sent, strategy.train(sent, cohort), Kept(cohort, number))
        strategy.left(sent, reply, cohort)
        state = strategy.receive(state, iter([reply]))
    assert toy.distance(state.adapter) < 1e-6


@pytest.mark.parametrize("down", [{}, {"codec": "topk", "density": 0.3}])
def test_com_and_global_are_the_recipes_codecs_and_it_descends(down: dict[str, Any]) -> None:
    recipe = recipe_of(
        {"name": "fedcomloc", "pi": 0.2},
        local=dataclasses.replace(SGD, batch_size=64, lr=1.0),
        rounds=Rounds(count=12, weighting="equal"),
    )
    up = Codec(codec="topk", density=0.2, feedback="never")
    coded = dataclasses.replace(recipe, comms=Comms(up=up, down=Codec(**down)))
    check_needs(coded, FedComLoc(0.2))
    found, plain = (play_on_a_model(prepared_of(one), 12)[1] for one in (coded, recipe))
    fall = [reports[0].loss - reports[-1].loss for reports in (found, plain)]
    assert fall[0] > 0.5 * fall[1] > 0.02
    assert sum(found[-1].up.values()) < 0.4 * sum(plain[-1].up.values())
    if down:
        assert sum(found[-1].down.values()) < 0.5 * sum(plain[-1].down.values())
