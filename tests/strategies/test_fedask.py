"""FedASK against the SVD of the mean in numpy: what its sketches lose, and where nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.comms.ledger import message_bytes
from fedpeft.strategies.fedask import FedASK
from tests.strategies.oracle import average, dense, ideal, off, rounds_of, sgd, shares
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


def halves(w: Arrays, layer: str, mean: np.ndarray) -> Arrays:
    """B = U S^1/2 / s^1/2, A = S^1/2 V^T / s^1/2 of the leading r; v's largest entry is > 0."""
    r, s = len(w[a_of(layer)]), make().scaling[layer]
    u, values, vt = np.linalg.svd(mean)
    sign = np.sign(np.take_along_axis(vt, abs(vt).argmax(1)[:, None], 1))[:r]
    root = np.sqrt(values[:r] / s)
    return {b_of(layer): u[:, :r] * sign.T * root, a_of(layer): root[:, None] * vt[:r] * sign}


def merge(w: Arrays, owns: list[Arrays], p: np.ndarray) -> Arrays:
    """With so much oversampling that a sketch loses nothing: the factors of the mean's own SVD."""
    new, scaling = average(owns, p), make().scaling
    for layer in LAYERS:
        a, b = a_of(layer), b_of(layer)
        mean = sum(p[k] * scaling[layer] * own[b] @ own[a] for k, own in enumerate(owns))
        new |= halves(w, layer, mean)
    return new


@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(present: Present) -> None:
    """AK2: the sketches are wide enough, so only the tail of the spectrum is lost."""
    toy = make()
    states = play(FedASK(oversampling=4), toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        found, wanted = arrays(states[rounds].adapter), rounds_of(toy, rounds, present, merge)
        assert off(found, wanted) <= 1e-9
        assert off(dense(toy, found), dense(toy, wanted)) <= 1e-11


def test_with_a_common_a_nothing_is_lost_and_its_rows_span_what_they_did() -> None:
    """AK1, over three rounds, with two columns more than the rank."""
    toy, w = make(), arrays(make().initial)
    states = play(FedASK(train_a=False), toy, 3, some).states
    for number in (1, 2, 3):
        names = list(some(number, toy.clients))
        trained = [n for n in w if ".lora_A." not in n]
        owns = [sgd(toy, c, w, trained) for c in names]
        mean = average([dense(toy, own) for own in owns], shares(toy, names))
        found = arrays(states[number].adapter)
        assert off(dense(toy, found), mean) <= 1e-11
        w = average(owns, shares(toy, names))
        for layer in LAYERS:
            w |= halves(w, layer, mean[layer])
            old, new = toy.initial[a_of(layer)].numpy(), found[a_of(layer)]
            inside = new @ np.linalg.pinv(old) @ old
            assert abs(inside - new).max() <= 1e-11


def test_a_narrow_sketch_loses_more_than_the_tail() -> None:
    """Negative control for AK2: without oversampling the mean of many ranks is not captured."""
    toy = make()
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    for client in toy.clients:
        toy.steps[client] = 40
    errors = {}
    for extra in (0, 4):
        adapter = arrays(play(FedASK(oversampling=extra), toy, 1).states[-1].adapter)
        errors[extra] = np.linalg.norm(dense(toy, adapter)[layer] - ideal(toy, toy.clients)[layer])
    whole = ideal(toy, toy.clients)[layer]
    tail = np.sqrt((np.linalg.svd(whole, compute_uv=False)[2:] ** 2).sum())
    assert errors[4] == pytest.approx(tail, rel=1e-9)
    assert errors[0] > 1.001 * tail


def test_two_exchanges_send_sketches_and_leave_no_factors_behind() -> None:
    toy = make(dtype=torch.float32)
    played = play(FedASK(), toy, 1)
    assert [sorted(sent.trees) for sent in played.sent] == [["adapter"], ["basis", "like"]]
    assert [sorted(reply.trees) for reply in played.replies] == [["sketch"], ["core"]]
    wide, (d_out, r, d_in, _) = next(iter(LAYERS.items()))
    assert played.replies[0].trees["sketch"][f"{wide}.lora_Y"].shape == (5, d_out, r + 2)
    assert played.replies[1].trees["core"][f"{wide}.lora_Z"].shape == (5, d_in, min(d_out, r + 2))
    assert not any(".lora_A." in n or ".lora_B." in n for n in played.replies[0].trees["sketch"])
    assert toy.memory == {client: {"own": {}} for client in toy.clients}
    assert sum(message_bytes(played.sent[0][0]).values()) > 0


def test_all_clients_draw_the_same_matrix_and_every_round_another() -> None:
    """AK3: replies of clients with equal factors are equal; the seed changes."""
    toy = make()
    for client in toy.clients:
        toy.targets[client], toy.steps[client] = toy.targets[toy.clients[0]], 2
    played = play(FedASK(), toy, 2)
    for name, value in played.replies[0].trees["sketch"].items():
        assert torch.equal(value, value[:1].expand_as(value)), name
    assert played.sent[0].blobs != played.sent[2].blobs
    layer = next(iter(LAYERS))
    omegas = [
        FedASK()._omega(n, toy.initial[a_of(n)][None], 3)
        for n in (
            layer,
            "base_model.model.bert.layer.1.query",
            "base_model.model.bert.layer.1.value",
        )
    ]
    assert omegas[1].shape == omegas[2].shape and not torch.equal(omegas[1], omegas[2])


def test_a_layer_that_did_not_move_keeps_its_factors() -> None:
    toy = make()
    toy.lr = 0.0
    adapter = play(FedASK(), toy, 2).states[-1].adapter
    assert all(torch.equal(adapter[a_of(n)], toy.initial[a_of(n)]) for n in LAYERS)
