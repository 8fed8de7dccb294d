"""FedSpine against its rule in numpy: pruning by importance, masked training, means by coverage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.comms.ledger import message_bytes
from fedpeft.conformance import PROPERTIES
from fedpeft.conformance.finding import examine
from fedpeft.errors import FedpeftError
from fedpeft.pruning.structure import unpack
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedspine import FedSpine, State
from fedpeft.strategies.flexlora import FlexLoRA
from fedpeft.strategy import addressed
from tests.strategies.pruning_oracle import covers, cut, mask_of, pruned, trained
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    Toy,
    a_of,
    arrays,
    b_of,
    everyone,
    make,
    play,
    some,
)
from tests.tiny import Tiny

FAST: dict[str, Any] = {"step": 0.5, "target": 0.6}
"""The toy has four or five groups a part: steps of a tenth would prune nothing."""


def merged(strategy: FedSpine, toy: Toy, w: Arrays, own: list[Any], n: list[float]) -> Arrays:
    """own: (x, covers) of each client."""
    total, weights, found = sum(n), [], {}
    for a, (x, m) in zip(n, own, strict=True):
        there = {name: x[name] * m.get(name, 1.0) for name in x}
        sizes = [
            ((s * there[b_of(k)] @ there[a_of(k)]) ** 2).sum() for k, (*_, s) in LAYERS.items()
        ]
        weights.append(a * math.sqrt(sum(sizes)) / math.sqrt(m["left"]))
    for name, old in w.items():
        if "lora" not in name:
            found[name] = sum(a / total * x[name] for a, (x, _) in zip(n, own, strict=True))
            continue
        top = sum(a * m[name] * (x[name] - old) for a, (x, m) in zip(weights, own, strict=True))
        cover = sum(a * m[name] for a, (_, m) in zip(weights, own, strict=True))
        below = sum(weights) if strategy.aggregate == "r2sp" else cover
        found[name] = old + np.divide(top, below, out=np.zeros_like(old), where=cover > 0)
    if strategy.aggregate == "product":
        for layer, (o, r, i, s) in LAYERS.items():
            old = s * w[b_of(layer)] @ w[a_of(layer)]
            top, below = np.zeros((o, i)), np.zeros((o, i))
            for a, (x, m) in zip(weights, own, strict=True):
                there = m["mask"][layer]
                x_a, x_b = x[a_of(layer)] * m[a_of(layer)], x[b_of(layer)] * m[b_of(layer)]
                top += a * there * (s * x_b @ x_a)
                below += a * there
            mean = np.where(below > 0, top / np.maximum(below, 1e-300), old)
            u, d, vt = np.linalg.svd(mean, full_matrices=False)
            found[layer] = (u[:, :r] * d[:r]) @ vt[:r]
    return found


def oracle(toy: Toy, strategy: FedSpine, states: list[State], present: Present) -> list[Arrays]:
    """Round by round, from the orders of ``states``; with ``product`` one round from each state."""
    parts = states[0].roll.known
    total = sum(p.groups * p.weights for p in parts)
    alive = {c: {p.name: np.ones(p.groups, dtype=bool) for p in parts} for c in toy.clients}
    ema = {c: {p.name: np.zeros(p.groups) for p in parts} for c in toy.clients}
    gone, found = dict.fromkeys(toy.clients, 0.0), []
    for number, state in enumerate(states[:-1], 1):
        w, own, weights = arrays(state.adapter), [], []
        for client in present(number, toy.clients):
            steps, ranks = state.bandits.orders(strategy._policy(state.ranks), [client])
            before, step, rank = alive[client], float(steps[0]), int(ranks[0])
            m = covers(w, parts, before, rank)
            start = cut({n: v * m.get(n, 1.0) for n, v in w.items()}, rank)
            if step > 0:
                gone[client] = min(strategy.target, 1 - (1 - gone[client]) * (1 - step))
                alive[client] = {
                    p.name: pruned(p, before[p.name], ema[client][p.name], gone[client])
                    for p in parts
                }
            x = trained(toy, parts, client, start, alive[client], ema[client])
            known: dict[str, Any] = covers(w, parts, alive[client], rank)
            known["mask"] = mask_of(parts, alive[client])
            known["left"] = sum(alive[client][p.name].sum() * p.weights for p in parts) / total
            own.append((x, known))
            weights.append(toy.weights[client])
        found.append(merged(strategy, toy, w, own, weights))
    return found


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("aggregate", ["factor", "r2sp", "product"])
def test_six_rounds_equal_the_rule_in_numpy(aggregate: str, present: Present) -> None:
    own: dict[str, Any] = {"aggregate": aggregate, "policy": "tree", "ranks": [1, 2, 3]}
    toy, strategy = make(), FedSpine(**own, **FAST)
    states = play(strategy, toy, 6, present, size=2).states
    for state, wanted in zip(states[1:], oracle(make(), strategy, states, present), strict=True):
        for name, value in wanted.items():
            layer = name in LAYERS
            if aggregate == "product" and "lora" in name and not layer:
                continue
            own = toy.update(state.adapter, name) if layer else state.adapter[name]
            assert abs(own.numpy() - value).max() <= 1e-9, name
    assert any(len(set(state.roll.before(toy.clients).tolist())) >= 2 for state in states)
    ranks = [s.bandits.orders(strategy._policy(s.ranks), toy.clients)[1].tolist() for s in states]
    assert len({r for own in ranks for r in own}) >= 2


def test_pruning_only_goes_on_and_never_beyond_the_target() -> None:
    toy, strategy = make(), FedSpine(**FAST)
    states = play(strategy, toy, 8).states
    before, gone = states[0].roll.alive(toy.clients), states[0].roll.before(toy.clients)
    for state in states[1:]:
        alive, now = state.roll.alive(toy.clients), state.roll.before(toy.clients)
        assert bool((now >= gone).all()) and float(now.max()) <= strategy.target
        for part in state.roll.known:
            assert not bool((alive[part.name] & ~before[part.name]).any())
            lost = (~alive[part.name]).sum(1).tolist()
            assert lost == [min(int(g * part.groups + 1e-9), part.groups - 1) for g in now.tolist()]
        before, gone = alive, now
    assert float(gone.max()) == strategy.target


def test_nothing_is_pruned_in_a_clients_first_round() -> None:
    toy, strategy = make(), FedSpine(**FAST)
    assert play(strategy, toy, 1).states[-1].roll.gone == {}
    assert toy.memory and all("importance" in own for own in toy.memory.values())


def test_without_pruning_equal_ranks_and_samples_it_is_fedavg() -> None:
    """FedIT: A and B averaged each."""
    toy, other = make(), make()
    ours = play(FedSpine(target=0.0, ranks=[3], weights="samples"), toy, 3, some).states[-1]
    theirs = play(FedAvg(), other, 3, some).states[-1]
    for name, value in theirs.adapter.items():
        assert torch.allclose(ours.adapter[name], value, atol=1e-13)


def test_by_product_without_pruning_and_with_equal_ranks_it_is_flexlora() -> None:
    """The mean of the updates, exact but for the cut to rank r."""
    toy, other = make(), make()
    settings: dict[str, Any] = {"target": 0.0, "ranks": [3], "weights": "samples"}
    ours = play(FedSpine(aggregate="product", **settings), toy, 1).states[-1]
    theirs = play(FlexLoRA(), other, 1).states[-1]
    for layer in LAYERS:
        one, two = (toy.update(state.adapter, layer) for state in (ours, theirs))
        assert torch.allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("aggregate", ["factor", "product", "r2sp"])
def test_one_client_comes_back_unchanged(aggregate: str) -> None:
    toy = make(1)
    strategy = FedSpine(aggregate=aggregate, target=0.0, ranks=[3])  # type: ignore[arg-type]
    state = play(strategy, toy, 2).states[-1]
    own = toy.trained[toy.clients[0]]
    for layer in LAYERS:
        assert torch.allclose(toy.update(state.adapter, layer), toy.update(own, layer), atol=1e-12)


def test_the_reward_of_a_round_is_in_the_agents_tables() -> None:
    toy, strategy = make(), FedSpine(**FAST)
    played = play(strategy, toy, 1)
    state = played.states[-1]
    seen, (reply,) = state.bandits.seen, played.replies
    fall = (reply.scalars["before"] - reply.scalars["after"]).clamp(min=0).numpy()
    importance = reply.scalars["importance"].numpy()
    t = seen.seconds.numpy()
    x = (t - t.mean()) / t.mean()
    top = 0.6 * fall / fall.max() + 0.2 * importance / importance.max()
    wanted = top / (1 + 2 * np.maximum(x, 0) + 0.5 * np.maximum(-x, 0))
    found = [float(state.bandits.agents.tables[c][:, 5].sum()) for c in reply.clients]
    assert found == pytest.approx(wanted.tolist(), rel=1e-9)
    assert (fall > 0).all() and t.std() > 0


def test_the_fleets_times_take_the_place_of_the_models() -> None:
    toy, strategy = make(), FedSpine(**FAST)
    before = play(strategy, toy, 2).states
    told = strategy.told(before[-1], dict.fromkeys(toy.clients, 5.0))
    tables, others = (s.bandits.agents.tables for s in (told, before[-1]))
    assert any(not torch.equal(tables[c], others[c]) for c in toy.clients)
    seen = told.bandits.seen
    times = dict(zip(seen.clients, seen.seconds.tolist(), strict=True))
    again = strategy.told(told, times)
    assert all(torch.equal(again.bandits.agents.tables[c], others[c]) for c in toy.clients)
    assert again.bandits.agents.orders == before[-1].bandits.agents.orders
    first = strategy.init(toy.problem())
    assert strategy.told(first, {}) == first


def test_pruned_clients_are_sent_less() -> None:
    toy, strategy = make(), FedSpine(ranks=[2], **FAST)
    states = play(strategy, toy, 6).states
    sizes = []
    for state in (states[0], states[-1]):
        stacks = addressed(strategy, state, 7, toy.clients)
        every = [(c, m[k]) for m in stacks for k, c in enumerate(m.clients)]
        sizes.append({c: message_bytes(message)["adapter"] for c, message in every})
    gone = states[-1].roll.gone
    assert gone and all(sizes[1][c] < sizes[0][c] for c in gone)
    message = addressed(strategy, states[-1], 7, toy.clients)[0]
    alive = unpack(states[-1].roll.known, message.trees["groups"]["bits"])
    part = states[-1].roll.known[0]
    rows = message.trees["adapter"][b_of(part.members[0].layer)].shape[1]
    assert rows == int(alive[part.name][0].sum()) < part.groups


def test_a_client_that_lies_about_what_it_has_left_is_not_believed() -> None:
    toy, strategy = make(), FedSpine(**FAST)
    for state in play(strategy, toy, 6).states:
        stacks = addressed(strategy, state, 7, toy.clients)
        sent = [m for m in stacks if float(m.scalars["step"][0]) > 0]
        if sent and state.roll.gone:
            break
    assert sent and state.roll.gone
    reply = strategy.train(sent[0], toy.cohort(sent[0].clients))
    for lie in (0, 255):
        bits = torch.full_like(reply.trees["groups"]["bits"], lie)
        lied = {**reply.trees, "groups": {"bits": bits}}
        false = type(reply)(reply.clients, lied, reply.scalars)
        after = strategy.receive(state, iter([false]))
        assert after.roll.gone == state.roll.gone
        told, known = (s.roll.alive(toy.clients) for s in (after, state))
        assert all(torch.equal(told[n], own) for n, own in known.items())


def test_a_client_that_does_not_tell_its_losses_gains_nothing() -> None:
    toy, strategy = make(), FedSpine(**FAST)
    state = strategy.init(toy.problem())
    (sent,) = addressed(strategy, state, 1, toy.clients)
    replies = []
    for part in sent.split(1):
        reply = strategy.train(part, toy.cohort(part.clients))
        told = {"weight": reply.scalars["weight"]} if not replies else reply.scalars
        replies.append(type(reply)(reply.clients, reply.trees, told))
    tables = strategy.receive(state, iter(replies)).bandits.agents.tables
    rewards = [float(tables[client][:, 5].sum()) for client in toy.clients]
    assert rewards[0] == 0.0 and min(rewards[1:]) > 0.0


def test_efforts_are_what_is_gone_after_this_round_and_the_rank() -> None:
    toy, strategy = make(), FedSpine(probe=5, **FAST)
    for state in play(strategy, toy, 5).states:
        _, share, ranks = strategy._orders(state, toy.clients)
        efforts = strategy.efforts(state, toy.clients)
        assert list(efforts) == list(toy.clients)
        parts, weights = state.roll.known, state.roll.weights
        prunable = sum(p.groups * p.weights for p in parts) / weights
        for own, gone, rank in zip(efforts.values(), share.tolist(), ranks.tolist(), strict=True):
            assert own.pruned == pytest.approx(prunable * gone)
            assert own.adapter == rank / 3 and own.forward == 5
            assert own.step == pytest.approx(8 * rank * weights * (1 - prunable * gone))
    assert max(own.pruned for own in efforts.values()) > 0.5 * prunable


def test_without_a_bandit_arms_are_the_same_or_by_chance() -> None:
    """Whatever was rewarded: all prune p at the middle rank, or anything."""
    toy, fixed = make(), FedSpine(policy="fixed", ranks=[1, 2, 3], step=0.2, target=0.5)
    seen = []
    for state in play(fixed, toy, 5).states[1:]:
        steps, _, ranks = fixed._orders(state, toy.clients)
        assert set(ranks.tolist()) == {2}
        seen.append(set(steps.tolist()))
    assert seen == [{0.2}, {0.2}, {0.2}, {0.2}, {0.0}]  # the fourth from 0.488 to a half
    chance = FedSpine(policy="random", ranks=[1, 2, 3], **FAST)
    arms = set()
    for state in play(chance, make(), 8).states[1:]:
        steps, _, ranks = chance._orders(state, toy.clients)
        arms |= set(zip(steps.tolist(), ranks.tolist(), strict=True))
    assert {rank for _, rank in arms} == {1, 2, 3} and len(arms) >= 8


@pytest.mark.parametrize("policy", ["grid", "tree", "linear", "random", "fixed"])
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda one: one.__name__)
def test_the_kit_holds_where_clients_do_prune(check: Any, policy: str) -> None:
    strategy = FedSpine(policy=policy, step=0.9, target=0.6)  # type: ignore[arg-type]
    verdict = examine(strategy, check)
    assert verdict.verdict != "broken", verdict.found


def test_a_run_on_a_model_prunes_and_improves() -> None:
    lora = {"kind": "lora", "r": 4, "target_modules": ["query", "value", "dense"]}
    tiny = Tiny(adapter=lora)
    strategy = FedSpine(step=0.3, target=0.4)
    federation, state = tiny.federation(strategy, chunk=3), strategy.init(tiny.problem)
    losses = []
    for number in range(1, 6):
        stacks = addressed(strategy, state, number, tiny.population.clients.names)
        replies = list(federation.run(number, *stacks))
        losses.append(float(torch.cat([r.scalars["loss"] for r in replies]).mean()))  # type: ignore[union-attr]
        state = strategy.receive(state, iter(replies))  # type: ignore[arg-type]
    assert losses[-1] < losses[0] and len(state.roll.gone) >= 2
    stacks = addressed(strategy, state, 6, tiny.population.clients.names)
    scores = [s for s in federation.evaluate(6, *stacks)]
    assert sum(len(s) for s in scores if isinstance(s, dict)) == 4


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"target": 1.0}, r"strategy\.target=1"),
        ({"step": 0.0}, r"strategy\.target=0.5, step=0"),
        ({"weights": "sample"}, r"strategy\.weights='sample'"),
        ({"reward": "speed"}, "reward='speed'"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(FedpeftError, match=named):
        FedSpine(**wrong)


def test_ranks_above_the_models_are_refused() -> None:
    with pytest.raises(FedpeftError, match="between 1 and adapter.r=3"):
        FedSpine(ranks=[4]).init(make().problem())
    assert FedSpine().init(make().problem()).ranks == (2, 3)
    assert tree.numel(FedSpine().init(make().problem()).adapter) > 0
