"""FedAvg (FedIT) against its rule in numpy, and what averaging LoRA's factors does to updates."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedpeft import tree
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.tree import Tree
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Played,
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


def oracle(toy: Toy, rounds: int, present: Present) -> Arrays:
    """w_k by SGD from w, then w = sum_k n_k w_k / sum_k n_k."""
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        mean = {name: 0.0 * value for name, value in w.items()}
        for client in names:
            own = {name: value.copy() for name, value in w.items()}
            for _ in range(toy.steps[client]):
                gradient = toy.gradient(client, own)
                own = {name: own[name] - toy.lr * gradient[name] for name in own}
            mean = {n: mean[n] + toy.weights[client] / total * own[n] for n in mean}
        w = mean
    return w


def close(adapter: Tree, expected: Mapping[str, object], bound: float = 1e-12) -> bool:
    return all(abs(adapter[n].numpy() - v).max() <= bound for n, v in expected.items())


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("lora", [True, False])
def test_three_rounds_equal_the_rule_in_numpy(present: Present, lora: bool) -> None:
    toy = make(lora=lora)
    states = play(FedAvg(), toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        assert close(states[rounds].adapter, oracle(toy, rounds, present))


def drift(played: Played, layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p ``[K]``, A ``[K, r, d_in]`` and B ``[K, d_out, r]`` of the last round's replies."""
    reply = played.replies[-1]
    p = reply.scalars["weight"] / reply.scalars["weight"].sum()
    own = reply.trees["adapter"]
    return p, own[a_of(layer)], own[b_of(layer)]


def mean(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("k,k...->...", p, x)


@pytest.mark.parametrize("clients", [2, 5])
def test_the_mean_of_updates_differs_by_the_covariance_of_the_factors(clients: int) -> None:
    """IT1: sum_k p_k s B_k A_k - s B A = s sum_k p_k (B_k - B)(A_k - A), of rank <= (m - 1) r."""
    toy = make(clients)
    played = play(FedAvg(), toy, 2)
    for layer, (_, r, _, s) in LAYERS.items():
        p, a, b = drift(played, layer)
        obtained = toy.update(played.states[-1].adapter, layer)
        error = s * mean(p, b @ a) - obtained
        covariance = s * mean(p, (b - mean(p, b)) @ (a - mean(p, a)))
        assert float(covariance.norm()) > 1e-4, "the formula is not tested on zeros"
        assert float((error - covariance).norm()) <= 1e-14
        assert int(torch.linalg.matrix_rank(error, atol=1e-12)) <= (clients - 1) * r
        if clients == 2:
            product = p[0] * p[1] * (b[0] - b[1]) @ (a[0] - a[1])
            assert float((error - s * product).norm()) <= 1e-14


@pytest.mark.parametrize("common", [a_of, b_of])
def test_no_cross_term_where_one_factor_is_common_to_all(common: object) -> None:
    """IT2: with all A_k equal, or all B_k equal, the mean's update is the mean of the updates."""
    toy = make()
    strategy = FedAvg()
    reply = play(strategy, toy, 2).replies[-1]
    own = dict(reply.trees["adapter"])
    for layer in LAYERS:
        name = common(layer)  # type: ignore[operator]
        own[name] = own[name][:1].expand_as(own[name])
    state = strategy.receive(
        strategy.init(toy.problem()), iter([reply.reply({"adapter": own}, **reply.scalars)])
    )
    p = reply.scalars["weight"] / reply.scalars["weight"].sum()
    for layer in LAYERS:
        ideal = mean(p, toy.update(own, layer))
        assert float((toy.update(state.adapter, layer) - ideal).norm()) <= 1e-14


def test_a_lone_client_has_no_cross_term() -> None:
    """IT2 with m = 1, the state being that client's adapter."""
    toy = make(1)
    played = play(FedAvg(), toy)
    own = tree.row(played.replies[-1].trees["adapter"], 0)
    assert close(played.states[-1].adapter, arrays(own), 1e-15)


def test_the_mean_of_factors_does_not_know_the_weights_total() -> None:
    """IT5 at the extremes: 1e-9 and 1e9 times the weights give the same adapter."""
    results = []
    for factor in (1e-9, 1.0, 1e9):
        toy = make()
        toy.weights = {c: factor * w for c, w in toy.weights.items()}
        results.append(play(FedAvg(), toy).states[-1].adapter)
    assert close(results[0], arrays(results[1]), 1e-13)
    assert close(results[2], arrays(results[1]), 1e-13)
