"""FLoRA against its rule in numpy: stacks, weights on one side, a fresh start for everybody."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.errors import FedpeftError
from fedpeft.strategies.flora import FLoRA, fresh
from fedpeft.streams import derive
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    Toy,
    a_of,
    arrays,
    b_of,
    equal,
    everyone,
    make,
    meaning,
    play,
    some,
)


def oracle(toy: Toy, rounds: int, present: Present, seed: int) -> tuple[Arrays, Arrays]:
    """Heads, and the dense change of every layer's frozen weight."""
    heads = {n: v for n, v in arrays(toy.initial).items() if "lora_" not in n}
    base = {layer: np.zeros((o, i)) for layer, (o, _, i, _) in LAYERS.items()}
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        mean = {name: 0.0 * value for name, value in heads.items()}
        change = {layer: 0.0 * value for layer, value in base.items()}
        for client in names:
            own = {**heads, **arrays(fresh(toy.initial, derive(seed, t), client))}
            for _ in range(toy.steps[client]):
                gradient = toy.gradient(client, own, base)
                own = {name: own[name] - toy.lr * gradient[name] for name in own}
            p = toy.weights[client] / total
            mean = {name: mean[name] + p * own[name] for name in mean}
            for layer, (*_, s) in LAYERS.items():
                change[layer] += p * s * own[b_of(layer)] @ own[a_of(layer)]
        heads = mean
        base = {layer: base[layer] + change[layer] for layer in base}
    return heads, base


@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(present: Present) -> None:
    """FL1 and FL3: the base after T rounds is the pretrained one plus every round's stack."""
    toy, strategy = make(), FLoRA()
    states = play(strategy, toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        heads, base = oracle(toy, rounds, present, states[0].seed)
        adapter = strategy.adapter(states[rounds])
        for name, value in heads.items():
            assert abs(adapter[name].numpy() - value).max() <= 1e-12
        for layer, change in base.items():
            assert not bool(adapter[b_of(layer)].any())
            assert abs(change).max() > 1e-3
            assert abs(strategy.base(states[rounds])[layer].numpy() - change).max() <= 1e-12


def test_clients_of_unequal_ranks_are_stacked_as_they_are() -> None:
    """FL1: exact, and each client is sent and sends its own rank alone."""
    ranks = {"client-0": 1, "client-1": 3, "client-2": 2, "client-3": 1, "client-4": 3}
    toy, strategy = make(), FLoRA(client_ranks=ranks)
    played = play(strategy, toy, 2, size=2)
    weight = torch.tensor([toy.weights[c] for c in toy.clients], dtype=torch.float64)
    own = tree.stack([meaning(toy, toy.trained[c], toy.bases[c]) for c in toy.clients])
    for name, value in meaning(toy, strategy.adapter(played.states[-1]), {}).items():
        found = strategy.base(played.states[-1]).get(name, value)
        ideal = torch.einsum("k,k...->...", weight / weight.sum(), own[name])
        assert float((found - ideal).norm()) <= 1e-13
    seen = set()
    for reply in played.replies:
        (rank,) = {ranks[c] for c in reply.clients}
        seen.add(rank)
        for layer, (_, r, *_) in LAYERS.items():
            assert reply.trees["adapter"][a_of(layer)].shape[1] == min(rank, r)
            assert reply.trees["adapter"][b_of(layer)].shape[2] == min(rank, r)
    assert seen == {1, 2, 3}


def test_weights_on_both_sides_would_be_another_model() -> None:
    """FL2, as a negative control of the oracle above."""
    toy, strategy = make(), FLoRA()
    played = play(strategy, toy, 1)
    weight = played.replies[0].scalars["weight"]
    p = weight / weight.sum()
    own = [meaning(toy, toy.trained[c], {}) for c in toy.clients]
    for layer in LAYERS:
        right, wrong = (
            sum(q * x[layer] for q, x in zip(w, own, strict=True)) for w in (p, p.square())
        )
        found = strategy.base(played.states[-1])[layer]
        assert float((found - right).norm()) <= 1e-14 < 1e-3 < float((found - wrong).norm())


def test_every_client_and_round_and_layer_has_a_fresh_a_and_b_zero() -> None:
    """FL4."""
    toy = make()
    drawn = [fresh(toy.initial, derive(1, t), c) for t in (1, 2) for c in toy.clients[:2]]
    drawn += [fresh(toy.initial, derive(2, 1), toy.clients[0])]
    assert equal(drawn[0], fresh(toy.initial, derive(1, 1), toy.clients[0]))
    for layer in LAYERS:
        a = [one[a_of(layer)] for one in drawn]
        assert all(float((x - y).norm()) > 0.1 for i, x in enumerate(a) for y in a[:i])
        assert not any(bool(one[b_of(layer)].any()) for one in drawn)
    one, two = (drawn[0][a_of(n)] for n in LAYERS if ".layer.1." in n)
    assert float((one - two).norm()) > 0.1
    shape = {a_of("x"): torch.zeros(64, 400), b_of("x"): torch.zeros(3, 64)}
    a = fresh(shape, 0, "c")[a_of("x")]
    assert 0.999 / math.sqrt(400) < float(a.abs().max()) <= 1 / math.sqrt(400)


def test_clients_start_from_where_the_server_is() -> None:
    toy, strategy = make(), FLoRA()
    state = play(strategy, toy, 2).states[-1]
    sent = strategy.send(state, 3, toy.clients)
    cohort = toy.cohort(toy.clients)
    base, own = strategy.followed(sent, cohort), strategy.personal(sent, cohort)
    whole = meaning(toy, strategy.adapter(state), strategy.base(state))
    for k in range(len(toy.clients)):
        assert equal(meaning(toy, tree.row(own, k), base), whole)


def test_what_is_sent_down_grows_with_the_clients() -> None:
    toy, strategy = make(), FLoRA()
    sizes = []
    for clients in (1, 2):
        state = play(strategy, make(clients), 1).states[-1]
        sent = strategy.send(state, 2, toy.clients[:1])
        sizes.append(sum(tree.numel(t) for n, t in sent.trees.items() if n.startswith("fold")))
    dense = sum(o * i for o, _, i, _ in LAYERS.values())
    factors = sum(r * (o + i) for o, r, i, _ in LAYERS.values())
    assert sizes == [min(dense, factors), min(dense, 2 * factors)]


def test_a_start_that_would_be_lost_is_refused() -> None:
    toy = make()
    name = b_of(next(iter(LAYERS)))
    toy.initial[name] = torch.ones_like(toy.initial[name])
    with pytest.raises(FedpeftError, match=r"'flora'.*B must start from zero"):
        FLoRA().init(toy.problem())
