"""FedEx-LoRA against its rule in numpy: the residual, its rank, who is sent what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.comms.ledger import message_bytes
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedex_lora import FedExLoRA, residual
from fedpeft.strategy import Strategy
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
    meaning,
    play,
    some,
)


def oracle(toy: Toy, rounds: int, present: Present) -> tuple[Arrays, Arrays]:
    """The global adapter, and the dense change of every layer's frozen weight."""
    w = arrays(toy.initial)
    base = {layer: np.zeros((o, i)) for layer, (o, _, i, _) in LAYERS.items()}
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        mean = {name: 0.0 * value for name, value in w.items()}
        product = {layer: 0.0 * value for layer, value in base.items()}
        for client in names:
            own = {name: value.copy() for name, value in w.items()}
            for _ in range(toy.steps[client]):
                gradient = toy.gradient(client, own, base)
                own = {name: own[name] - toy.lr * gradient[name] for name in own}
            p = toy.weights[client] / total
            mean = {name: mean[name] + p * own[name] for name in mean}
            for layer in product:
                product[layer] += p * own[b_of(layer)] @ own[a_of(layer)]
        w = mean
        for layer, (*_, s) in LAYERS.items():
            base[layer] += s * (product[layer] - w[b_of(layer)] @ w[a_of(layer)])
    return w, base


@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(present: Present) -> None:
    toy, strategy = make(), FedExLoRA()
    states = play(strategy, toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        adapter, base = oracle(toy, rounds, present)
        for name, value in adapter.items():
            assert abs(strategy.adapter(states[rounds])[name].numpy() - value).max() <= 1e-12
        for layer, change in base.items():
            assert abs(change).max() > 1e-5
            assert abs(strategy.base(states[rounds])[layer].numpy() - change).max() <= 1e-12


def test_the_model_is_the_mean_of_the_clients_models() -> None:
    """EX1, EX4, on a base that has changed already; FedAvg fails the same test."""
    cases: list[tuple[Strategy, bool]] = [(FedExLoRA(), True), (FedAvg(), False)]
    for strategy, exact in cases:
        toy = make()
        played = play(strategy, toy, 3, present=some)
        weight = torch.tensor([toy.weights[c] for c in toy.clients], dtype=torch.float64)
        state = played.states[-1]
        found = meaning(toy, strategy.adapter(state), strategy.base(state))
        own = tree.stack([meaning(toy, toy.trained[c], toy.bases[c]) for c in toy.clients])
        for layer in LAYERS:
            ideal = torch.einsum("k,kij->ij", weight / weight.sum(), own[layer])
            error = float((found[layer] - ideal).norm() / ideal.norm())
            assert error <= 1e-14 if exact else error > 1e-4


def test_the_residual_is_the_covariance_of_rank_m_minus_one_times_r() -> None:
    """EX2, IT1: E = sum p (B_k - B)(A_k - A), through (m - 1) r columns."""
    draw = torch.Generator().manual_seed(0)
    b, a = (torch.randn(3, *s, generator=draw).double() for s in ((9, 2), (2, 8)))
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mean_b, mean_a = (torch.einsum("k,kij->ij", p, x) for x in (b, a))
    up, down = residual(b, a, mean_b, p)
    assert up.shape == (9, 4) and down.shape == (4, 8)
    wanted = torch.einsum("k,kij->ij", p, b @ a) - mean_b @ mean_a
    covariance = torch.einsum("k,kij->ij", p, (b - mean_b) @ (a - mean_a))
    assert torch.allclose(up @ down, wanted, atol=1e-14)
    assert torch.allclose(covariance, wanted, atol=1e-14)
    assert int(torch.linalg.matrix_rank(wanted)) == 4


def test_without_a_residual_it_is_fedavg() -> None:
    """EX3: one client, or clients that are all the same."""
    for toy, other in ((make(1), make(1)), (make(), make())):
        for one in (toy, other):
            one.targets = dict.fromkeys(one.targets, one.targets["client-0"])
            one.steps = dict.fromkeys(one.steps, 2)
        ours, theirs = play(FedExLoRA(), toy).states[-1], play(FedAvg(), other).states[-1]
        assert all(float(change.norm()) <= 1e-14 for change in ours.book.total.values())
        for name, value in theirs.adapter.items():
            assert torch.allclose(ours.adapter[name], value, atol=1e-14)


def test_a_residual_of_lower_rank_is_the_best_one() -> None:
    toy, other = make(), make()
    low = play(FedExLoRA(residual_rank=1), toy, 1).states[-1].book
    full = play(FedExLoRA(), other, 1).states[-1].book
    for layer in LAYERS:
        u, s, vt = torch.linalg.svd(full.total[layer])
        best = s[0] * torch.outer(u[:, 0], vt[0])
        assert torch.allclose(low.total[layer], best, atol=1e-14)
        assert float((low.total[layer] - full.total[layer]).norm()) > 1e-6
    with pytest.raises(FedpeftError, match=r"residual_rank=-1"):
        FedExLoRA(residual_rank=-1)


def test_clients_are_sent_what_they_missed_and_nothing_twice() -> None:
    """Clients 1 and 2 were in round 2 and so have round 1's residual; nobody has round 2's."""
    toy, strategy = make(), FedExLoRA()
    state = play(strategy, toy, 2, present=some).states[-1]
    groups = strategy.groups(state, toy.clients)
    assert groups == [("client-1", "client-2"), ("client-0", "client-3", "client-4")]
    news = [strategy.send(state, 3, group) for group in groups]
    assert [(m[0].scalars["fold_since"], m[0].scalars["fold_version"]) for m in news] == [
        (1, 2),
        (0, 2),
    ]
    sizes = [message_bytes(m[0]).get("base", 0) for m in news]
    assert min(sizes) > 0
    fresh = strategy.send(strategy.init(toy.problem()), 1, toy.clients)
    assert "base" not in message_bytes(fresh[0])
