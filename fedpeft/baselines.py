"""What a federated run is compared with, and the scores of any trained federation.

``untrained``: the adapter as initialised. ``local``: every client alone. ``centralised``: all data
in one place. The trained ones get the training that the federated run gave each client, in one go,
and are computed in this process, whatever ``engine.kind`` and ``engine.workers``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft import sampling, streams
from fedpeft.cohort.federation import CohortFederation
from fedpeft.data.clients import Task
from fedpeft.engine import play_round
from fedpeft.evaluate import mean_and_worst, score
from fedpeft.events import Outcome, Watcher
from fedpeft.federation import Failure, Federation
from fedpeft.metrics import Score
from fedpeft.prepare import Prepared, as_baseline
from fedpeft.strategy import addressed
from fedpeft.tree import Tree
from fedpeft.workers.federation import WorkersFederation

NOTHING = Score(0, math.nan, math.nan, math.nan)
"""The score where there is nothing to measure."""


@dataclass(frozen=True)
class ClientsOutcome:
    """Scores on the clients' own hold-outs: by client, their mean and the worst tenth's."""

    scores: dict[str, Score]
    mean: float
    worst: float


def summarise(task: Task, scores: dict[str, Score]) -> ClientsOutcome:
    """Mean and worst tenth: of accuracies, or of losses per token for language modelling.

    NaN of nobody.
    """
    if not scores:
        return ClientsOutcome({}, math.nan, math.nan)
    if task == "classification":
        mean, worst = mean_and_worst([own.accuracy for own in scores.values()])
        return ClientsOutcome(scores, mean, worst)
    mean, worst = mean_and_worst([-own.loss for own in scores.values()])
    return ClientsOutcome(scores, -mean, -worst)


def _collect(results: Iterable[dict[str, Score] | Failure]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for result in results:
        if not isinstance(result, Failure):
            found.update(result)
    return dict(sorted(found.items()))


def clients_outcome(prepared: Prepared, federation: Federation, state: Any) -> ClientsOutcome:
    """The clients' adapters on their own hold-outs, where the recipe asks for it."""
    if not prepared.recipe.evaluation.clients:
        return ClientsOutcome({}, math.nan, math.nan)
    rounds = prepared.recipe.rounds.count
    sent = addressed(prepared.strategy, state, rounds, _measured(prepared, federation))
    return summarise(prepared.population.task, _collect(federation.evaluate(rounds, *sent)))


def test_score(
    prepared: Prepared, federation: Federation, state: Any, most: int | None = None
) -> Score:
    """The global adapter on the test set, or on ``most`` examples of it, drawn by the seed.

    Of strategies that prune: the clients' own smaller models, each on its share of the examples.
    Without a global adapter: the mean over the clients' adapters on a sample of the test set
    (``evaluation.local_test`` examples); NaN on Flower, whose nodes do not have it.
    """
    population, strategy = prepared.population, prepared.strategy
    if "pruned" in strategy.asks():
        return _smaller(prepared, state, _sample(prepared, most or 0))
    if strategy.shares:
        adapter, base = strategy.adapter(state), strategy.base(state)
        at = (population.test, base, _sample(prepared, most or 0))
        return score(prepared.network, prepared.lane, adapter, *at)
    if not isinstance(federation, CohortFederation | WorkersFederation):
        return NOTHING
    rounds, names = prepared.recipe.rounds.count, _measured(prepared, federation)
    index = _sample(prepared, prepared.recipe.evaluation.local_test)
    sent = addressed(strategy, state, rounds, names)
    same = dict.fromkeys(names, index)
    found = _collect(federation.evaluate_test(rounds, same, *sent))
    return mean_score(list(found.values()))


def _sample(prepared: Prepared, most: int) -> np.ndarray:
    """All examples of the test set, or ``most`` of them, ascending."""
    index = np.arange(len(prepared.population.test), dtype=np.int64)
    if not 0 < most < len(index):
        return index
    stream = streams.numpy_stream(prepared.recipe.seed, "local test")
    return np.sort(stream.choice(len(index), size=most, replace=False))


def _smaller(prepared: Prepared, state: Any, index: np.ndarray) -> Score:
    """The examples dealt out to the clients by the seed, each answered by that client's model.

    That is, of a client by chance and an example by chance, without every client's pass over all.
    What the server would send is all that it takes, so it is computed here, whatever the engine.
    macro_f1: NaN, as no one model has answered.
    """
    federation, rounds = prepared.federation(), prepared.recipe.rounds.count
    names = _measured(prepared, federation)
    order = streams.numpy_stream(prepared.recipe.seed, "dealt test").permutation(index)
    dealt = {name: np.sort(order[k :: len(names)]) for k, name in enumerate(names)}
    sent = addressed(prepared.strategy, state, rounds, names)
    found = _collect(federation.evaluate_test(rounds, dealt, *sent))
    known = [own for own in found.values() if own.items]
    if not known:
        return NOTHING
    items = np.array([own.items for own in known])
    loss, accuracy = (
        float(np.average([getattr(own, name) for own in known], weights=items))
        for name in ("loss", "accuracy")
    )
    return Score(int(items.sum()), loss, accuracy, math.nan)


def _measured(prepared: Prepared, federation: Federation) -> tuple[str, ...]:
    recipe = prepared.recipe
    return sampling.measured(recipe.evaluation.most, federation.clients(), recipe.seed)


def mean_score(scores: list[Score]) -> Score:
    """The unweighted mean of each figure; ``items`` is one model's."""
    if not scores:
        return NOTHING
    figures = [(s.loss, s.accuracy, s.macro_f1) for s in scores]
    loss, accuracy, f1 = np.mean(np.array(figures), axis=0)
    return Score(scores[0].items, float(loss), float(accuracy), float(f1))


def baseline(prepared: Prepared, name: str, watcher: Watcher) -> Outcome:
    """One row of the last table: ``untrained``, ``local`` or ``centralised``."""
    if name == "untrained":
        return _untrained(prepared)
    began = time.perf_counter()
    other = as_baseline(prepared, name)
    federation = other.federation(watcher.chunk_done)
    clients = tuple(federation.clients())
    watcher.stage(name, 1)
    watcher.round_began(1, len(clients), sum(federation.tokens(c) for c in clients))
    recipe = other.recipe
    state = other.strategy.init(other.problem)
    state, report = play_round(other.strategy, state, federation, recipe.rounds, recipe.seed, 1)
    watcher.round_done(report, None)
    return _trained(prepared, other, federation, state, time.perf_counter() - began)


def _trained(
    prepared: Prepared, other: Prepared, federation: CohortFederation, state: Any, seconds: float
) -> Outcome:
    name = str(other.recipe.strategy["name"])
    measured = test_score(other, federation, state)
    if other.strategy.pools:
        clients = _shared_outcome(prepared, other.strategy.adapter(state))
    else:
        clients = clients_outcome(other, federation, state)
    return Outcome(name, measured, clients.mean, clients.worst, seconds=seconds)


def _untrained(prepared: Prepared) -> Outcome:
    initial = prepared.network.initial
    measured = score(prepared.network, prepared.lane, initial, prepared.population.test)
    clients = _shared_outcome(prepared, initial)
    return Outcome("untrained", measured, clients.mean, clients.worst)


def _shared_outcome(prepared: Prepared, adapter: Tree) -> ClientsOutcome:
    """One adapter on the clients' own hold-outs."""
    if not prepared.recipe.evaluation.clients:
        return ClientsOutcome({}, math.nan, math.nan)
    federation = prepared.federation()
    names = _measured(prepared, federation)
    return summarise(prepared.population.task, federation.score_shared(adapter, names))
