"""Local-only training against its rule in numpy: nobody hears anything of anybody."""

from __future__ import annotations

import itertools

import pytest

from fedpeft import tree
from fedpeft.strategies.local import Local
from tests.strategies.toy import Arrays, Present, Toy, arrays, everyone, make, play, some


def oracle(toy: Toy, rounds: int, present: Present) -> dict[str, Arrays]:
    """Every client's own SGD, as many rounds as it was there."""
    own = {client: arrays(toy.initial) for client in toy.clients}
    for t in range(1, rounds + 1):
        for client in present(t, toy.clients):
            for _ in range(toy.steps[client]):
                gradient = toy.gradient(client, own[client])
                own[client] = {n: v - toy.lr * gradient[n] for n, v in own[client].items()}
    return own


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("lora", [True, False])
def test_three_rounds_equal_the_rule_in_numpy(present: Present, lora: bool) -> None:
    for rounds in (1, 2, 3):
        toy = make(lora=lora)
        played = play(Local(), toy, rounds, present, size=2)
        sent = Local().send(played.states[-1], rounds + 1, toy.clients)
        own = Local().personal(sent, toy.cohort(toy.clients))
        for k, client in enumerate(toy.clients):
            for name, value in oracle(toy, rounds, present)[client].items():
                assert abs(tree.row(own, k)[name].numpy() - value).max() <= 1e-12


def test_no_tensor_travels_and_the_server_never_changes() -> None:
    toy = make()
    played = play(Local(), toy, present=some)
    for messages in played.sent + played.replies:
        assert not messages.trees and not messages.blobs
    assert not any(sent.scalars for sent in played.sent)
    assert all(state is played.states[0] for state in played.states)
    assert played.states[0].adapter is toy.initial


def test_a_client_that_never_trained_has_the_initial_adapter() -> None:
    toy = make()
    played = play(Local(), toy, 1, some)
    sent = Local().send(played.states[-1], 2, toy.clients)
    own = Local().personal(sent, toy.cohort(toy.clients))
    trained = set(some(1, toy.clients))
    for k, client in enumerate(toy.clients):
        moved = tree.norm(tree.sub(tree.row(own, k), toy.initial))
        assert (moved > 0) == (client in trained)


def test_training_losses_are_the_clients_own_and_fall() -> None:
    toy = make()
    replies = play(Local(), toy, 4).replies
    losses = [reply.scalars["loss"] for reply in replies]
    for before, after in itertools.pairwise(losses):
        assert bool((after < before).all())
