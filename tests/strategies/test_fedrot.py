"""FedRot-LoRA against its rule in numpy, and what rotating is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.errors import FedpeftError
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedrot import FedRot, nearest_rotation, rotation
from fedpeft.tree import Tree
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


def nearest(x: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(x)
    signs = np.ones(len(x))
    signs[-1] = np.linalg.det(u @ vt)
    return u @ np.diag(signs) @ vt


def oracle(toy: Toy, rounds: int, present: Present, soft: float) -> Arrays:
    """Round t + 1 of the paper's t: nothing at t = 0, by A at odd t, by B at even t."""
    w = arrays(toy.initial)
    for number in range(1, rounds + 1):
        names, t = list(present(number, toy.clients)), number - 1
        ends = [sgd(toy, c, w) for c in names]
        for own in ends if t else []:
            for layer in LAYERS:
                a, b = a_of(layer), b_of(layer)
                m = w[a] @ own[a].T if t % 2 else w[b].T @ own[b]
                turn = nearest((1 - soft) * np.eye(len(m)) + soft * nearest(m.T))
                own[a], own[b] = turn.T @ own[a], own[b] @ turn
        w = average(ends, shares(toy, names))
    return w


@pytest.mark.parametrize("present", [everyone, some])
@pytest.mark.parametrize("soft", [0.0, 0.5, 1.0])
def test_four_rounds_equal_the_rule_in_numpy(present: Present, soft: float) -> None:
    toy = make()
    states = play(FedRot(soft), toy, 4, present, size=2).states
    for rounds in (1, 2, 3, 4):
        assert close(states[rounds].adapter, oracle(toy, rounds, present, soft), 1e-11)


def test_rotating_changes_no_clients_update() -> None:
    """RT1."""
    toy = make()
    played = play(FedRot(1.0), toy)
    own = played.replies[-1].trees["adapter"]
    for k, client in enumerate(toy.clients):
        for layer in LAYERS:
            sent = toy.update({n: x[k] for n, x in own.items()}, layer)
            trained = toy.update(toy.trained[client], layer)
            assert float((sent - trained).norm()) <= 1e-14
            assert not torch.equal(own[a_of(layer)][k], toy.trained[client][a_of(layer)])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("r", [1, 2, 3, 8])
@pytest.mark.parametrize("soft", [0.1, 0.5, 1.0])
def test_the_turn_is_a_rotation(r: int, soft: float) -> None:
    """RT2, reflections included: every other agreement asks for one."""
    turn = rotation(random(20, r, r), soft)
    assert float((turn.mT @ turn - torch.eye(r, dtype=torch.float64)).abs().max()) <= 1e-13
    assert float((torch.linalg.det(turn) - 1).abs().max()) <= 1e-12


def test_the_turn_is_the_best_of_all_rotations() -> None:
    """tr(M R) of R* is no less than that of any other; R undone is found again."""
    m = random(1, 4, 4)
    best = rotation(m, 1.0)
    others = nearest_rotation(random(500, 4, 4, seed=1))
    traces = torch.einsum("ij,kji->k", m[0], others)
    assert float(torch.einsum("ij,ji->", m[0], best[0])) >= float(traces.max())
    a = random(4, 9)
    turned = others[0] @ a
    assert float((rotation((a @ turned.mT)[None], 1.0)[0] - others[0]).abs().max()) <= 1e-12


def test_alignment_never_increases_the_distance() -> None:
    """RT3."""
    toy = make()
    played = play(FedRot(1.0), toy, 2)
    then = played.states[1].adapter
    for k, client in enumerate(toy.clients):
        for layer in LAYERS:
            a = a_of(layer)
            before = toy.trained[client][a] - then[a]
            after = played.replies[1].trees["adapter"][a][k] - then[a]
            assert float(after.norm()) <= float(before.norm()) + 1e-14


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_nothing_to_align_with_turns_nothing(bad: float) -> None:
    """A layer whose B is still zero; a client whose numbers are not finite."""
    m = torch.stack([torch.full((3, 3), bad, dtype=torch.float64), random(3, 3)])
    turn = rotation(m, 0.5)
    assert torch.equal(turn[0], torch.eye(3, dtype=torch.float64))
    assert torch.equal(turn[1:], rotation(m[1:], 0.5))


def test_without_turning_it_is_fedavg() -> None:
    """RT4."""
    one, two = (play(s, make(), present=some).states[-1] for s in (FedRot(0.0), FedAvg()))
    assert all(torch.equal(one.adapter[n], x) for n, x in two.adapter.items())


def error_of(strategy: FedRot, spin: bool) -> float:
    """||E|| / ||dW*|| of round 2 where clients come back in bases of their own, if ``spin``."""
    toy = make()
    played = play(strategy, toy, 1)
    state = played.states[-1]
    sent = strategy.send(state, 2, toy.clients)
    then = state.adapter

    class Spun:
        def __getattr__(self, name: str) -> object:
            return getattr(cohort, name)

        def fit(self, start: Tree, **rest: object) -> object:
            fit = cohort.fit(start)
            for k in range(len(toy.clients)):
                for number, layer in enumerate(LAYERS):
                    r = len(then[a_of(layer)])
                    q = nearest_rotation(random(1, r, r, seed=10 * k + number))[0]
                    if spin:
                        fit.adapter[a_of(layer)][k] = q @ fit.adapter[a_of(layer)][k]
                        fit.adapter[b_of(layer)][k] = fit.adapter[b_of(layer)][k] @ q.T
            return fit

    cohort = toy.cohort(toy.clients)
    reply = strategy.train(sent, Spun())  # type: ignore[arg-type]
    after = strategy.receive(state, iter([reply]))
    return off(dense(toy, arrays(after.adapter)), ideal(toy, toy.clients))


def test_it_undoes_rotations_that_ruin_plain_averaging() -> None:
    plain, spun, turned = (
        error_of(FedRot(soft), spin) for soft, spin in ((0.0, False), (0.0, True), (1.0, True))
    )
    assert spun > 2 * plain, "negative control"
    assert turned < spun / 2


@pytest.mark.parametrize("soft", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused_by_name(soft: float) -> None:
    with pytest.raises(FedpeftError, match=r"strategy\.soft="):
        FedRot(soft)
