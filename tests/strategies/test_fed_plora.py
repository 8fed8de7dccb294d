"""Fed-PLoRA against its rule in numpy: modules drawn, trained and averaged by who trained them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.comms.ledger import message_bytes
from fedpeft.strategies.fed_plora import FedPLoRA, pick
from fedpeft.strategies.fedavg import FedAvg
from tests.strategies.oracle import off, sgd
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    a_of,
    arrays,
    b_of,
    everyone,
    make,
    play,
    some,
)

RANKS = {f"client-{k}": rank for k, rank in enumerate((1, 2, 3, 1, 2))}


def masks(w: Arrays, seed: bytes, client: str) -> Arrays:
    """1 where the client trains."""
    found = {name: np.ones_like(value) for name, value in w.items()}
    for layer in LAYERS:
        modules = len(w[a_of(layer)])
        out = [
            j
            for j in range(modules)
            if j not in pick(int.from_bytes(seed, "little"), client, layer, modules, RANKS[client])
        ]
        found[a_of(layer)][out], found[b_of(layer)][:, out] = 0, 0
    return found


@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(present: Present) -> None:
    toy = make()
    played = play(FedPLoRA(client_ranks=RANKS), toy, 3, present, size=2)
    seeds = {}
    for sent in played.sent:
        seeds.setdefault(sent.blobs["seed"][0], None)
    w = arrays(toy.initial)
    for t, seed in zip((1, 2, 3), seeds, strict=True):
        total = {n: np.zeros_like(x) for n, x in w.items()}
        count = {n: np.zeros_like(x) for n, x in w.items()}
        for client in present(t, toy.clients):
            on = masks(w, seed, client)
            own = sgd(toy, client, w, change=lambda g, on=on: {n: g[n] * on[n] for n in g})
            for name in w:
                total[name] += toy.weights[client] * on[name] * own[name]
                count[name] += toy.weights[client] * on[name]
        w = {n: np.where(count[n] > 0, total[n] / np.maximum(count[n], 1e-9), w[n]) for n in w}
        assert off(arrays(played.states[t].modules), w) <= 1e-12


def test_with_all_modules_it_is_fedavg() -> None:
    toy, other = make(), make()
    one = play(FedPLoRA(), toy, 3, some).states[-1].modules
    two = play(FedAvg(), other, 3, some).states[-1].adapter
    assert off(arrays(one), arrays(two)) <= 1e-14


def test_modules_that_were_not_drawn_hold_still_and_do_not_travel() -> None:
    """PL1, PL2: the client starts from the whole global model, and sends its modules only."""
    toy = make()
    toy.initial |= {b_of(n): torch.ones_like(toy.initial[b_of(n)]) for n in LAYERS}
    played = play(FedPLoRA(client_ranks=RANKS), toy, 1)
    for sent, reply in zip(played.sent, played.replies, strict=True):
        for k, client in enumerate(reply.clients):
            whole, on = (
                toy.trained[client],
                masks(arrays(toy.initial), sent.blobs["seed"][k], client),
            )
            for name, value in toy.initial.items():
                still = torch.from_numpy(on[name]) == 0
                assert torch.equal(whole[name][still], value[still])
                assert bool((whole[name][~still] != value[~still]).all())
            for layer, (d_out, r, d_in, _) in LAYERS.items():
                few = min(r, RANKS[client])
                assert reply.trees["modules"][a_of(layer)].shape[1:] == (few, d_in)
                assert reply.trees["modules"][b_of(layer)].shape[1:] == (d_out, few)
    up = {r.clients[0]: sum(message_bytes(r[0]).values()) for r in played.replies}
    assert up["client-0"] < up["client-1"] < up["client-2"]


def test_a_forged_module_number_reaches_nothing_else() -> None:
    toy, strategy = make(), FedPLoRA(client_ranks=RANKS)
    played = play(strategy, toy, 1)
    reply = played.replies[0]
    forged = {
        n: torch.full_like(x, 99) if "index" in n else x for n, x in reply.trees["modules"].items()
    }
    state = strategy.receive(
        played.states[0], iter([reply.reply({"modules": forged}, **reply.scalars)])
    )
    assert all(bool(torch.isfinite(x).all()) for x in state.modules.values())


def test_draws_differ_between_rounds_clients_and_layers() -> None:
    draws = {
        tuple(pick(seed, client, layer, 16, 4))
        for seed in (1, 2)
        for client in ("a", "b")
        for layer in ("x", "y")
    }
    assert len(draws) == 8 and all(len(set(own)) == 4 for own in draws)
