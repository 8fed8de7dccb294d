"""FedMomentum against the SVD of the dense mean in numpy: factors, what is folded, what is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedmomentum import FedMomentum
from tests.strategies.oracle import average, dense, ideal, off, shares
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


def fit(toy: Toy, client: str, w: Arrays, base: Arrays) -> Arrays:
    own = dict(w)
    for _ in range(toy.steps[client]):
        gradient = toy.gradient(client, own, base)
        own = {n: v - toy.lr * gradient[n] for n, v in own.items()}
    return own


def rule(toy: Toy, rounds: int, present: Present, energy: float) -> tuple[Arrays, Arrays]:
    """The adapter, and the base by layer."""
    w, base = arrays(toy.initial), {n: np.zeros(2) for n in ()}
    for t in range(1, rounds + 1):
        names = list(present(t, toy.clients))
        owns, p = [fit(toy, c, w, base) for c in names], shares(toy, names)
        w = average(owns, p)
        for layer, s in toy.scaling.items():
            a, b = a_of(layer), b_of(layer)
            u, values, vt = np.linalg.svd(
                sum(p[k] * s * own[b] @ own[a] for k, own in enumerate(owns)), full_matrices=False
            )
            r = len(w[a])
            share = np.cumsum(values**2) / (values**2).sum()
            last = len(values) if energy == 1 else int(np.argmax(share >= energy)) + 1
            sign = np.sign(np.take_along_axis(vt, abs(vt).argmax(1)[:, None], 1))[:r]
            root = np.sqrt(values[:r] / s)
            w[b], w[a] = u[:, :r] * sign.T * root, root[:, None] * vt[:r] * sign
            folded = (u[:, r:last] * values[r:last]) @ vt[r:last]
            base[layer] = base.get(layer, 0.0) + folded
    return w, base


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("energy", [0.9, 0.9999, 1.0])
def test_three_rounds_equal_the_rule_in_numpy(present: Present, energy: float) -> None:
    toy = make()
    strategy = FedMomentum(energy=energy)
    states = play(strategy, toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        w, base = rule(toy, rounds, present, energy)
        assert off(dense(toy, arrays(states[rounds].factors)), dense(toy, w)) <= 1e-10
        assert off(arrays(states[rounds].factors), w) <= 1e-8
        found = arrays(strategy.base(states[rounds]))
        assert all(
            off({"w": found.get(n, 0 * x)}, {"w": x}) <= 1e-8 for n, x in base.items() if x.any()
        )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.9999])
def test_what_is_lost_is_at_most_the_share_that_was_given_up(energy: float) -> None:
    toy, strategy = make(), FedMomentum(energy=energy)
    state = play(strategy, toy, 1).states[-1]
    for layer, whole in ideal(toy, toy.clients).items():
        if layer in LAYERS:
            now = dense(toy, arrays(state.factors))[layer]
            now = now + arrays(strategy.base(state)).get(layer, 0.0)
            lost = np.linalg.norm(now - whole) ** 2
            assert lost <= (1 - energy) * np.linalg.norm(whole) ** 2 + 1e-20


def test_all_of_it_is_exact() -> None:
    toy, strategy = make(), FedMomentum(energy=1.0)
    state = play(strategy, toy, 1).states[-1]
    now = dense(toy, arrays(state.factors))
    now = {n: v + arrays(strategy.base(state)).get(n, 0.0) for n, v in now.items()}
    assert off(now, ideal(toy, toy.clients)) <= 1e-12


def test_no_training_keeps_the_factors_and_folds_nothing() -> None:
    toy, strategy = make(), FedMomentum()
    toy.lr = 0.0
    state = play(strategy, toy, 2).states[-1]
    assert not strategy.base(state)
    assert all(torch.allclose(state.factors[n], x) for n, x in toy.initial.items())


@pytest.mark.parametrize("energy", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_outside_its_range_is_refused(energy: float) -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.energy"):
        FedMomentum(energy=energy)
