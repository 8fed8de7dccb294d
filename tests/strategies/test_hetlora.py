"""HetLoRA against its rule in numpy: unequal ranks, the penalty, pruning, weights by size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.comms.ledger import message_bytes
from fedpeft.conformance import PROPERTIES, Property
from fedpeft.conformance.finding import examine
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.hetlora import HetLoRA, penalty_gradient, tails
from fedpeft.strategy import addressed
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


def cut_to(w: Arrays, rank: int) -> Arrays:
    found = {}
    for name, value in w.items():
        value = value[:rank] if "lora_A" in name else value
        found[name] = value[:, :rank] if "lora_B" in name else value
    return found


def norm(w: Arrays, part: str, cut: int) -> float:
    squares = 0.0
    for name, value in w.items():
        if part in name:
            rest = value[cut:] if part == "lora_A" else value[:, cut:]
            squares += float((rest**2).sum())
    return math.sqrt(squares)


def penalised(w: Arrays, g: Arrays, cut: int, penalty: float) -> Arrays:
    a, b = norm(w, "lora_A", cut), norm(w, "lora_B", cut)
    out = {name: value.copy() for name, value in g.items()}
    for name, value in w.items():
        if "lora_A" in name and a > 0:
            out[name][cut:] += penalty * b / a * value[cut:]
        if "lora_B" in name and b > 0:
            out[name][:, cut:] += penalty * a / b * value[:, cut:]
    return out


def oracle(toy: Toy, settings: HetLoRA, ranks: dict[str, int], present: Present) -> Arrays:
    """Three rounds; changes ``ranks``."""
    w = arrays(toy.initial)
    for t in range(1, 4):
        names = list(present(t, toy.clients))
        own, sizes = {}, {}
        for client in names:
            r = ranks[client]
            cut = max(settings.least, math.floor(settings.gamma * r + 1e-9))
            x = start = cut_to(w, r)
            for _ in range(toy.steps[client]):
                g = toy.gradient(client, x)
                g = penalised(x, g, cut, settings.penalty) if cut < r else g
                x = {n: x[n] - toy.lr * g[n] for n in x}
            now, then = (norm(y, "lora_A", cut) * norm(y, "lora_B", cut) for y in (x, start))
            if now < then:
                x, ranks[client] = cut_to(x, cut), cut
            own[client] = x
            sizes[client] = math.sqrt(
                sum(((s * x[b_of(n)] @ x[a_of(n)]) ** 2).sum() for n, (*_, s) in LAYERS.items())
            )
        merged = {n: np.zeros_like(v) for n, v in w.items()}
        for client, x in own.items():
            for n, v in x.items():
                total = sum((sizes if "lora" in n else toy.weights)[c] for c in names)
                share = (sizes if "lora" in n else toy.weights)[client] / total
                merged[n][tuple(slice(k) for k in v.shape)] += share * v
        w = merged
    return w


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("penalty", [0.0, 5.0])
def test_three_rounds_equal_the_rule_in_numpy(present: Present, penalty: float) -> None:
    given = {"client-0": 3, "client-1": 1, "client-2": 2, "client-3": 3, "client-4": 2}
    toy = make()
    strategy = HetLoRA(client_ranks=given, penalty=penalty, gamma=0.7)
    state = play(strategy, toy, 3, present, size=2).states[-1]
    ranks = dict(given)
    wanted = oracle(toy, strategy, ranks, present)
    for name, value in wanted.items():
        assert abs(strategy.adapter(state)[name].numpy() - value).max() <= 1e-12
    assert state.ranks == ranks
    assert ranks != given or penalty == 0.0


def test_equal_ranks_without_pruning_and_equal_sizes_are_fedavg() -> None:
    """HT2."""
    toy, other = make(), make()
    for one in (toy, other):
        one.targets = dict.fromkeys(one.targets, one.targets["client-0"])
        one.steps = dict.fromkeys(one.steps, 2)
    ours, theirs = play(HetLoRA(gamma=1.0), toy).states[-1], play(FedAvg(), other).states[-1]
    for name, value in theirs.adapter.items():
        assert torch.allclose(ours.adapter[name], value, atol=1e-13)


def test_ranks_never_grow_and_stay_above_the_least() -> None:
    """HT3."""
    toy = make()
    before = [3] * 5
    for state in play(HetLoRA(penalty=20.0, gamma=0.5, least=2), toy, 5).states:
        now = [state.ranks[c] for c in toy.clients]
        assert all(2 <= b <= a for a, b in zip(before, now, strict=True))
        before = now
    assert min(before) == 2


def test_the_penalty_is_the_derivative_of_the_product_of_norms() -> None:
    toy = make()
    at = {n: torch.randn(2, *v.shape).double().requires_grad_() for n, v in toy.initial.items()}
    down, up = tails(at, 1)
    named = {n: v for n, v in at.items() if "lora" in n}
    wanted = torch.autograd.grad((down * up).sum(), list(named.values()))
    found = penalty_gradient({n: v.detach() for n, v in at.items()}, 1)
    for name, gradient in zip(named, wanted, strict=True):
        assert torch.allclose(found[name], gradient, atol=1e-12)
    zero = {n: torch.zeros_like(v) for n, v in at.items()}
    assert tree.norm(penalty_gradient(zero, 1)) == 0.0


def test_a_client_is_sent_and_sends_its_own_rank_and_nothing_more() -> None:
    toy, strategy = make(), HetLoRA([1, 3])
    state = strategy.init(toy.problem())
    sent = addressed(strategy, state, 1, toy.clients)
    for stack, rank in zip(sent, (1, 3), strict=True):
        assert {state.ranks[c] for c in stack.clients} == {rank}
        reply = strategy.train(stack, toy.cohort(stack.clients))
        for message in (stack[0], reply[0]):
            own = {n: v for n, v in message.trees["adapter"].items() if "lora" in n}
            wanted = sum(min(rank, r) * (o + i) for o, r, i, _ in LAYERS.values())
            assert tree.numel(own) == wanted
    small, large = (message_bytes(stack[0])["adapter"] for stack in sent)
    assert large - small == 8 * sum((min(3, r) - 1) * (o + i) for o, r, i, _ in LAYERS.values())


@pytest.mark.parametrize("wrong", [{"gamma": 0.0}, {"penalty": -1.0}, {"least": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.gamma="):
        HetLoRA(**wrong)  # type: ignore[arg-type]


def test_a_bandit_may_choose_the_ranks() -> None:
    """Everybody begins in the middle; each next rank is the agents' order; nothing is pruned."""
    toy, strategy = make(), HetLoRA([1, 2, 3], bandit=True, penalty=20.0, gamma=0.5)
    states = play(strategy, toy, 8, some).states
    assert set(states[0].ranks.values()) == {2}
    seen = set()
    for state in states[1:]:
        agents = state.bandits.agents
        for client, order in agents.orders.items():
            assert state.ranks[client] == (1, 2, 3)[min(int(order[2] * 3), 2)]
        seen |= set(state.ranks.values())
        assert agents.tables.keys() <= state.losses.keys()
    heard = [set(s.losses) for s in states]
    assert set(states[2].bandits.agents.tables) == heard[1] & {*toy.clients[1:3]}  # a second loss
    assert seen == {1, 2, 3}


def test_the_fleets_times_change_what_a_bandit_has_learned() -> None:
    toy, strategy = make(), HetLoRA([1, 3], bandit=True)
    state = play(strategy, toy, 2).states[-1]
    told = strategy.told(state, {c: 1.0 + 9 * k for k, c in enumerate(toy.clients)})
    tables, others = told.bandits.agents.tables, state.bandits.agents.tables
    assert any(not torch.equal(tables[c], others[c]) for c in toy.clients)
    plain = play(HetLoRA([1, 3]), make(), 2).states[-1]
    assert HetLoRA([1, 3]).told(plain, dict.fromkeys(toy.clients, 1.0)) is plain


RANKS_CHANGE = (
    "one_client_is_local_training",
    "no_movement_changes_nothing",
    "personal_adapters_are_complete",
    "factors_are_not_told_apart_by_shape",
)
"""With another rank in the next round a client is sent another part of the global adapter than it
trained: what it uses is neither that nor the whole."""


def test_efforts_are_the_clients_shares_of_the_ranks() -> None:
    toy, strategy = make(), HetLoRA(ranks=[1, 3])
    state = strategy.init(toy.problem())
    efforts = strategy.efforts(state, toy.clients[:2])
    assert {c: own.adapter for c, own in efforts.items()} == {
        c: state.ranks[c] / 3 for c in toy.clients[:2]
    }


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda one: one.__name__)
def test_the_kit_holds_with_a_bandit(check: Property) -> None:
    verdict = examine(HetLoRA([1, 2, 3], bandit=True), check)
    assert verdict.verdict != "broken" or check.__name__ in RANKS_CHANGE, verdict.found
