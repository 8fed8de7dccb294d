"""Clients of unequal ranks: who has which, and that a lower rank inside the model is exact."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.errors import FedpeftError
from fedpeft.ranks import assign, full_rank, lead, widen
from fedpeft.strategies.flexlora import FlexLoRA
from fedpeft.strategy import Problem, addressed
from tests.cohort import small
from tests.strategies.toy import LAYERS, Present, a_of, arrays, b_of, everyone, make, some
from tests.tiny import LORA, tiny_network


def problem(clients: int, seed: int = 7) -> Problem:
    names = tuple(f"c{k}" for k in range(clients))
    return dataclasses.replace(make().problem(seed=seed), clients=names)


def test_ranks_are_given_or_drawn_in_equal_shares_by_the_seed() -> None:
    assert full_rank(make().initial) == 3
    assert set(assign(problem(5), [], {}).values()) == {3}
    drawn = assign(problem(90), [1, 2, 2], {})
    assert Counter(drawn.values()) == {1: 30, 2: 60} and set(drawn) == set(problem(90).clients)
    assert drawn == assign(problem(90), [1, 2, 2], {}) != assign(problem(90, 8), [1, 2, 2], {})
    given = assign(problem(4), [1], {"c1": 3, "c3": 2})
    assert given == {"c0": 1, "c1": 3, "c2": 1, "c3": 2}


def test_a_rank_that_the_model_does_not_hold_and_an_unknown_client_are_refused() -> None:
    for ranks, given in (([4], {}), ([0], {}), ([], {"c0": 4})):
        with pytest.raises(FedpeftError, match=r"strategy\.ranks has \d, .*adapter\.r=3"):
            assign(problem(3), ranks, given)
    with pytest.raises(FedpeftError, match=r"client_ranks names 'x', which is no client"):
        assign(problem(3), [], {"x": 1})


def test_lead_and_widen_are_the_first_rows_and_zeros() -> None:
    toy = make()
    stacked = {n: torch.randn(2, *v.shape).double() for n, v in toy.initial.items()}
    low = lead(stacked, 2, dim=1)
    wide = widen(toy.initial)(low)
    for layer, s in toy.scaling.items():
        assert low[a_of(layer)].shape[1] == low[b_of(layer)].shape[2] == 2
        own = s * low[b_of(layer)] @ low[a_of(layer)]
        assert torch.equal(toy.update(wide, layer), own)
    assert tree.norm({n: v for n, v in wide.items() if "lora" not in n}) > 0
    tree.check_same(tree.row(wide, 0), toy.initial)
    one = tree.row(stacked, 1)
    for name, value in lead(one, 2).items():
        assert torch.equal(value, low[name][1])


def test_a_low_rank_inside_the_model_is_the_model_of_that_rank() -> None:
    """Logits and gradients of rank 2 with the s of rank 5, against peft's own rank 2 and that s."""
    wide = tiny_network({**LORA, "r": 5, "lora_alpha": 10})
    own = tiny_network({**LORA, "r": 2, "lora_alpha": 4})
    assert set(own.scaling.values()) == set(wide.scaling.values()) == {2.0}
    start = small.stacked(own, clients=1)
    tokens = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
    own.write(tree.row(start, 0))
    mine = {n: p for n, p in own.model.named_parameters() if n in own.initial}
    loss = own.model(input_ids=tokens).logits.square().sum()
    wanted = dict(zip(mine, torch.autograd.grad(loss, list(mine.values())), strict=True))
    leaves = {n: v.clone().requires_grad_() for n, v in start.items()}
    made = tree.row(widen(wide.initial)(leaves), 0)
    other = torch.func.functional_call(wide.model, made, (), {"input_ids": tokens}).logits
    assert torch.allclose(other.square().sum(), loss, rtol=1e-6)
    found = torch.autograd.grad(other.square().sum(), list(leaves.values()))
    for (name, _), gradient in zip(leaves.items(), found, strict=True):
        assert torch.allclose(gradient[0], wanted[name], atol=1e-5)


@pytest.mark.parametrize("present", [everyone, some])
def test_flexlora_gives_every_client_the_best_factors_of_its_rank(present: Present) -> None:
    """FX1 for each client's own rank, in numpy: W = sum p_k s B_k A_k, its SVD, its tail."""
    ranks = {"client-0": 1, "client-1": 3, "client-2": 2, "client-3": 1, "client-4": 3}
    toy, strategy = make(), FlexLoRA(client_ranks=ranks)
    state = strategy.init(toy.problem())
    adapter = arrays(toy.initial)
    for t in (1, 2, 3):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        dense = {n: np.zeros((o, i)) for n, (o, _, i, _) in LAYERS.items()}
        heads = {n: 0.0 * v for n, v in adapter.items() if "lora" not in n}
        for client in names:
            own = arrays(lead({n: torch.from_numpy(v) for n, v in adapter.items()}, ranks[client]))
            for _ in range(toy.steps[client]):
                g = toy.gradient(client, own)
                own = {n: own[n] - toy.lr * g[n] for n in own}
            p = toy.weights[client] / total
            for layer, (*_, s) in LAYERS.items():
                dense[layer] += p * s * own[b_of(layer)] @ own[a_of(layer)]
            heads = {n: heads[n] + p * own[n] for n in heads}
        sent = addressed(strategy, state, t, names)
        replies = [strategy.train(stack, toy.cohort(stack.clients)) for stack in sent]
        state = strategy.receive(state, iter(replies))
        adapter = arrays(strategy.adapter(state))
        for layer, (_, r, *_) in LAYERS.items():
            tail = np.linalg.svd(dense[layer], compute_uv=False)
            for q in range(1, r + 1):
                low = lead(strategy.adapter(state), q)
                left = float(np.linalg.norm(toy.update(low, layer).numpy() - dense[layer]))
                assert left == pytest.approx(float(np.linalg.norm(tail[q:])), abs=1e-12)
        for name, value in heads.items():
            assert abs(adapter[name] - value).max() <= 1e-12
