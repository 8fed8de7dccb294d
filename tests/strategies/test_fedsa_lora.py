"""FedSA-LoRA against its rule in numpy: A is everybody's, B and head are one's own."""

from __future__ import annotations

import pytest
import torch

from fedpeft import tree
from fedpeft.lowrank import is_a
from fedpeft.strategies.fedsa_lora import FedSALoRA
from fedpeft.strategies.local import Local
from tests.strategies.oracle import average, close, sgd, shares
from tests.strategies.toy import (
    LAYERS,
    Arrays,
    Present,
    Toy,
    a_of,
    arrays,
    everyone,
    make,
    play,
    some,
)


def oracle(toy: Toy, rounds: int, present: Present) -> dict[str, Arrays]:
    """Everybody's adapter after so many rounds: the shared A, and what each keeps."""
    start = arrays(toy.initial)
    shared = {n: v for n, v in start.items() if "lora_A" in n}
    fresh = {n: v for n, v in start.items() if "lora_A" not in n}
    own = {c: fresh for c in toy.clients}
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        ends = [sgd(toy, c, shared | own[c]) for c in names]
        own |= {c: {n: end[n] for n in own[c]} for c, end in zip(names, ends, strict=True)}
        mean = average(ends, shares(toy, names))
        shared = {n: mean[n] for n in shared}
    return {c: shared | own[c] for c in toy.clients}


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_the_rounds_equal_the_rule_in_numpy(present: Present, rounds: int) -> None:
    toy, strategy = make(), FedSALoRA()
    state = play(strategy, toy, rounds, present, size=2).states[-1]
    sent = strategy.send(state, rounds + 1, toy.clients)
    own = strategy.personal(sent, toy.cohort(toy.clients))
    expected = oracle(make(), rounds, present)
    for k, client in enumerate(toy.clients):
        assert close(tree.row(own, k), expected[client])


def test_only_a_travels() -> None:
    """SA1, both ways."""
    toy = make()
    played = play(FedSALoRA(), toy, present=some)
    for messages in played.sent + played.replies:
        assert messages.trees.keys() == {"shared"} and not messages.blobs
        assert set(messages.trees["shared"]) == set(filter(is_a, toy.initial))
    for kept in toy.memory.values():
        assert set(kept["own"]) == {n for n in toy.initial if not is_a(n)}


def test_each_clients_update_lies_in_the_row_space_of_the_shared_a() -> None:
    """SA2."""
    toy, strategy = make(), FedSALoRA()
    state = play(strategy, toy).states[-1]
    own = strategy.personal(strategy.send(state, 4, toy.clients), toy.cohort(toy.clients))
    for layer in LAYERS:
        a = state.shared[a_of(layer)]
        update = toy.update(own, layer)
        outside = update - update @ torch.linalg.pinv(a) @ a
        assert float(outside.norm()) <= 1e-12 < float(update.norm())


def test_a_lone_client_trains_as_without_federation() -> None:
    """SA3."""
    results = []
    for strategy in (FedSALoRA(), Local()):
        toy = make(1)
        state = play(strategy, toy).states[-1]
        sent = strategy.send(state, 4, toy.clients)
        results.append(tree.row(strategy.personal(sent, toy.cohort(toy.clients)), 0))
    assert close(results[0], arrays(results[1]), 1e-14)


def test_a_newcomer_begins_with_the_shared_a_and_a_fresh_b() -> None:
    toy, strategy = make(), FedSALoRA()
    state = play(strategy, toy, 2, lambda number, clients: clients[:2]).states[-1]
    sent = strategy.send(state, 3, toy.clients[2:])
    own = strategy.personal(sent, toy.cohort(toy.clients[2:]))
    for k in range(3):
        assert close(tree.row(own, k), arrays(strategy.adapter(state)), 0.0)
    assert any(float((state.shared[n] - toy.initial[n]).norm()) > 1e-3 for n in state.shared)
