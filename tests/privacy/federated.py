"""Whole private federations in memory, of a second or less: a recipe, its Prepared, its rounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedpeft import sampling
from fedpeft.cohort.lanes import FoldLane
from fedpeft.config import Engine, Local, Privacy, Recipe, Rounds, Sampling
from fedpeft.data.build import pool
from fedpeft.data.clients import Population
from fedpeft.engine import RoundReport, Seam, play_round
from fedpeft.message import Messages
from fedpeft.prepare import Prepared, build_strategy
from fedpeft.privacy.client_level import ClientLevel
from fedpeft.privacy.randomness import Randomness
from fedpeft.privacy.record_level import RecordLevel
from fedpeft.strategy import load
from fedpeft.tree import Tree
from tests.tiny import LORA, tiny_network, tiny_population

SIZES = (5, 9, 3, 12)
STEP = Local(optimizer="sgd", lr=1.0, batch_size=64, steps=1)
"""One step of length one on all examples: what is sent is the start less the gradient."""

RECORD = Privacy(unit="record", noise_multiplier=1.0)
CLIENT = Privacy(unit="client", noise_multiplier=1.0)


def recipe_of(strategy: str | Mapping[str, Any] = "fedavg", **changes: Any) -> Recipe:
    """A recipe of three rounds in which all clients weigh the same."""
    named = {"name": strategy} if isinstance(strategy, str) else dict(strategy)
    walks = load(str(named["name"])).walks
    plain = Recipe(
        strategy=named,
        rounds=Rounds(count=3, weighting="equal"),
        local=Local(optimizer="sgd", lr=0.1, batch_size=4, steps=2 if walks else 0),
        engine=Engine(chunk=4, device="cpu", workers=1),
    )
    return dataclasses.replace(plain, **changes)


def prepared_of(
    recipe: Recipe,
    sizes: Sequence[int] = SIZES,
    population: Population | None = None,
    adapter: Mapping[str, Any] = LORA,
) -> Prepared:
    """What ``prepare`` makes of a recipe, on random tokens and weights."""
    strategy, network = build_strategy(recipe), tiny_network(adapter)
    people = population or tiny_population(sizes)
    tokenizer = cast(PreTrainedTokenizerBase, None)
    people = pool(people) if strategy.pools else people
    return Prepared(recipe, strategy, people, network, FoldLane(network.model), tokenizer)


def play(prepared: Prepared, rounds: int = 2) -> tuple[list[Any], list[RoundReport]]:
    """The states from the start on, and the reports; clients as the sampler draws them."""
    recipe, strategy = prepared.recipe, prepared.strategy
    federation = prepared.secured(prepared.federation())
    states, reports = [strategy.init(prepared.problem)], []
    for number in range(1, rounds + 1):
        names = sampling.draw(recipe.rounds.sampling, federation.clients(), recipe.seed, number)
        state, report = play_round(
            strategy, states[-1], federation, recipe.rounds, 0, number, Seam(prepared.post, names)
        )
        states.append(state)
        reports.append(report)
    return states, reports


def seeded(prepared: Prepared, seed: int) -> Prepared:
    """The same, its mechanism with numbers that can be repeated."""
    mechanism = prepared.post.links[0]
    assert isinstance(mechanism, RecordLevel | ClientLevel)
    mechanism.randomness = Randomness.seeded(seed)
    return prepared


def flat(tree: Tree) -> torch.Tensor:
    """All numbers of a tree, float64, in the order of names."""
    return torch.cat([tree[name].double().flatten() for name in sorted(tree)])


def mechanism_of(prepared: Prepared) -> RecordLevel:
    """The record-level mechanism of a run."""
    found = prepared.post.links[0]
    assert isinstance(found, RecordLevel)
    return found


def replies_of(prepared: Prepared, names: Sequence[str], round: int = 1) -> list[Messages]:
    """What leaves these clients in a round from the strategy's start."""
    strategy = prepared.strategy
    sent = strategy.send(strategy.init(prepared.problem), round, names)
    found = list(prepared.federation().run(round, prepared.post.announce(sent)))
    assert all(isinstance(reply, Messages) for reply in found), found
    return [reply for reply in found if isinstance(reply, Messages)]


def rounds_of(kind: str = "uniform", count: int = 6, **sampling: Any) -> Rounds:
    """Rounds in which clients weigh the same."""
    return Rounds(count=count, weighting="equal", sampling=Sampling(kind, **sampling))  # type: ignore[arg-type]


def charged(folder: Path) -> list[tuple[int, list[str]]]:
    """(round, clients) of each charge, in order."""
    every = [json.loads(line) for line in (folder / "privacy.jsonl").read_text().splitlines()[1:]]
    return [(one["round"], sorted(c for _, own in one["charges"] for c in own)) for one in every]


def mechanism(
    privacy: Privacy = RECORD,
    local: Local = STEP,
    rounds: int = 5,
    sizes: tuple[int, ...] = (5, 9),
    seed: int = 0,
) -> RecordLevel:
    """The mechanism of clients of these sizes, with numbers that can be repeated."""
    return RecordLevel(privacy, local, rounds, np.array(sizes), Randomness.seeded(seed))
