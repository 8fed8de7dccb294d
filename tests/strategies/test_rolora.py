"""RoLoRA against its rule in numpy: exactness, the frozen factor, the first sweep."""

from __future__ import annotations

import pytest
import torch

from fedpeft import tree
from fedpeft.lowrank import is_a, is_b
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.rolora import RoLoRA
from fedpeft.strategy import Strategy
from tests.strategies.oracle import average, close, dense, ideal, off, sgd, shares
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


def oracle(toy: Toy, rounds: int, present: Present) -> Arrays:
    """B and head in rounds 1, 3, ...; A and head in rounds 2, 4, ..."""
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        trained = [n for n in w if ("lora_A" if t % 2 else "lora_B") not in n]
        w = average([sgd(toy, c, w, trained) for c in names], shares(toy, names))
    return w


@pytest.mark.parametrize("present", [everyone, some])
def test_four_rounds_equal_the_rule_in_numpy(present: Present) -> None:
    toy = make()
    states = play(RoLoRA(), toy, 4, present, size=2).states
    for rounds in (1, 2, 3, 4):
        assert close(states[rounds].adapter, oracle(toy, rounds, present))


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
@pytest.mark.parametrize("present", [everyone, some])
def test_every_round_is_exact(rounds: int, present: Present) -> None:
    """RO1; FedAvg's factors fail the same test."""
    strategies: list[tuple[Strategy, bool]] = [(RoLoRA(), True), (FedAvg(), False)]
    for strategy, exact in strategies:
        toy = make()
        played = play(strategy, toy, rounds, present)
        found = dense(toy, arrays(strategy.adapter(played.states[-1])))
        error = off(found, ideal(toy, played.sent[-1].clients))
        assert error <= 1e-14 if exact else error > 1e-4


def test_the_rounds_other_factor_is_frozen_on_all_clients_and_stays_at_home() -> None:
    """RO2 and RO3."""
    toy, strategy = make(dtype=torch.float32), RoLoRA()
    state = strategy.init(toy.problem())
    for number in (1, 2, 3, 4):
        frozen, moving = (is_a, is_b) if number % 2 else (is_b, is_a)
        sent = strategy.send(state, number, toy.clients)
        reply = strategy.train(sent, toy.cohort(toy.clients))
        names = reply.trees["trained"]
        assert any(map(moving, names)) and not any(map(frozen, names))
        after = strategy.receive(state, iter([reply]))
        for name in filter(frozen, toy.initial):
            assert torch.equal(after.adapter[name], state.adapter[name])
            for client in toy.clients:
                assert torch.equal(toy.trained[client][name], state.adapter[name])
        for name in filter(moving, toy.initial):
            assert not torch.equal(after.adapter[name], state.adapter[name])
        state = after


def test_half_the_bytes_go_up() -> None:
    toy = make()
    played = play(RoLoRA(), toy, 2)
    for reply, factor in zip(played.replies, (b_of, a_of), strict=True):
        own = sum(toy.initial[factor(layer)].numel() for layer in LAYERS)
        assert tree.numel(tree.row(reply.trees["trained"], 0)) == own + 15, "and the head"


def test_two_rounds_of_one_step_are_one_gauss_seidel_sweep() -> None:
    """RO4: A moves along the gradient at the B that has just moved."""
    toy = make()
    toy.steps = dict.fromkeys(toy.clients, 1)
    found = arrays(play(RoLoRA(), toy, 2).states[-1].adapter)
    w, p = arrays(toy.initial), shares(toy, toy.clients)
    for part in ("lora_A", "lora_B"):
        step = average([toy.gradient(c, w) for c in toy.clients], p)
        w = {n: v if part in n else v - toy.lr * step[n] for n, v in w.items()}
    assert off(found, w) <= 1e-14
