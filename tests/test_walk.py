"""Walks in both ways, batched and in place, against a plain loop through the model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft import directions, walk
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import FoldLane, Lane, LoopLane
from fedpeft.config import Local
from fedpeft.data.clients import Task
from fedpeft.directions import displaced
from fedpeft.errors import FedpeftError
from fedpeft.local import Trainer
from fedpeft.model import Network
from fedpeft.strategy import Route, Walk
from fedpeft.tree import Layout, Tree, row
from fedpeft.walk import Walker, check_walk
from tests.cohort import small

LOCAL = Local(optimizer="sgd", lr=4e-3, batch_size=4, steps=3)
SEEDS = torch.tensor([[3, 9, 4], [2**61, 9, 9], [0, 1, 2]])
PLANS = [
    np.array([[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, 9]]),
    np.array([[9, 8, -1, -1], [7, 6, 5, 4], [3, -1, -1, -1]]),
    np.array([[2, 4, 6, 8], [1, 3, 5, 7], [0, 9, -1, -1]]),
]
REACH = 5e-3
"""Wide enough that float32 losses give slopes to 1e-5."""

WAYS = pytest.mark.parametrize(
    ("lane", "width"), [(FoldLane, 2), (FoldLane, 3), (LoopLane, 1)], ids=["two", "three", "place"]
)
TASKS = pytest.mark.parametrize("task", ["classification", "causal_lm"])


def walked(
    net: Network,
    start: Tree,
    lane: type[Lane] = FoldLane,
    width: int = 3,
    local: Local = LOCAL,
    **route: Any,
) -> Walk:
    task: Task = net.task
    gradients = Gradients(lane(net.model), task, small.examples(task), local, net.device)
    own = Route(**{"seeds": SEEDS, "reach": REACH, **route})
    return Walker(Trainer(gradients, width), own).walk(start, PLANS)


def mean_loss(net: Network, at: Tree, numbers: np.ndarray) -> float:
    """Of a step: by example, or by predicted token."""
    data, losses = small.examples(net.task), []
    net.write(at)
    items = [int(n) for n in numbers if n >= 0]
    with torch.no_grad():
        for n in items:
            count = 1 if net.task == "classification" else int(data.lengths[n]) - 1
            if count:
                losses.append((float(small.loss(net, data, n).double()) * count, count))
    total = sum(loss for loss, _ in losses)
    return total / max(1, sum(count for _, count in losses))


def plain(net: Network, start: Tree, factors: np.ndarray) -> tuple[list[Tree], np.ndarray]:
    """Every client's model and moves, one example after another."""
    adapters, moves = [], np.zeros(SEEDS.shape)
    for k in range(len(SEEDS)):
        w = row(start, k)
        for t in range(SEEDS.shape[1]):
            seed, ends = SEEDS[k, t : t + 1], []
            for side in (REACH, -REACH):
                there = displaced(w, seed, torch.tensor([side]))
                ends.append(mean_loss(net, there, PLANS[k][t]))
            slope = (ends[0] - ends[1]) / (2 * REACH)
            moves[k, t] = LOCAL.lr * factors[k, t] * slope
            w = displaced(w, seed, -torch.tensor([moves[k, t]]).float())
        adapters.append(w)
    return adapters, moves


@WAYS
@TASKS
def test_a_walk_is_that_of_the_plain_loop(task: Task, lane: type[Lane], width: int) -> None:
    net = small.network(task)
    start, factors = small.stacked(net), np.array([[1.0, 0.5, 2.0], [1, 1, 1], [0, 3, 1]])
    adapters, moves = plain(net, start, factors)
    found = walked(net, start, lane, width, factors=torch.from_numpy(factors))
    assert np.abs(moves).max() > 1e-3
    assert np.abs(found.moves.numpy() - moves).max() <= 1e-5 * max(1.0, np.abs(moves).max())
    for k, own in enumerate(adapters):
        for name, value in own.items():
            assert float((found.adapter[name][k] - value).abs().max()) <= 1e-5, (k, name)


@WAYS
def test_the_adapter_is_the_start_less_the_moves_along_the_directions(
    lane: type[Lane], width: int
) -> None:
    """KS1 for one client: what is sent gives back what was trained."""
    net = small.network("classification")
    start = small.stacked(net)
    found = walked(net, start, lane, width)
    for k in range(3):
        again = displaced(row(start, k), SEEDS[k], -found.moves[k])
        for name, value in again.items():
            assert float((found.adapter[name][k] - value).abs().max()) <= 1e-6


def test_a_slope_is_the_directional_derivative() -> None:
    """KS5 on a model: against autograd."""
    net = small.network("classification")
    start = small.stacked(net)
    found = walked(net, start)
    z = directions.directions(SEEDS[:, 0], Layout.of(net.initial).sizes)
    for k in range(3):
        own = small.examples("classification"), [int(n) for n in PLANS[k][0] if n >= 0]
        gradient = torch.stack([small.alone(net, row(start, k), own[0], n) for n in own[1]]).mean(0)
        wanted = LOCAL.lr * float(gradient @ z[k])
        assert float(found.moves[k, 0]) == pytest.approx(wanted, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("lane", [FoldLane, LoopLane])
def test_what_is_trained_may_be_expanded(lane: type[Lane]) -> None:
    net = small.network("classification")
    whole = small.stacked(net)
    half = {f"half.{n}": x / 2 for n, x in whole.items()}

    def expand(trained: Tree) -> Tree:
        return {n.removeprefix("half."): 2 * x for n, x in trained.items()}

    gradients = Gradients(lane(net.model), net.task, small.examples(net.task), LOCAL, net.device)
    found = Walker(Trainer(gradients, 2), Route(SEEDS, REACH / 2)).walk(half, PLANS, expand)
    straight = walked(net, whole, lane, 2)
    assert torch.allclose(found.moves[:, 0], 2 * straight.moves[:, 0], atol=1e-5)
    assert found.adapter.keys() == half.keys()


@WAYS
def test_dropout_is_off_and_on_again_afterwards(lane: type[Lane], width: int) -> None:
    net = small.network("classification", {**small.LORA, "lora_dropout": 0.5})
    start = small.stacked(net)
    one, two = walked(net, start, lane, width), walked(net, start, lane, width)
    assert torch.equal(one.moves, two.moves)
    sure = small.network("classification")
    assert torch.allclose(walked(sure, start, lane, width).moves, one.moves, atol=1e-6)
    assert any(m.training for m in net.model.modules() if isinstance(m, nn.Dropout) and m.p == 0.5)


@WAYS
def test_steps_that_are_not_finite_or_above_the_cap_are_skipped(
    lane: type[Lane], width: int
) -> None:
    net = small.network("classification")
    start = small.stacked(net)
    free = walked(net, start, lane, width)
    differences = (free.moves / LOCAL.lr * 2 * REACH).abs()
    cap = float(differences[:, 0].median())
    held = walked(net, start, lane, width, cap=cap)
    first = differences[:, 0] > cap
    assert int(first.sum()) == 1 and not bool(held.moves[first, 0].any())
    assert torch.equal(held.moves[~first, 0], free.moves[~first, 0])
    start[next(n for n in start if "classifier" in n)][1] = math.nan
    broken = walked(net, start, lane, width)
    assert not bool(broken.moves[1].any()) and broken.loss.isnan().tolist() == [0, 1, 0]
    assert torch.equal(broken.moves[0], free.moves[0])


def test_in_place_no_more_of_a_direction_is_made_than_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory: inference and a part of one direction, whatever the model."""
    net, made = small.network("classification"), list[int]()
    start, real = small.stacked(net), directions.normals

    def counted(seeds: torch.Tensor, stream: int, count: int, first: int = 0) -> torch.Tensor:
        made.append(count * len(seeds))
        return real(seeds, stream, count, first)

    plain_walk = walked(net, start, LoopLane, 1)
    monkeypatch.setattr(walk, "KEPT", 0)
    monkeypatch.setattr(directions, "normals", counted)
    monkeypatch.setattr(directions, "AT_ONCE", 13)
    found = walked(net, start, LoopLane, 1)
    assert torch.equal(found.moves, plain_walk.moves)  # and of a kept direction
    assert max(made) == 13 < max(x[0].numel() for x in start.values())


def test_done_clients_are_reported_once() -> None:
    net, done = small.network("classification"), list[int]()
    gradients = Gradients(
        FoldLane(net.model), net.task, small.examples(net.task), LOCAL, net.device
    )
    Walker(Trainer(gradients, 2, done.append), Route(SEEDS, REACH)).walk(small.stacked(net), PLANS)
    assert done == [0, 1, 2]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"optimizer": "adamw"}, r"local\.optimizer='adamw'.*Set local\.optimizer=sgd"),
        ({"momentum": 0.9}, r"local\.momentum=0\.9"),
        ({"weight_decay": 0.01}, r"local\.weight_decay=0\.01"),
        ({"schedule": "cosine"}, r"local\.schedule='cosine'"),
        ({"warmup": 0.1}, r"local\.warmup=0\.1"),
        ({"clip_norm": 1.0}, r"local\.clip_norm=1\.0.*no gradient to clip"),
        ({"precision": "bf16"}, r"local\.precision='bf16'.*16 bits do not hold"),
        ({"steps": 0}, r"local\.epochs=1.*Set local\.steps"),
    ],
)
def test_what_a_walk_has_no_place_for_is_refused(changed: dict[str, Any], named: str) -> None:
    check_walk(LOCAL)
    with pytest.raises(FedpeftError, match=named):
        check_walk(dataclasses.replace(LOCAL, **changed))


def test_other_steps_than_the_recipes_are_refused() -> None:
    net = small.network("classification")
    with pytest.raises(FedpeftError, match=r"walks 2 steps, and the recipe plans \[3\]"):
        walked(net, small.stacked(net), seeds=SEEDS[:, :2])


def test_a_tuner_with_terms_of_its_own_is_refused() -> None:
    settings = {"kind": "adalora", "init_r": 2, "total_step": 10}
    net = small.network("classification", settings)
    with pytest.raises(FedpeftError, match=r"adapter\.kind is one with a penalty"):
        walked(net, small.stacked(net))
