"""FLASC (Kuo et al., arXiv 2406.05233) is a recipe: the seam's rounds against its rule in numpy.

FedAdam on the server, ``comms.down`` the largest weights, ``comms.up`` the largest changes without
feedback. The seam takes the largest of each kind of tensor (adapter, head), the paper of them all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedpeft import tree
from fedpeft.codecs.settings import Codec
from fedpeft.config import Comms, Local, Recipe, Rounds
from fedpeft.model import kind_of
from fedpeft.prepare import Prepared
from fedpeft.strategies.fedadam import FedAdam
from fedpeft.strategy import Messages
from tests.privacy.federated import play, prepared_of, recipe_of
from tests.strategies.oracle import average, close
from tests.strategies.toy import Arrays, arrays

ADAM = FedAdam(lr=0.02, beta1=0.9, beta2=0.99, tau=1e-3)
ROUNDS = 3


def flasc(down: float, up: float) -> Recipe:
    return recipe_of(
        {"name": "fedadam", "lr": ADAM.lr},
        rounds=Rounds(count=ROUNDS, weighting="equal"),
        local=Local(optimizer="sgd", lr=0.1, momentum=0.9, batch_size=4),
        comms=Comms(
            down=Codec(codec="topk", form="weights", density=down),
            up=Codec(codec="topk", feedback="never", density=up),
        ),
    )


def largest(x: Arrays, density: float) -> Arrays:
    """x where it is largest by magnitude, within each kind of tensor; zero elsewhere."""
    kept = {}
    for kind in sorted({kind_of(n) for n in x}):
        own = [n for n in sorted(x) if kind_of(n) == kind]
        sizes = np.sort(np.concatenate([abs(x[n]).ravel() for n in own]))[::-1]
        least = sizes[math.ceil(density * len(sizes)) - 1]
        kept |= {n: np.where(abs(x[n]) >= least, x[n], np.float32(0)) for n in own}
    return kept


def oracle(
    prepared: Prepared, down: float, up: float, train: Callable[[int, Arrays], list[Arrays]]
) -> list[Arrays]:
    """theta after each round; train gives what clients train, densely, from where they start."""
    theta = {n: v.astype(np.float64) for n, v in arrays(prepared.network.initial).items()}
    m = {n: np.zeros(v.shape) for n, v in theta.items()}
    v = {n: np.full(x.shape, ADAM.tau**2) for n, x in theta.items()}
    found = []
    for number in range(1, ROUNDS + 1):
        start = largest({n: x.astype(np.float32) for n, x in theta.items()}, down)
        own = train(number, start)
        kept = [largest({n: x[n] - start[n] for n in start}, up) for x in own]
        mean = average(kept, np.full(len(kept), 1 / len(kept)))
        m = {n: ADAM.beta1 * m[n] + (1 - ADAM.beta1) * mean[n] for n in m}
        v = {n: ADAM.beta2 * v[n] + (1 - ADAM.beta2) * mean[n] ** 2 for n in v}
        theta = {n: theta[n] + ADAM.lr * m[n] / (np.sqrt(v[n]) + ADAM.tau) for n in theta}
        found.append(theta)
    return found


def trained_by(recipe: Recipe) -> Callable[[int, Arrays], list[Arrays]]:
    """Local training of all clients on the model, without the seam."""
    plain = prepared_of(dataclasses.replace(recipe, comms=Comms()))
    federation = plain.federation()

    def train(number: int, start: Arrays) -> list[Arrays]:
        whole = {n: torch.from_numpy(x) for n, x in start.items()}
        sent = Messages.broadcast(tuple(federation.clients()), {"adapter": whole})
        replies = [r for r in federation.run(number, sent) if isinstance(r, Messages)]
        return [arrays(tree.row(r.trees["adapter"], k)) for r in replies for k in range(len(r))]

    return train


@pytest.mark.parametrize(("down", "up"), [(0.25, 0.25), (0.5, 0.1), (1.0, 0.25)])
def test_the_seam_plays_flascs_rounds(down: float, up: float) -> None:
    recipe = flasc(down, up)
    states, _ = play(prepared_of(recipe), ROUNDS)
    wanted = oracle(prepared_of(recipe), down, up, trained_by(recipe))
    for state, theta in zip(states[1:], wanted, strict=True):
        assert close(state.adapter, theta, 1e-6)


def test_both_ways_hold_so_many_numbers_and_clients_train_all() -> None:
    """A client moves weights that it was sent as zero; masks need not agree."""
    prepared = prepared_of(flasc(0.25, 0.1))
    strategy = prepared.strategy
    federation = prepared.federation()
    names = tuple(federation.clients())
    assert prepared.downlink is not None
    sent = prepared.downlink.announce(strategy.send(strategy.init(prepared.problem), 1, names))
    replies = [r for r in federation.run(1, sent) if isinstance(r, Messages)]
    assert sum(map(len, replies)) == len(names)
    masks = set()
    for reply in replies:
        for k in range(len(reply)):
            start, own = tree.row(sent.trees["adapter"], 0), tree.row(reply.trees["adapter"], k)
            for kind in {kind_of(n) for n in own}:
                names_ = [n for n in sorted(own) if kind_of(n) == kind]
                before = torch.cat([start[n].flatten() for n in names_])
                moved = torch.cat([(own[n] - start[n]).flatten() for n in names_])
                assert int((before != 0).sum()) == math.ceil(0.25 * len(before))
                assert int((moved != 0).sum()) == math.ceil(0.1 * len(moved))
                assert bool(((moved != 0) & (before == 0)).any())
                masks.add(tuple((moved != 0).tolist()))
    assert len(masks) > 2


def test_with_densities_of_one_it_is_fedadam() -> None:
    whole, plain = flasc(1.0, 1.0), dataclasses.replace(flasc(1.0, 1.0), comms=Comms())
    found, wanted = (play(prepared_of(recipe), ROUNDS)[0] for recipe in (whole, plain))
    for one, other in zip(found, wanted, strict=True):
        assert close(one.adapter, arrays(other.adapter), 1e-6)
