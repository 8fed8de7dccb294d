"""Light-PEFT against its rule in numpy: scores, what goes and how much, FedAvg on what is left."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.comms.ledger import message_bytes
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.light_peft import LightPEFT
from fedpeft.strategy import addressed
from tests.strategies.oracle import average, shares
from tests.strategies.pruning_oracle import mask_of, pruned, scored
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


def local(toy: Toy, parts: Any, client: str, w: Arrays, there: Arrays) -> tuple[Arrays, Arrays]:
    """A client's adapter after its steps, entries outside ``there`` fixed, and its scores."""
    x, ema = dict(w), {p.name: np.zeros(p.groups) for p in parts}
    ranks = {layer: np.zeros(r) for layer, (_, r, _, _) in LAYERS.items()}
    for _ in range(toy.steps[client]):
        g = toy.gradient(client, x)
        for name, value in scored(toy, parts, x, g).items():
            ema[name] = 0.9 * ema[name] + 0.1 * value
        for layer, total in ranks.items():
            a, b = a_of(layer), b_of(layer)
            total += abs((x[a] * g[a]).mean(1)) + abs((x[b] * g[b]).mean(0))
        x = {n: v - toy.lr * g[n] * there.get(n, 1.0) for n, v in x.items()}
    return x, ema | {layer: total / toy.steps[client] for layer, total in ranks.items()}


def lowest(values: list[tuple[Any, float]], share: float) -> set[Any]:
    """Keys of the lowest floor(share n), of equal ones the first."""
    order = sorted(range(len(values)), key=lambda k: (values[k][1], k))
    return {values[k][0] for k in order[: math.floor(share * len(values) + 1e-9)]}


def decided(toy: Toy, s: LightPEFT, parts: Any, w: Arrays, scores: Arrays) -> Arrays:
    """Which entries of the factors are left, by name; changes ``toy.there`` to the masks."""
    part_shares = {"heads": s.heads, "channels": s.channels}
    alive = {
        p.name: pruned(p, np.ones(p.groups, bool), scores[p.name], part_shares[p.kind])
        for p in parts
    }
    masks = mask_of(parts, alive)
    toy.there = {c: {n: torch.from_numpy(m) for n, m in masks.items()} for c in toy.clients}
    size = {
        n: np.linalg.norm(k * w[b_of(n)] @ w[a_of(n)]) / np.linalg.norm(toy.weight(n).numpy())
        for n, (*_, k) in LAYERS.items()
    }
    modules = lowest([(n, size[n]) for n in sorted(LAYERS)], s.modules)
    left = [n for n in sorted(LAYERS) if n not in modules]
    flat = [((n, j), scores[n][j]) for n in left for j in range(len(scores[n]))]
    ranks, there = lowest(flat, s.ranks), {}
    for n, (_, r, _, _) in LAYERS.items():
        own = np.array([float(n in left and (n, j) not in ranks) for j in range(r)])
        there[a_of(n)] = own[:, None] * masks[n].max(0)[None]
        there[b_of(n)] = masks[n].max(1)[:, None] * own[None]
    return there


def oracle(toy: Toy, s: LightPEFT, rounds: int, present: Present) -> list[Arrays]:
    parts = toy.problem().structure().parts
    w, there, found = arrays(toy.initial), dict[str, np.ndarray](), []
    total: dict[str, Any] = {}
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        own = [local(toy, parts, c, w, there) for c in names]
        p = shares(toy, names)
        w = average([x for x, _ in own], p)
        if s.estimate < 2 * t <= 2 * s.estimate:
            new = average([e for _, e in own], p)
            total = {n: total.get(n, 0.0) + v for n, v in new.items()}
        if t == s.estimate:
            there = decided(toy, s, parts, w, total)
            w = {n: v * there.get(n, 1.0) for n, v in w.items()}
        found.append(w)
    return found


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("estimate", [1, 2, 3])
def test_six_rounds_equal_the_rule_in_numpy(estimate: int, present: Present) -> None:
    strategy = LightPEFT(estimate=estimate, heads=0.5, channels=0.5, modules=0.25)
    states = play(strategy, make(), 6, present, size=2).states
    wanted = oracle(make(), strategy, 6, present)
    for state, own in zip(states[1:], wanted, strict=True):
        for name, value in own.items():
            assert abs(state.adapter[name].numpy() - value).max() <= 1e-6, name
    last = states[-1].common
    assert sum(not bool(own.any()) for own in last.ranks.values()) >= 1
    assert any(not bool(own.all()) for own in last.alive.values())


def test_shares_are_met_exactly_also_where_all_scores_are_equal() -> None:
    """Nobody moves, so all scores are 0: ties go by index."""
    toy = make()
    toy.lr = 0.0
    for client in toy.clients:
        toy.targets[client] = {n: v * 0 for n, v in toy.targets[client].items()}
    strategy = LightPEFT(estimate=1, heads=0.5, modules=0.5, ranks=0.5)
    common = play(strategy, toy, 1).states[-1].common
    for part in toy.problem().structure().parts:
        assert int((~common.alive[part.name]).sum()) == part.groups // 2
    left = {layer: int(own.sum()) for layer, own in common.ranks.items()}
    modules = [n for n in sorted(LAYERS) if left[n]]
    assert len(modules) <= 2
    total = sum(LAYERS[n][1] for n in sorted(LAYERS)[2:])
    assert sum(left.values()) == total - total // 2


def test_with_nothing_to_remove_it_is_fedavg() -> None:
    toy, other = make(), make()
    none = {"heads": 0.0, "channels": 0.0, "modules": 0.0, "ranks": 0.0}
    ours = play(LightPEFT(estimate=1, **none), toy, 3, some).states[-1]  # type: ignore[arg-type]
    theirs = play(FedAvg(), other, 3, some).states[-1]
    for name, value in theirs.adapter.items():
        assert torch.allclose(ours.adapter[name], value, atol=1e-12)


def test_what_is_left_alone_travels() -> None:
    toy, strategy = make(), LightPEFT(estimate=1, heads=0.5, modules=0.5)
    states = play(strategy, toy, 2).states
    sizes = []
    for number, state in enumerate((states[0], states[1]), 1):
        [sent] = addressed(strategy, state, number, toy.clients)
        sizes.append(message_bytes(sent[0])["adapter"])
        reply = strategy.train(sent, toy.cohort(sent.clients))
        assert ("scores" in reply.trees) == (number == 1)
        assert reply.trees["adapter"].keys() == sent.trees["adapter"].keys()
    assert sizes[1] < 0.6 * sizes[0]
    gone = {n for n, own in states[1].common.ranks.items() if not bool(own.any())}
    assert gone and not {a_of(n) for n in gone} & sent.trees["adapter"].keys()
    for layer in gone:
        assert not bool(states[-1].adapter[b_of(layer)].any())


def test_without_rounds_of_estimation_it_prunes_first_by_the_weights() -> None:
    toy, strategy = make(), LightPEFT(estimate=0, heads=0.5)
    state = strategy.init(toy.problem())
    parts = toy.problem().structure().parts
    for part in parts:
        sums = sum(
            toy.weight(m.layer).abs().sum(1 if m.side == "rows" else 0) for m in part.members
        )
        gone = set(torch.nonzero(~state.common.alive[part.name]).flatten().tolist())
        assert gone == set(torch.argsort(torch.as_tensor(sums))[: part.groups // 2].tolist())
    assert all(bool(own.all()) for own in state.common.ranks.values())
    [sent] = addressed(strategy, state, 1, toy.clients)
    assert "scores" not in sent.trees


def test_on_a_model_clients_train_and_are_evaluated_with_less() -> None:
    lora = {"kind": "lora", "r": 4, "target_modules": ["query", "value", "dense"]}
    tiny, strategy = Tiny(adapter=lora), LightPEFT(estimate=1, modules=0.5)
    federation, state, losses = tiny.federation(strategy), strategy.init(problem(tiny)), []
    for number in range(1, 6):
        stacks = addressed(strategy, state, number, tiny.population.clients.names)
        replies: Any = list(federation.run(number, *stacks))
        losses.append(float(torch.cat([r.scalars["loss"] for r in replies]).mean()))
        state = strategy.receive(state, iter(replies))
    assert losses[-1] < losses[0]
    stacks = addressed(strategy, state, 6, tiny.population.clients.names)
    scores: Any = list(federation.evaluate(6, *stacks))
    assert len(list(itertools.chain(*scores))) == 4


def problem(tiny: Tiny) -> Any:
    import dataclasses
    from functools import partial

    from fedpeft.base import pretrained

    return dataclasses.replace(tiny.problem, weight=partial(pretrained, tiny.network))


@pytest.mark.parametrize("wrong", [{"estimate": -1}, {"ranks": 1.0}, {"heads": -0.1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.estimate="):
        LightPEFT(**wrong)
