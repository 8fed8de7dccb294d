"""The plan before the run: what it will train, send and need. Trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedpeft import quantize, sampling
from fedpeft.cohort.chunk import MemoryEstimate, estimate
from fedpeft.comms.ledger import Bytes, message_bytes, stack_bytes
from fedpeft.forecast import Forecast, forecast
from fedpeft.model import kind_of
from fedpeft.prepare import Prepared
from fedpeft.privacy.outlook import outlook
from fedpeft.steps import steps_of
from fedpeft.tree import Tree, numel

SOME = 1000
"""Clients whose data are read for the plan: every one, or every n-th."""


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    clients: how many; sampled: expected per round. examples, steps: per client (smallest, median,
    largest); steps are optimizer steps per round. test: examples of the global test set.
    trainable: parameters by kind; frozen: of the base. down, up: bytes per client and round by
    kind, before any codec. tokens: expected per round (SOME clients'). memory: estimate per client
    of a chunk, in bytes. workers: processes with a chunk each (of Flower's engine: 1). privacy:
    what it asks for.
    sends: the bytes of the whole run, where they were asked for.
    """

    strategy: str
    workers: int
    lane: str
    engine: str
    device: str
    chunk: int
    rounds: int
    clients: int
    sampled: float
    examples: tuple[int, int, int]
    steps: tuple[int, int, int]
    test: int
    labels: int
    trainable: dict[str, int]
    frozen: int
    down: Bytes
    up: Bytes
    tokens: int
    memory: MemoryEstimate
    privacy: dict[str, str] = field(default_factory=dict)
    sends: Forecast | None = None


def make_plan(prepared: Prepared, sends: bool = False) -> Plan:
    """The plan of a prepared run. sends: also of its messages, all rounds of which are played."""
    recipe, network, population = prepared.recipe, prepared.network, prepared.population
    names = prepared.problem.clients
    sent = prepared.strategy.send(prepared.strategy.init(prepared.problem), 1, names[:1])
    reply = prepared.strategy.expects(sent[0])
    sizes = population.clients.roster.numbers
    distinct, which = np.unique(sizes, return_inverse=True)
    steps = np.array([steps_of(int(n), recipe.local) for n in distinct])[which]
    trainable: dict[str, int] = {}
    for name, value in network.initial.items():
        trainable[kind_of(name)] = trainable.get(kind_of(name), 0) + value.numel()
    sampled = sampling.expected(recipe.rounds.sampling, len(names))
    federation = prepared.federation()
    some = names[:: -(-len(names) // SOME)]
    tokens = sum(federation.tokens(name) for name in some) * sampled / len(some)
    population.release()
    scalars = {"weight": 0.0, "loss": 0.0}
    return Plan(
        strategy=str(recipe.strategy["name"]),
        workers=prepared.workers,
        lane=prepared.lane.name,
        engine=recipe.engine.kind,
        device=str(network.device),
        chunk=prepared.chunk,
        rounds=recipe.rounds.count,
        clients=len(names),
        sampled=sampled,
        examples=_spread(sizes),
        steps=_spread(steps),
        test=len(population.test),
        labels=len(population.labels),
        trainable=trainable,
        frozen=sum(quantize.count(p) for p in network.model.parameters() if not p.requires_grad),
        down=stack_bytes(sent),
        up=message_bytes(type(sent[0])(reply, scalars)),
        tokens=round(tokens),
        memory=estimate(network, prepared.gradients, prepared.workers),
        privacy=_privacy(prepared, sizes, _released(prepared, reply)),
        sends=forecast(prepared) if sends else None,
    )


def _privacy(prepared: Prepared, sizes: np.ndarray, numbers: int) -> dict[str, str]:
    terms = prepared.terms
    return {} if terms is None else outlook(terms, prepared.recipe, sizes, numbers)


def _released(prepared: Prepared, reply: Mapping[str, Tree]) -> int:
    """Numbers that one release holds: a slope, or all that is trained."""
    return 1 if prepared.strategy.walks else sum(numel(tree) for tree in reply.values())


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())
