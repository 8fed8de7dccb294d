"""FedProx against its rule in numpy, in both spaces; its proximal gradient against the dense."""

from __future__ import annotations

import math

import pytest
import torch

from fedpeft import tree
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedprox import FedProx, product_pull
from fedpeft.strategy import build
from fedpeft.tree import Tree
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    Toy,
    a_of,
    arrays,
    b_of,
    distance,
    equal,
    everyone,
    make,
    play,
    some,
)

MU = 1.7


def pull(toy: Toy, own: Arrays, w: Arrays, space: str) -> Arrays:
    """The gradient of 1/2 ||w_k - w||^2, or of 1/2 ||s B_k A_k - s B A||^2 with dense matrices."""
    found = {name: own[name] - w[name] for name in own}
    if space == "product":
        for layer, s in toy.scaling.items():
            a, b = own[a_of(layer)], own[b_of(layer)]
            apart = s * b @ a - s * w[b_of(layer)] @ w[a_of(layer)]
            found[a_of(layer)] = s * b.T @ apart
            found[b_of(layer)] = s * apart @ a.T
    return found


def oracle(toy: Toy, rounds: int, present: Present, space: str) -> Arrays:
    """SGD on F_k + mu/2 distance^2 from w, then the weighted mean."""
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        mean = {name: 0.0 * value for name, value in w.items()}
        for client in names:
            own = {name: value.copy() for name, value in w.items()}
            for _ in range(toy.steps[client]):
                gradient, back = toy.gradient(client, own), pull(toy, own, w, space)
                own = {n: own[n] - toy.lr * (gradient[n] + MU * back[n]) for n in own}
            mean = {n: mean[n] + toy.weights[client] / total * own[n] for n in mean}
        w = mean
    return w


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("space", ["factor", "product"])
def test_three_rounds_equal_the_rule_in_numpy(space: str, present: Present) -> None:
    toy = make()
    states = play(build("fedprox", {"mu": MU, "space": space}), toy, 3, present, size=2).states
    plain = play(FedAvg(), toy, 3, present).states[-1].adapter
    for rounds in (1, 2, 3):
        for name, value in oracle(toy, rounds, present, space).items():
            assert abs(states[rounds].adapter[name].numpy() - value).max() <= 1e-12
    assert distance(states[-1].adapter, plain) > 1e-2, "the proximal term does something"


def test_factor_space_is_for_any_adapter() -> None:
    toy = make(lora=False)
    adapter = play(FedProx(MU), toy).states[-1].adapter
    for name, value in oracle(toy, 3, everyone, "factor").items():
        assert abs(adapter[name].numpy() - value).max() <= 1e-12


@pytest.mark.parametrize("space", ["factor", "product"])
def test_mu_zero_is_fedavg_bit_by_bit(space: str) -> None:
    """PX1."""
    toy = make(dtype=torch.float32)
    prox = play(build("fedprox", {"mu": 0.0, "space": space}), toy, present=some).states[-1]
    assert equal(prox.adapter, play(FedAvg(), toy, present=some).states[-1].adapter)


def movement(strategy: FedProx) -> float:
    """How far a client gets from the global adapter in 100 small steps."""
    toy = make(1)
    toy.lr, toy.steps = 1e-3, dict.fromkeys(toy.clients, 100)
    played = play(strategy, toy, 1)
    return tree.norm(tree.sub(played.states[-1].adapter, toy.initial))


def test_clients_stay_where_they_are_as_mu_grows() -> None:
    """PX2: movement falls with mu, and at large mu it is at most the first gradient / mu."""
    moved = [movement(FedProx(mu)) for mu in (0.0, 1.0, 10.0, 500.0)]
    assert moved == sorted(moved, reverse=True)
    toy = make(1)
    first = toy.cohort(toy.clients).gradients(tree.broadcast(toy.initial, 1))
    assert moved[-1] <= tree.norm(first) / 500.0


def points(seed: int, clients: int = 3) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(clients, *shape, generator=draw, dtype=torch.float64)
        for layer, (d_out, r, d_in, _) in LAYERS.items()
        for name, shape in ((a_of(layer), (r, d_in)), (b_of(layer), (d_out, r)))
    }


SCALING = {layer: s for layer, (*_, s) in LAYERS.items()}


@pytest.mark.parametrize("apart", [1.0, 1e-6])
def test_product_pull_is_the_gradient_of_the_dense_distance(apart: float) -> None:
    """PX3, by autograd on 1/2 ||s B A - s B_t A_t||^2, near w_t as well as far from it."""
    then = points(0)
    now = tree.add(then, tree.scale(points(1), apart))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in now.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for layer, s in SCALING.items():
        a, b = a_of(layer), b_of(layer)
        loss = loss + 0.5 * (s * leaves[b] @ leaves[a] - s * then[b] @ then[a]).square().sum()
    dense = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = product_pull(now, then, SCALING)
    assert distance(tree.sort(found), tree.sort(dense)) <= (1e-13 if apart == 1.0 else 1e-9)


def test_product_pull_depends_on_the_update_not_on_its_factors() -> None:
    """B Q and Q^-1 A are the same update: no pull, although both factors moved."""
    then = points(0)
    now = dict(then)
    for layer, (_, r, _, _) in LAYERS.items():
        draw = torch.Generator().manual_seed(r)
        mix = torch.randn(3, r, r, generator=draw, dtype=torch.float64) + 3 * torch.eye(r)
        now[a_of(layer)] = torch.linalg.solve(mix, then[a_of(layer)])
        now[b_of(layer)] = then[b_of(layer)] @ mix
    moved = tree.sub(now, then)
    assert tree.norm(moved) > 1
    assert tree.norm(product_pull(now, then, SCALING)) <= 1e-11


def test_product_pull_is_exactly_zero_at_the_start_in_float32() -> None:
    then = {name: tensor.float() for name, tensor in points(0).items()}
    found = product_pull(then, then, SCALING)
    assert found.keys() == then.keys()
    assert not any(bool(tensor.any()) for tensor in found.values())


def test_product_pull_never_forms_the_dense_update() -> None:
    """It would take 160 GB here."""
    layer = next(iter(LAYERS))
    wide = {a_of(layer): torch.ones(1, 2, 200_000), b_of(layer): torch.ones(1, 200_000, 2)}
    found = product_pull(wide, tree.scale(wide, 0.5), {layer: 1.0})
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in wide.items()
    }


def test_only_product_space_sends_the_scaling() -> None:
    toy = make()
    for space, expected in (("factor", {}), ("product", toy.scaling)):
        sent = play(build("fedprox", {"space": space}), toy, 1).sent[0]
        assert sent[0].scalars == expected


@pytest.mark.parametrize("mu", [-0.01, math.nan, math.inf])
def test_mu_must_be_finite_and_not_negative(mu: float) -> None:
    with pytest.raises(FedpeftError, match=rf"strategy\.mu={mu}.*finite number >= 0.*FedAvg"):
        build("fedprox", {"mu": mu})


def test_product_space_refuses_an_adapter_without_factors() -> None:
    toy = make(lora=False)
    with pytest.raises(FedpeftError, match=r"space='product'.*no lora_A.*space=factor"):
        FedProx(space="product").init(toy.problem())
