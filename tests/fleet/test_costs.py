"""What clients compute in a round: by the recipe's steps, and by what their strategy says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedpeft.config import Local, Output, Rounds
from fedpeft.costs import Costs, examples_seen, optimizer_steps
from fedpeft.fleet.flops import flops_of
from fedpeft.fleet.settings import Fleet
from fedpeft.fleet.simulator import build
from fedpeft.prepare import prepare
from fedpeft.strategy import Effort
from tests.tiny import tiny_recipe, write_tiny

SIZES = np.array([5, 16, 40])


@pytest.mark.parametrize(
    ("local", "steps"),
    [
        (Local(steps=7, batch_size=16, accumulate=2), [7, 7, 7]),
        (Local(epochs=3, batch_size=16), [3, 3, 9]),
        (Local(epochs=3, batch_size=8, accumulate=2), [3, 3, 9]),
    ],
)
def test_optimizer_steps(local: Local, steps: list[float]) -> None:
    assert optimizer_steps(SIZES, local).tolist() == steps
    seen, batches = examples_seen(SIZES, local)
    assert (batches >= optimizer_steps(SIZES, local)).all() and (seen > 0).all()


def test_what_a_strategy_does_beside_training_is_counted(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    recipe = dataclasses.replace(
        tiny_recipe(tmp_path, name="fedavg"),
        rounds=Rounds(count=1),
        local=Local(steps=3, batch_size=4),
        fleet=Fleet("rpi4"),
        output=Output(folder=str(tmp_path / "run")),
    )
    prepared = prepare(recipe)
    roster = prepared.population.clients.roster
    costs = Costs(prepared, build(recipe.fleet, recipe.seed, roster.numbers, None))
    who = np.arange(len(roster))
    plain = costs.of(who, {}).flops
    stepped = costs.of(who, {0: Effort(step=1e6)}).flops
    assert (stepped - plain).tolist() == [3e6, 0, 0, 0]
    probed = costs.of(who, {0: Effort(forward=2), 1: Effort(forward=10**6, pruned=0.5)}).flops
    model = flops_of(prepared.network.model)
    lengths = [
        prepared.population.examples.lengths_of(prepared.population.clients[k].train)
        for k in (0, 1)
    ]
    mean, squares = float(lengths[0].mean()), float((lengths[0].astype(float) ** 2).mean())
    two = model.forward(2).of(np.array([2.0]), np.array([2 * mean]), np.array([2 * squares]))
    assert probed[0] - plain[0] == pytest.approx(float(two[0]))
    halved = costs.of(who, {1: Effort(pruned=0.5)}).flops[1]
    own = float(lengths[1].sum()), float((lengths[1].astype(float) ** 2).sum())
    every = model.forward(2).of(np.array([1.0]), np.array([own[0]]), np.array([own[1]]), 0.5)
    assert probed[1] - halved == pytest.approx(float(every[0]))  # no more than it has
    assert probed[2:].tolist() == plain[2:].tolist()
