"""A federation of four nodes on an in-memory grid, of which c1 is faulty in round 2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict

from fedpeft.config import Recipe, Rounds
from fedpeft.engine import AbortedRoundError, RoundReport, Seam, play_round
from fedpeft.flower.federation import FlowerFederation, Patience
from fedpeft.flower.records import Header, decode
from fedpeft.message import Message
from fedpeft.prepare import prepare
from fedpeft.tree import Tree
from tests.flower.nodes import InProcess, Reply
from tests.tiny import tiny_recipe

NAMES = ("c0", "c1", "c2", "c3")
ROUNDS = 3
BAD_CLIENT, BAD_ROUND = "c1", 2

Spoil = Callable[[RecordDict, Message, Header], RecordDict | None]
"""From a reply's content, message and header to the content that arrives; None: nothing does."""


def faulty_client(spoil: Spoil, clients: tuple[str, ...] = (BAD_CLIENT,)) -> Reply:
    """Replies of these clients in round 2, spoilt; all others as they are."""

    def reply(request: FlowerMessage, answer: FlowerMessage) -> FlowerMessage | None:
        _, asked = decode(request.content)
        if asked.client not in clients or asked.round != BAD_ROUND:
            return answer
        content = spoil(answer.content, *decode(answer.content))
        return None if content is None else FlowerMessage(content, reply_to=request)

    return reply


def recipe_of(tiny: Path, **rounds: Any) -> Recipe:
    return dataclasses.replace(tiny_recipe(tiny), rounds=Rounds(count=ROUNDS, **rounds))


def grid_of(reply: Reply | None = None) -> InProcess:
    return InProcess({10 + k: {"client": name} for k, name in enumerate(NAMES)}, reply)


def federate(grid: InProcess, recipe: Recipe) -> FlowerFederation:
    return FlowerFederation(grid, recipe, len(NAMES), patience=Patience(join=0.05, reply=0.05))


def play(
    grid: InProcess,
    recipe: Recipe,
    drawn: Mapping[int, tuple[str, ...]] | None = None,
    before: Callable[[int], None] = lambda number: None,
) -> tuple[Tree, dict[int, RoundReport]]:
    """The adapter after all rounds and what happened in each.

    drawn: round -> who takes part, where it is not everybody. before: called before each round.
    """
    prepared, federation = prepare(recipe), federate(grid, recipe)
    state, reports = prepared.strategy.init(prepared.problem), {}
    for number in range(1, recipe.rounds.count + 1):
        before(number)
        seam = Seam(prepared.post, (drawn or {}).get(number))
        try:
            state, reports[number] = play_round(
                prepared.strategy, state, federation, recipe.rounds, recipe.seed, number, seam
            )
        except AbortedRoundError as error:
            if not recipe.rounds.aborts:
                raise
            reports[number] = error.report
        federation._courier._late.clear()  # who was late has answered by the next round
    return prepared.strategy.adapter(state), reports


def same(left: Tree, right: Tree) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in right)


def skipped(recipe: Recipe) -> Tree:
    """The adapter of a run of which round 2 came to nothing."""
    prepared, federation = prepare(recipe), federate(grid_of(), recipe)
    state = prepared.strategy.init(prepared.problem)
    for number in (1, 3):
        state, _ = play_round(
            prepared.strategy, state, federation, recipe.rounds, recipe.seed, number
        )
    return prepared.strategy.adapter(state)


def costs_c1_alone(reply: Reply, recipe: Recipe, reason: str) -> None:
    """The invariants after a fault that excludes c1 from round 2.

    The run goes on to its end, the model is finite, c1 alone is excluded and in that round alone,
    and the adapter is, bit for bit, that of a run in which c1 did not take part in round 2.
    """
    adapter, reports = play(grid_of(reply), recipe)
    assert list(reports) == list(range(1, ROUNDS + 1))
    assert all(bool(torch.isfinite(value).all()) for value in adapter.values())
    assert {n: sorted(r.excluded) for n, r in reports.items()} == {1: [], 2: ["c1"], 3: []}
    assert reason in reports[2].excluded["c1"]
    assert {n: report.replied for n, report in reports.items()} == {1: 4, 2: 3, 3: 4}
    assert all(math.isfinite(report.loss) for report in reports.values())
    without, _ = play(grid_of(), recipe, {BAD_ROUND: ("c0", "c2", "c3")})
    assert same(adapter, without)


def changes_nothing(reply: Reply, recipe: Recipe) -> dict[int, RoundReport]:
    """The invariants after a fault that costs nothing: nobody excluded, the adapter as without."""
    adapter, reports = play(grid_of(reply), recipe)
    assert all(not report.excluded and report.replied == 4 for report in reports.values())
    assert same(adapter, play(grid_of(), recipe)[0])
    return reports
