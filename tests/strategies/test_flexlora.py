"""FlexLoRA against the SVD of the dense mean in numpy; its error is the tail of the spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.strategies.flexlora import FlexLoRA
from tests.strategies.oracle import average, dense, ideal, off, rounds_of
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


def merge(w: Arrays, owns: list[Arrays], p: np.ndarray) -> Arrays:
    """The largest entry of every right singular vector made positive."""
    new, scaling = average(owns, p), make().scaling
    for layer in LAYERS:
        a, b, s = a_of(layer), b_of(layer), scaling[layer]
        u, values, vt = np.linalg.svd(sum(p[k] * s * o[b] @ o[a] for k, o in enumerate(owns)))
        r = len(new[a])
        sign = np.sign(np.take_along_axis(vt, abs(vt).argmax(1)[:, None], 1))[:r]
        new[a], new[b] = vt[:r] * sign, u[:, :r] * values[:r] * sign.T / s
    return new


@pytest.mark.parametrize("present", [everyone, some])
def test_three_rounds_equal_the_rule_in_numpy(present: Present) -> None:
    toy = make()
    states = play(FlexLoRA(), toy, 3, present, size=2).states
    for rounds in (1, 2, 3):
        found, wanted = arrays(states[rounds].adapter), rounds_of(toy, rounds, present, merge)
        assert off(found, wanted) <= 1e-11
        assert off(dense(toy, found), dense(toy, wanted)) <= 1e-12


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_error_is_the_tail_of_the_spectrum(rounds: int) -> None:
    """FX1."""
    toy = make()
    adapter = arrays(play(FlexLoRA(), toy, rounds).states[-1].adapter)
    for layer, (_, r, _, _) in LAYERS.items():
        whole = ideal(toy, toy.clients)[layer]
        tail = np.sqrt((np.linalg.svd(whole, compute_uv=False)[r:] ** 2).sum())
        error = np.linalg.norm(dense(toy, adapter)[layer] - whole)
        assert error == pytest.approx(tail, abs=1e-13) and error > 1e-5


def test_a_mean_that_fits_the_rank_is_kept_exactly() -> None:
    """FX2: two clients of rank 1 in a layer of rank 2."""
    toy = make(2)
    wide = next(iter(LAYERS))
    for client in toy.clients:
        toy.targets[client][wide] = torch.outer(
            toy.targets[client][wide][:, 0], toy.targets[client][wide][0]
        )
    toy.initial[a_of(wide)][1:] = 0.0
    played = play(FlexLoRA(), toy, 1)
    found = dense(toy, arrays(played.states[-1].adapter))[wide]
    assert off({"w": found}, {"w": ideal(toy, toy.clients)[wide]}) <= 1e-14


def test_rows_of_a_are_orthonormal_and_all_singular_values_are_on_b() -> None:
    """FX3; leading columns are what a smaller rank would be given."""
    toy = make()
    adapter = play(FlexLoRA(), toy).states[-1].adapter
    for layer in LAYERS:
        a, b = adapter[a_of(layer)], adapter[b_of(layer)]
        assert float((a @ a.T - torch.eye(len(a), dtype=a.dtype)).abs().max()) <= 1e-13
        norms = b.norm(dim=0)
        assert bool((norms.diff() <= 0).all())
        whole = ideal(toy, toy.clients)[layer]
        best = np.linalg.svd(whole, compute_uv=False)
        error = np.linalg.norm(toy.scaling[layer] * (b[:, :1] @ a[:1]).numpy() - whole)
        assert error == pytest.approx(np.sqrt((best[1:] ** 2).sum()), abs=1e-12)


def test_the_clients_choice_of_factors_does_not_matter() -> None:
    """FX4: (B M, M^-1 A) in place of (B, A), another M for every client and layer."""
    toy, strategy = make(), FlexLoRA()
    reply = play(strategy, toy, 1).replies[0]
    state = strategy.init(toy.problem())
    own = {n: x.clone() for n, x in reply.trees["adapter"].items()}
    draw = torch.Generator().manual_seed(5)
    for layer in LAYERS:
        b, a = own[b_of(layer)], own[a_of(layer)]
        m = torch.randn(len(a), a.shape[1], a.shape[1], generator=draw, dtype=a.dtype)
        own[b_of(layer)], own[a_of(layer)] = b @ m, torch.linalg.inv(m) @ a
    other = reply.reply({"adapter": own}, **reply.scalars)
    one, two = (arrays(strategy.receive(state, iter([x])).adapter) for x in (reply, other))
    assert off(one, two) <= 1e-12


def test_updates_of_zero_stay_zero_and_finite() -> None:
    toy = make()
    toy.lr = 0.0
    adapter = play(FlexLoRA(), toy, 2).states[-1].adapter
    for layer in LAYERS:
        assert not bool(adapter[b_of(layer)].any())
        assert bool(torch.isfinite(adapter[a_of(layer)]).all())
        assert float(adapter[a_of(layer)].norm()) > 1, "A = 0 could not be trained"
