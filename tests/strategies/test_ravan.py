"""RAVAN against its rule in numpy: exactness, scales that are folded into cores, frozen heads."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.errors import FedpeftError
from fedpeft.lowrank import orthonormal_pairs
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.ravan import Ravan
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    Toy,
    a_of,
    b_of,
    equal,
    everyone,
    make,
    play,
    some,
)


def ranks(layer: str, heads: int) -> list[int]:
    """r = 2 or 3 in one head, or in two: 1 + 1 and 2 + 1."""
    r = LAYERS[layer][1]
    return [r] if heads == 1 else [r - 1, 1]


def oracle(toy: Toy, rounds: int, present: Present, frozen: Arrays, heads: int) -> Arrays:
    """SGD on every H_i and c_i by the chain rule; the server averages c_i H_i and the head."""
    others = {n: t.numpy().copy() for n, t in toy.initial.items() if ".lora_" not in n}
    cores = {layer: [np.zeros((r, r)) for r in ranks(layer, heads)] for layer in LAYERS}
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        total = sum(toy.weights[c] for c in names)
        new = {layer: [0.0 * h for h in own] for layer, own in cores.items()}
        mean = {n: 0.0 * v for n, v in others.items()}
        for client in names:
            hs, own, cs = trained(toy, client, cores, others, frozen, heads)
            p = toy.weights[client] / total
            for layer, parts in new.items():
                for i in range(len(parts)):
                    parts[i] = parts[i] + p * cs[layer][i] * hs[layer][i]
            mean = {n: mean[n] + p * own[n] for n in mean}
        cores, others = new, mean
    return others | {b_of(n): up(frozen, n, own, heads) for n, own in cores.items()}


def up(frozen: Arrays, layer: str, cores: list[np.ndarray], heads: int) -> np.ndarray:
    at, parts = 0, []
    for r, core in zip(ranks(layer, heads), cores, strict=True):
        parts.append(frozen[b_of(layer)][:, at : at + r] @ core)
        at += r
    return np.concatenate(parts, axis=1)


def trained(
    toy: Toy,
    client: str,
    cores: dict[str, list[np.ndarray]],
    others: Arrays,
    frozen: Arrays,
    h: int,
) -> tuple[dict[str, list[np.ndarray]], Arrays, dict[str, list[float]]]:
    hs = {layer: [x.copy() for x in own] for layer, own in cores.items()}
    cs = {layer: [1.0] * len(own) for layer, own in cores.items()}
    own = {n: v.copy() for n, v in others.items()}
    for _ in range(toy.steps[client]):
        scaled = {n: [c * x for c, x in zip(cs[n], hs[n], strict=True)] for n in hs}
        adapter = {**own, **{a_of(n): frozen[a_of(n)] for n in hs}}
        adapter |= {b_of(n): up(frozen, n, scaled[n], h) for n in hs}
        gradient = toy.gradient(client, adapter)
        for layer in hs:
            at = 0
            for i, r in enumerate(ranks(layer, h)):
                outer = gradient[b_of(layer)][:, at : at + r]
                inner = frozen[b_of(layer)][:, at : at + r].T @ outer  # by c_i H_i
                step_h, step_c = cs[layer][i] * inner, float((inner * hs[layer][i]).sum())
                hs[layer][i] = hs[layer][i] - toy.lr * step_h
                cs[layer][i] -= toy.lr * step_c
                at += r
        own = {n: v - toy.lr * gradient[n] for n, v in own.items()}
    return hs, own, cs


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(heads: int, present: Present) -> None:
    toy, strategy = make(), Ravan(heads)
    states = play(strategy, toy, 3, present, size=2).states
    frozen = {n: t.numpy() for n, t in states[0].frozen.items()}
    for rounds in (1, 2, 3):
        adapter = strategy.adapter(states[rounds])
        expected = oracle(toy, rounds, present, frozen, heads)
        for name, value in expected.items():
            assert abs(adapter[name].numpy() - value).max() <= 1e-12
        for layer in LAYERS:
            assert np.array_equal(adapter[a_of(layer)].numpy(), frozen[a_of(layer)])


def test_the_update_of_the_mean_is_the_mean_of_the_updates() -> None:
    """RV1; FedAvg's factors fail the same test."""
    for strategy, exact in ((Ravan(2), True), (FedAvg(), False)):
        toy = make()
        played = play(strategy, toy, 2)
        weight = played.replies[-1].scalars["weight"]
        for layer in LAYERS:
            own = torch.stack([toy.update(toy.trained[c], layer) for c in toy.clients])
            ideal = torch.einsum("k,kij->ij", weight / weight.sum(), own)
            obtained = toy.update(strategy.adapter(played.states[-1]), layer)
            error = float((obtained - ideal).norm() / ideal.norm())
            assert error <= 1e-14 if exact else error > 1e-4


def test_scales_take_part_and_never_travel() -> None:
    """RV3: with c_i = 1 again the update is what c_i H_i made it."""
    toy, strategy = make(1), Ravan(2)
    played = play(strategy, toy, 2)
    for messages in [*played.sent, *played.replies]:
        assert not any("lora_c" in name for name in messages.trees["cores"])
    still = dataclasses.replace(toy, steps=dict.fromkeys(toy.steps, 4))
    sent = strategy.send(played.states[-1], 3, toy.clients)
    reply = strategy.train(sent, still.cohort(toy.clients))
    frozen = played.states[-1].frozen
    for layer in LAYERS:
        made = strategy._expand(reply.trees["cores"], frozen)[b_of(layer)][0]
        assert torch.equal(made, still.trained["client-0"][b_of(layer)])


def test_what_travels_is_the_sum_of_the_squared_ranks() -> None:
    toy = make()
    played = play(Ravan(2), toy)
    for messages in [*played.sent, *played.replies]:
        cores = {n: t for n, t in messages.trees["cores"].items() if "lora_" in n}
        assert tree.numel(tree.row(cores, 0)) == 2 * (1 + 1) + 2 * (4 + 1)
    assert all(len(seed) == 8 for seed in played.sent[0].blobs["seed"])


def test_bases_are_orthonormal_differ_by_layer_and_come_from_the_seed() -> None:
    toy = make()
    drawn, again, other = (orthonormal_pairs(toy.initial, "ravan", seed) for seed in (1, 1, 2))
    assert equal(drawn, again)
    for name, value in drawn.items():
        gram = value @ value.mT if "lora_A" in name else value.mT @ value
        assert torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-13)
        assert float((value - other[name]).norm()) > 0.1
    one, two = (drawn[a_of(n)] for n in LAYERS if ".layer.1." in n)
    assert float((one - two).norm()) > 0.1


def test_no_heads_and_a_start_that_would_be_lost_are_refused() -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.heads=0"):
        Ravan(0)
    toy = make()
    name = b_of(next(iter(LAYERS)))
    toy.initial[name] = torch.ones_like(toy.initial[name])
    with pytest.raises(FedpeftError, match=r"'ravan'.*B must start from zero.*adapter\.start"):
        Ravan().init(toy.problem())
