"""DP-ZO: one noised number a step; what an example may add to it, and what it costs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpeft.cohort.lanes import Lane, LoopLane
from fedpeft.config import Local, Privacy
from fedpeft.data.clients import ClientData, Clients
from fedpeft.plan import make_plan
from fedpeft.prepare import Prepared
from fedpeft.privacy.events import flatten
from fedpeft.privacy.guard import Guard
from tests.privacy.federated import (
    mechanism_of,
    play,
    prepared_of,
    recipe_of,
    replies_of,
    seeded,
)
from tests.tiny import tiny_population

C, LR = 0.05, 1e-3
WALK = {"name": "fedkseed", "candidates": 8, "reach": 5e-3}
STEP = Local(optimizer="sgd", lr=LR, batch_size=64, steps=1)
"""One step on all examples."""


def prepared(
    numbers: list[int], sigma: float = 1e-9, seed: int = 0, local: Local = STEP, clip: float = C
) -> Prepared:
    privacy = Privacy("record", noise_multiplier=sigma, clip_norm=clip)
    people = dataclasses.replace(
        tiny_population((8,)),
        clients=Clients.of([ClientData("c0", np.array(numbers), np.arange(8, 9))]),
    )
    recipe = recipe_of(WALK, privacy=privacy, local=local)
    return seeded(prepared_of(recipe, population=people), seed)


def slope_sums(own: Prepared, examples: int) -> torch.Tensor:
    """What a client adds up in each step, noise included."""
    [reply] = replies_of(own, ["c0"])
    expected = min(examples, own.recipe.local.batch_size)
    return reply.trees["walk"]["m"][0].double() / LR * expected


def test_adding_one_example_changes_the_sum_of_slopes_by_at_most_the_clip_norm() -> None:
    for clip in (C, 50.0):
        everything = slope_sums(prepared(list(range(8)), clip=clip), 8)
        changes = []
        for left in range(8):
            others = [n for n in range(8) if n != left]
            changes.append(float((everything - slope_sums(prepared(others, clip=clip), 7)).abs()))
        assert max(changes) <= clip * (1 + 1e-3)
        assert max(changes) > 0.9 * clip if clip == C else max(changes) > 2 * C


def test_without_a_bound_it_is_the_plain_walk() -> None:
    """DP1: the mean of the examples' slopes is the slope of their mean."""
    wide = slope_sums(prepared(list(range(8)), clip=1e4), 8) / 8
    plain = prepared_of(recipe_of(WALK, local=STEP), population=prepared([0, 1]).population)
    own = prepared(list(range(8))).population
    plain = dataclasses.replace(plain, population=own)
    [reply] = replies_of(plain, ["c0"])
    assert float(wide) == pytest.approx(float(reply.trees["walk"]["m"][0, 0]) / LR, rel=1e-3)


def test_the_noise_of_a_step_has_the_stated_variance() -> None:
    """DP3: (z C / (q n))^2, here of steps on no example at all but noise."""
    sigma, steps = 40.0, 1000
    local = dataclasses.replace(STEP, steps=steps, lr=LR, batch_size=2)
    own = prepared([0, 1], sigma, local=local)
    private = mechanism_of(own)
    noisy = private.steps([2])
    released = noisy.release(torch.zeros(steps, 1), np.zeros(steps, dtype=np.int64))
    assert float(released.double().std()) == pytest.approx(sigma * C / 2, rel=0.1)
    found = slope_sums(own, 2) / 2
    assert float(found.std()) == pytest.approx(sigma * C / 2, rel=0.1)


def test_an_empty_batch_takes_a_step_of_noise_alone() -> None:
    """Five examples at rate 1/5: a third of the batches are empty, and no step is skipped."""
    local = dataclasses.replace(STEP, steps=60, batch_size=1)
    own = prepared(list(range(5)), 2.0, local=local)
    assert bool((slope_sums(own, 5).abs() > 0).all())
    assert flatten(mechanism_of(own).event(5)) == {(1 / 5, 2.0): 60}


@pytest.mark.parametrize("lane", [None, LoopLane])
def test_a_round_is_charged_its_steps_and_the_loss_does_not_leave(
    lane: type[Lane] | None, tmp_path: Path
) -> None:
    recipe = recipe_of(
        WALK,
        privacy=Privacy("record", noise_multiplier=1.0, clip_norm=C),
        local=dataclasses.replace(STEP, steps=3, batch_size=2),
    )
    own = prepared_of(recipe)
    if lane is not None:
        own = dataclasses.replace(own, lane=lane(own.network.model))
    states, reports = play(own)
    assert all(report.replied == 4 and math.isnan(report.loss) for report in reports)
    assert bool(states[-1].sums.any()) and bool(states[-1].sums.isfinite().all())
    [reply, *_] = replies_of(own, ["c0", "c1"])
    assert reply.scalars.keys() == {"weight"}
    assert own.terms is not None
    guard = Guard(own.terms, tmp_path / "privacy.jsonl", recipe)
    sizes = own.federation().clients()
    names = guard.admit(1, sizes)
    for name in names:
        rate = min(1.0, 2 / sizes[name])
        assert flatten(guard.ledger.spent(name)) == {(rate, 1.0): 3}
    text = guard.statement().mechanism
    assert text.startswith("DP-ZO in each client") and "slopes along public directions" in text
    guard.close()


def test_the_plan_knows_that_a_release_is_one_number() -> None:
    local = dataclasses.replace(STEP, steps=3, batch_size=2)
    recipe = recipe_of(
        WALK, privacy=Privacy("record", noise_multiplier=1.0, clip_norm=C), local=local
    )
    assert make_plan(prepared_of(recipe)).privacy["noise-to-clip ratio"].startswith("0.5 in a step")


def test_an_example_that_is_not_finite_adds_zero() -> None:
    whole, without = prepared(list(range(8))), prepared([n for n in range(8) if n != 3])
    for own in (whole, without):
        examples = own.population.examples
        table = own.network.model.get_input_embeddings().weight  # type: ignore[operator]
        token = int(examples.tokens[examples.starts[4] - 1])
        for other in range(8):
            row = examples.tokens[examples.starts[other] : examples.starts[other + 1]]
            if other != 3:
                row[row == token] = 1 + token % 48
        with torch.no_grad():
            table[token] = math.nan
    assert float((slope_sums(whole, 8) - slope_sums(without, 7)).abs()) < 1e-4
