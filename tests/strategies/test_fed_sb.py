"""Fed-SB against its rule in numpy: exactness, the starts, and what travels once."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.comms.ledger import message_bytes
from fedpeft.errors import FedpeftError
from fedpeft.strategies.fed_sb import FedSB
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategy import Problem, Strategy, addressed
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

Start = Literal["random", "public", "weights", "gradients"]
STARTS = pytest.mark.parametrize("start", ["random", "public", "weights", "gradients"])


def core(layer: str) -> str:
    return f"{layer}.lora_R"


def oracle(toy: Toy, present: Present, first: int, cores: Arrays, frozen: Arrays) -> Arrays:
    """SGD on R by the chain rule and on the heads, from round ``first`` to 3; weighted means."""
    w = {name: value.copy() for name, value in cores.items()}
    for t in range(first, 4):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        mean = {name: 0.0 * value for name, value in w.items()}
        for client in names:
            own = {name: value.copy() for name, value in w.items()}
            for _ in range(toy.steps[client]):
                made = {n: v for n, v in own.items() if "lora" not in n}
                for layer in LAYERS:
                    made[a_of(layer)] = frozen[a_of(layer)]
                    made[b_of(layer)] = frozen[b_of(layer)] @ own[core(layer)]
                g = toy.gradient(client, made)
                step = {n: g[n] for n in own if "lora" not in n}
                step |= {core(n): frozen[b_of(n)].T @ g[b_of(n)] for n in LAYERS}
                own = {n: own[n] - toy.lr * step[n] for n in own}
            mean = {n: mean[n] + toy.weights[client] / total * own[n] for n in mean}
        w = mean
    return w


@STARTS
@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(start: Start, present: Present) -> None:
    toy, strategy = make(), FedSB(start, first_step=0.3)
    states = play(strategy, toy, 3, present, size=2).states
    first = 2 if start == "gradients" else 1
    begun = states[first - 1]
    frozen = arrays(begun.frozen)
    wanted = oracle(toy, present, first, arrays(begun.trained), frozen)
    for name, value in wanted.items():
        assert abs(states[3].trained[name].numpy() - value).max() <= 1e-12
    adapter = strategy.adapter(states[3])
    for layer in LAYERS:
        made = frozen[b_of(layer)] @ wanted[core(layer)]
        assert abs(adapter[b_of(layer)].numpy() - made).max() <= 1e-12
        assert np.array_equal(adapter[a_of(layer)].numpy(), frozen[a_of(layer)])


@STARTS
def test_the_update_of_the_mean_is_the_mean_of_the_updates(start: Start) -> None:
    """SB1; FedAvg's factors fail the same test."""
    cases: list[tuple[Strategy, bool]] = [(FedSB(start), True), (FedAvg(), False)]
    for strategy, exact in cases:
        toy = make()
        played = play(strategy, toy, 3)
        weight = torch.tensor([toy.weights[c] for c in toy.clients], dtype=torch.float64)
        for layer in LAYERS:
            own = torch.stack([toy.update(toy.trained[c], layer) for c in toy.clients])
            ideal = torch.einsum("k,kij->ij", weight / weight.sum(), own)
            obtained = toy.update(strategy.adapter(played.states[-1]), layer)
            error = float((obtained - ideal).norm() / ideal.norm())
            assert error <= 1e-14 if exact else error > 1e-4


@STARTS
def test_bases_are_orthonormal_so_a_core_is_as_long_as_its_update(start: Start) -> None:
    """SB2, SB5, and SB4: what a step on R does to W is the projected gradient P_B G P_A."""
    toy = make()
    frozen = play(FedSB(start), toy, 1).states[-1].frozen
    for layer, (o, r, i, _) in LAYERS.items():
        a, b = frozen[a_of(layer)], frozen[b_of(layer)]
        eye = torch.eye(r, dtype=a.dtype)
        assert torch.allclose(a @ a.mT, eye, atol=1e-12)
        assert torch.allclose(b.mT @ b, eye, atol=1e-12)
        z, g = torch.randn(r, r).double(), torch.randn(o, i).double()
        assert float((b @ z @ a).norm()) == pytest.approx(float(z.norm()))
        by_core = b @ (b.mT @ g @ a.mT) @ a
        assert torch.allclose(by_core, (b @ b.mT) @ g @ (a.mT @ a), atol=1e-12)


def test_the_start_is_the_best_rank_r_part_of_the_first_step() -> None:
    """SB3: s B R_0 A is -eta sign(G) to rank r, and what is left is the tail of the spectrum."""
    toy, strategy = make(), FedSB("gradients", first_step=0.3)
    played = play(strategy, toy, 1, size=2)
    state = played.states[-1]
    weight = torch.tensor([toy.weights[c] for c in toy.clients], dtype=torch.float64)
    for layer, (_, r, *_) in LAYERS.items():
        errors = [toy.errors(c, toy.initial)[layer] for c in toy.clients]
        g = sum(w * e for w, e in zip(weight / weight.sum(), errors, strict=True))
        step = -0.3 * torch.sign(torch.as_tensor(g))
        s = torch.linalg.svdvals(step)
        left = toy.update(strategy.adapter(state), layer) - step
        assert float(left.norm()) == pytest.approx(float(s[r:].norm()), rel=1e-9, abs=1e-12)
    assert float(tree.norm(played.states[0].trained)) > 0
    zero = play(FedSB("gradients"), make(), 1).states[-1]
    assert not any(bool(zero.trained[core(layer)].any()) for layer in LAYERS)


def test_public_data_give_the_first_step_to_rank_r() -> None:
    """SB3 for ``public``."""
    toy, strategy = make(), FedSB("public", first_step=0.3)
    state = strategy.init(toy.problem())
    for layer, (_, r, *_) in LAYERS.items():
        step = -0.3 * torch.sign(toy.public_gradients()[layer])
        left = toy.update(strategy.adapter(state), layer) - step
        tail = torch.linalg.svdvals(step)[r:]
        assert float(left.norm()) == pytest.approx(float(tail.norm()), rel=1e-9, abs=1e-12)


def test_without_public_data_the_public_start_is_refused_by_name() -> None:
    problem = replace(make().problem(), public_gradients=Problem.public_gradients)
    with pytest.raises(FedpeftError, match=r"data\.public"):
        FedSB("public").init(problem)


def test_weights_start_from_the_leading_singular_vectors() -> None:
    toy = make()
    frozen = FedSB("weights").init(toy.problem()).frozen
    for layer, (_, r, *_) in LAYERS.items():
        u, _, vt = torch.linalg.svd(toy.weight(layer).double())
        a, b = frozen[a_of(layer)], frozen[b_of(layer)]
        assert torch.allclose(a.mT @ a, vt[:r].mT @ vt[:r], atol=1e-10)
        assert torch.allclose(b @ b.mT, u[:, :r] @ u[:, :r].mT, atol=1e-10)


@STARTS
def test_a_round_costs_r_squared_and_the_bases_are_sent_once_to_each_client(start: Start) -> None:
    """SB6: whatever the number of clients."""
    for clients in (2, 5):
        toy, strategy = make(clients), FedSB(start)
        played = play(strategy, toy, 3, present=some)
        cores = sum(r * r for _, r, *_ in LAYERS.values()) + 15
        had: set[str] = set()
        for sent in played.sent:
            if "like" in sent.trees:
                dense = sum(o * i for o, _, i, _ in LAYERS.values())
                assert (
                    sum(t.numel() for t in strategy.expects(sent[0])["gradients"].values()) == dense
                )
                continue
            assert tree.numel(tree.row(sent.trees["cores"], 0)) == cores
            assert ("bases" in sent.trees) == (start != "random" and not had & set(sent.clients))
            had |= set(sent.clients)
        for reply in played.replies:
            if "cores" in reply.trees:
                assert tree.numel(tree.row(reply.trees["cores"], 0)) == cores
        if start == "random":
            assert all(len(seed) == 8 for seed in played.sent[0].blobs["seed"])


def test_a_client_without_the_bases_is_refused() -> None:
    toy, strategy = make(), FedSB("weights")
    state = play(strategy, toy, 1).states[-1]
    (sent,) = addressed(strategy, state, 2, toy.clients)
    assert message_bytes(sent[0])["adapter"] > 0
    with pytest.raises(Exception, match=r"keeps version 0 of 'bases'"):
        strategy.train(sent, make().cohort(toy.clients))
