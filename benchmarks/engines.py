"""fedpeft's engines on a workload, set up as ``fedpeft run`` does, and its round loop.

This is the only file of the benchmarks that knows how an engine is put together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.model import build_model, hold_base
from benchmarks.recipe import write_recipe
from benchmarks.recorder import Recorder, mark_first_step, note_once
from benchmarks.texts import Texts
from benchmarks.ways import Way
from benchmarks.workload import CLASSES, SEED, Workload, client_name, clients_of
from fedpeft.config import Recipe, Rounds
from fedpeft.data.clients import ClientData, Clients, Population
from fedpeft.data.examples import Examples
from fedpeft.engine import play_round
from fedpeft.federation import Federation
from fedpeft.model import build_network
from fedpeft.prepare import Prepared, assemble, prepare
from fedpeft.strategy import build

ROUNDS = Rounds(weighting="equal")
"""Every client of a federation takes part in each round, all with the same weight."""


def population(workload: Workload) -> Population:
    """All clients of the workload, without hold-outs."""
    texts = Texts.draw(dataclasses.replace(workload, device="cpu"))
    rows, width = texts.tokens.shape
    labels = texts.labels if workload.task == "classification" else None
    starts = torch.arange(rows + 1) * width
    examples = Examples(texts.tokens.flatten().int(), starts, labels, pad=0)
    clients = Clients.of(
        ClientData(client_name(c), texts.rows(c), texts.rows(c)[:0])
        for c in range(workload.population)
    )
    names = tuple(str(label) for label in range(CLASSES)) if labels is not None else ()
    return Population(workload.task, clients, examples, examples, names, "synthetic")


def prepared(workload: Workload, way: Way) -> Prepared:
    """The workload under the way's settings, with the chunk that fedpeft chose written out.

    The base is float32, as fedpeft loads it; what of it is held in bf16, its engine decides.
    """
    device, model = torch.device(workload.device), build_model(workload)
    hold_base(model, torch.float32)
    network = build_network(model, workload.task, CLASSES, device)
    recipe = Recipe(
        seed=SEED,
        local=way.local(workload),
        privacy=way.privacy,
        rounds=ROUNDS,
        engine=way.engine(workload),
    )
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({})))
    found = assemble(recipe, build("fedavg", {}), population(workload), network, unused)
    return dataclasses.replace(found, recipe=found.resolved())


def federations(workload: Workload, whole: Prepared) -> list[Federation]:
    """One federation per cohort of the population, all on one network."""
    everyone, found = whole.population, []
    for round in range(1, workload.population // workload.cohort + 1):
        own = Clients.of(everyone.clients[c] for c in clients_of(workload, round))
        part = dataclasses.replace(everyone, clients=own)
        found.append(dataclasses.replace(whole, population=part).federation())
    return found


def engine(workload: Workload, way: Way, recorder: Recorder) -> dict[str, Any]:
    """Plays the rounds in this process."""
    whole = prepared(workload, way)
    cohorts = federations(workload, whole)
    mark_first_step(whole.network.model, recorder.folder)
    strategy, state = whole.strategy, whole.strategy.init(whole.problem)
    for round in range(1, recorder.rounds + 1):
        federation = cohorts[(round - 1) % len(cohorts)]
        recorder.begin()
        state, report = play_round(strategy, state, federation, ROUNDS, SEED, round)
        assert report.replied == workload.cohort, report.excluded
        if recorder.end() and way.comparable:
            recorder.keep(strategy.adapter(state))
    return {"lane": whole.lane.name, "chunk": whole.chunk}


def workers(workload: Workload, way: Way, recorder: Recorder) -> dict[str, Any]:
    """Plays the rounds on ``way.processes`` workers, of a recipe on disk: each loads its own."""
    recipe = write_recipe(workload, way, recorder.folder / "recipe")
    whole = prepare(recipe)
    if way.processes == 1:
        _rounds(whole, whole.federation(), recorder)
    else:
        from fedpeft.workers.federation import WorkersFederation
        from fedpeft.workers.ray_pool import opened

        with opened(whole) as pool:
            _rounds(whole, WorkersFederation(whole, pool), recorder)
    return {"lane": whole.lane.name, "chunk": whole.chunk}


def _rounds(whole: Prepared, federation: Federation, recorder: Recorder) -> None:
    strategy, state = whole.strategy, whole.strategy.init(whole.problem)
    rounds, seed = whole.recipe.rounds, whole.recipe.seed
    for round in range(1, recorder.rounds + 1):
        recorder.begin()
        state, report = play_round(strategy, state, federation, rounds, seed, round)
        assert not report.excluded, report.excluded
        recorder.end()
        note_once(recorder.folder / "first_step")  # here the first round: the step is elsewhere
