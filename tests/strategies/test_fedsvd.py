"""FedSVD against its rule in numpy on dense matrices, and its equivalence to FFA-LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedsvd import FedSVD
from fedpeft.strategies.ffa_lora import FfaLora
from tests.strategies.oracle import average, dense, ideal, off, sgd, shares
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


def oracle(toy: Toy, rounds: int, present: Present, period: int) -> Arrays:
    """B and head by SGD, their mean, then the SVD of the dense B A."""
    w = arrays(toy.initial)
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        trained = [n for n in w if "lora_A" not in n]
        w = average([sgd(toy, c, w, trained) for c in names], shares(toy, names))
        for layer in LAYERS if period and t % period == 0 else ():
            r = len(w[a_of(layer)])
            u, s, vt = np.linalg.svd(w[b_of(layer)] @ w[a_of(layer)])
            w[a_of(layer)], w[b_of(layer)] = vt[:r], u[:, :r] * s[:r]
    return w


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("period", [0, 1, 2])
def test_four_rounds_equal_the_rule_in_numpy(present: Present, period: int) -> None:
    """Up to signs of singular vectors, which no update shows."""
    toy = make()
    states = play(FedSVD(period), toy, 4, present, size=2).states
    for rounds in (1, 2, 3, 4):
        found = arrays(states[rounds].adapter)
        wanted = oracle(make(), rounds, present, period)
        assert off(dense(toy, found), dense(toy, wanted)) <= 1e-12
        for name in found:
            assert np.allclose(abs(found[name]), abs(wanted[name]), atol=1e-11)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_every_round_is_exact(rounds: int) -> None:
    toy = make()
    played = play(FedSVD(), toy, rounds, some)
    found = dense(toy, arrays(played.states[-1].adapter))
    assert off(found, ideal(toy, played.sent[-1].clients)) <= 1e-14


def test_a_has_orthonormal_rows_and_b_orthogonal_columns_in_order() -> None:
    """SV2, and SV1: the update is what it was."""
    toy = make()
    turned, plain = (play(FedSVD(period), toy, 1).states[-1].adapter for period in (1, 0))
    for layer in LAYERS:
        a, b = turned[a_of(layer)], turned[b_of(layer)]
        assert float((a @ a.T - torch.eye(len(a), dtype=a.dtype)).abs().max()) <= 1e-14
        gram = b.T @ b
        assert float((gram - gram.diagonal().diag()).abs().max()) <= 1e-14
        assert bool((gram.diagonal().diff() <= 0).all())
        assert float((toy.update(turned, layer) - toy.update(plain, layer)).norm()) <= 1e-14


def test_under_sgd_it_is_ffa_lora_with_an_orthonormal_start() -> None:
    """SV3: from the same orthonormal A the updates are the same, round after round."""
    toy, other = make(), make()
    ffa = FfaLora("orthonormal")
    toy.initial = ffa.adapter(ffa.init(other.problem()))
    one, two = play(FedSVD(), toy, 5, some), play(ffa, other, 5, some)
    for left, right in zip(one.states, two.states, strict=True):
        for layer in LAYERS:
            apart = toy.update(left.adapter, layer) - other.update(ffa.adapter(right), layer)
            assert float(apart.norm()) <= 1e-13
    assert float(other.update(ffa.adapter(two.states[-1]), layer).norm()) > 0.1


def test_a_stays_in_the_row_space_of_its_start() -> None:
    toy = make()
    adapter = play(FedSVD(), toy, 5).states[-1].adapter
    for layer in LAYERS:
        a, first = adapter[a_of(layer)], toy.initial[a_of(layer)]
        assert float((a - a @ torch.linalg.pinv(first) @ first).norm()) <= 1e-12


def test_b_of_zero_is_left_alone() -> None:
    """SV5: nobody has moved yet; no NaN, and A as it was."""
    toy = make()
    toy.lr = 0.0
    state = play(FedSVD(), toy, 2).states[-1]
    assert all(torch.equal(state.adapter[n], x) for n, x in toy.initial.items() if "lora" in n)


def test_b_that_uses_some_ranks_only_leaves_an_orthonormal_basis_all_the_same() -> None:
    toy = make()
    state = play(FedSVD(), toy, 1).states[-1]
    layer = next(iter(LAYERS))
    toy.lr = 0.0
    state.adapter[b_of(layer)][:, 1:] = 0.0
    sent = FedSVD().send(state, 2, toy.clients)
    after = FedSVD().receive(state, iter([FedSVD().train(sent, toy.cohort(toy.clients))]))
    a = after.adapter[a_of(layer)]
    assert float((a @ a.T - torch.eye(len(a), dtype=a.dtype)).abs().max()) <= 1e-14
    assert (
        float((toy.update(after.adapter, layer) - toy.update(state.adapter, layer)).norm()) < 1e-14
    )


def test_b_and_the_head_go_up_and_a_comes_down_with_them() -> None:
    played = play(FedSVD(), make(), 2)
    for sent, reply in zip(played.sent, played.replies, strict=True):
        assert reply.trees.keys() == {"adapter"}
        assert not [n for n in reply.trees["adapter"] if "lora_A" in n]
        assert all("lora_A" in n for n in sent.trees["basis"])


def test_a_negative_period_is_refused_by_name() -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.period=-1"):
        FedSVD(-1)
