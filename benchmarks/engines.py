"""fedpeft's engines on a workload: its round loop, federated averaging, cohort or sequential."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.model import build_model
from benchmarks.recorder import Recorder, mark_first_step
from benchmarks.texts import Texts
from benchmarks.workload import CLASSES, SEED, Workload, client_name, clients_of
from fedpeft.cohort.choose import choose_lane
from fedpeft.cohort.chunk import choose
from fedpeft.cohort.federation import CohortFederation, Settings
from fedpeft.cohort.lanes import Lane, LoopLane
from fedpeft.config import Rounds
from fedpeft.data.clients import ClientData, Clients, Population
from fedpeft.data.examples import Examples
from fedpeft.engine import play_round
from fedpeft.model import Network, build_network
from fedpeft.strategy import Problem, build

ROUNDS = Rounds(weighting="equal")
"""Every client of a federation takes part in each round, all with the same weight."""


def population(workload: Workload) -> Population:
    """All clients of the workload, without hold-outs."""
    texts = Texts.draw(workload)
    rows, width = texts.tokens.shape
    starts = torch.arange(rows + 1) * width
    examples = Examples(texts.tokens.flatten().int(), starts, texts.labels, pad=0)
    clients = Clients.of(
        ClientData(client_name(c), texts.rows(c), texts.rows(c)[:0])
        for c in range(workload.population)
    )
    labels = tuple(str(label) for label in range(CLASSES))
    return Population("classification", clients, examples, examples, labels, "synthetic")


def federations(
    workload: Workload, network: Network, lane: Lane, chunk: int
) -> list[CohortFederation]:
    """One federation per cohort of the population, all on one network."""
    everyone, strategy = population(workload), build("fedavg", {})
    settings = Settings(workload.local, ROUNDS, SEED)
    found = []
    for round in range(1, workload.population // workload.cohort + 1):
        own = Clients.of(everyone.clients[c] for c in clients_of(workload, round))
        part = dataclasses.replace(everyone, clients=own)
        found.append(CohortFederation(network, lane, part, strategy, settings, chunk))
    return found


def engine(workload: Workload, recorder: Recorder, kind: str, chunk: int) -> dict[str, Any]:
    """Plays the rounds; ``kind`` is ``cohort`` or ``sequential``; fedpeft chooses a chunk of 0."""
    network = build_network(build_model(workload), "classification", CLASSES, torch.device("cpu"))
    if kind == "cohort":
        lane = choose_lane(network, population(workload).examples)
        size = chunk or choose(network, workload.local, workload.tokens)
    else:
        lane, size = LoopLane(network.model), 1
    strategy, cohorts = build("fedavg", {}), federations(workload, network, lane, size)
    names = tuple(client_name(c) for c in range(workload.population))
    problem = Problem(network.initial, network.scaling, names, recorder.rounds, SEED)
    state = strategy.init(problem)
    mark_first_step(network.model, recorder.folder)
    for round in range(1, recorder.rounds + 1):
        federation = cohorts[(round - 1) % len(cohorts)]
        recorder.begin()
        state, report = play_round(strategy, state, federation, ROUNDS, SEED, round)
        assert report.replied == workload.cohort, report.excluded
        if recorder.end():
            recorder.keep(strategy.adapter(state))
    return {"lane": lane.name, "chunk": size}
