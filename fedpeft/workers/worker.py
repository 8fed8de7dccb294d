"""One worker: a base model of its own, and a CohortFederation that trains a shard of a round.

Runs in a process of its own, or, in tests, in this one; it knows nothing of Ray.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpeft.cohort.federation import CohortFederation
from fedpeft.comms.ledger import Entry
from fedpeft.config import Recipe
from fedpeft.engine import intake_of
from fedpeft.errors import FedpeftError
from fedpeft.federation import Failure
from fedpeft.metrics import Score
from fedpeft.prepare import Prepared, prepare
from fedpeft.strategy import Messages
from fedpeft.workers.wire import (
    Common,
    Kept,
    Parcel,
    join,
    pack_memory,
    pack_messages,
    unpack_memory,
    unpack_messages,
)


@dataclass(frozen=True)
class Digests:
    """What a worker must have in common with the run."""

    base: str
    adapter: str
    data: str

    @staticmethod
    def of(prepared: Prepared) -> Digests:
        """Those of what a process has prepared."""
        network = prepared.network
        return Digests(network.digest, network.layout.digest, prepared.population.fingerprint)


Kind = Literal["train", "holdout", "test"]
"""What is done: training, or scoring on the clients' own hold-outs or on the test set."""


@dataclass(frozen=True)
class Task:
    """One shard's work in a round.

    kind: what is done; ``test`` scores on the test set, on each client's ``index`` of it. name:
    the shard's.
    own: the clients' messages, less what all have in common. memory: what the clients keep, of
    strategies that remember or keep.
    """

    kind: Kind
    name: str
    round: int
    own: Parcel
    memory: Kept
    index: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Averaged:
    """A Partial as arrays."""

    replies: Parcel
    clients: int
    up: tuple[Entry, ...]
    excluded: Mapping[str, str]
    zeros: tuple[str, ...]


Item = Parcel | Averaged | Failure | dict[str, Score]


@dataclass(frozen=True)
class Done:
    """What came of a Task: replies or scores in the shard's order, and the memory after it."""

    items: list[Item]
    memory: Kept


class Worker:
    """Prepares the recipe at its first call, and keeps it.

    Raises FedpeftError, then and at every later call, when model or data are not the run's.
    """

    def __init__(self, recipe: Recipe, digests: Digests) -> None:
        self._recipe = recipe
        self._digests = digests
        self._prepared: tuple[Prepared, CohortFederation] | None = None

    def ready(self) -> bool:
        """True once model and data are loaded and found to be the run's."""
        self._own()
        return True

    def work(self, common: Common, task: Task) -> Done:
        """Trains or scores a shard; ``common`` is what all clients of the round are sent."""
        prepared, federation = self._own()
        messages = join(common, unpack_messages(task.own))
        federation.restore(unpack_memory(task.memory))
        items: list[Item] = []
        if task.kind == "holdout":
            items.extend(federation.evaluate(task.round, messages))
        elif task.kind == "test":
            items.extend(federation.evaluate_test(task.round, task.index, messages))
        else:
            items.extend(_train(prepared, federation, task, messages))
        kept = pack_memory(federation.memory()) if prepared.remembers else {}
        return Done(items, kept)

    def _own(self) -> tuple[Prepared, CohortFederation]:
        if self._prepared is None:
            prepared = prepare(self._recipe)
            _check(Digests.of(prepared), self._digests)
            self._prepared = prepared, prepared.federation()
        return self._prepared


def _train(
    prepared: Prepared, federation: CohortFederation, task: Task, messages: Messages
) -> Iterator[Item]:
    """The shard's replies, or, for a linear strategy, what the round loop would make of them."""
    stream = federation.run(task.round, messages)
    single = prepared.post.individual or prepared.recipe.secure_aggregation.enabled
    if single or not prepared.strategy.linear or prepared.strategy.keeps:  # it must know who keeps
        for reply in stream:
            yield pack_messages(reply) if isinstance(reply, Messages) else reply
        return
    sizes, rounds = federation.clients(), prepared.recipe.rounds
    intake = intake_of(prepared.strategy, [messages], sizes, rounds)
    found = intake.partial(stream, task.name)
    own = pack_messages(found.replies)
    yield Averaged(own, found.clients, found.up, found.excluded, found.zeros)


def _check(own: Digests, wanted: Digests) -> None:
    for what in ("base", "adapter", "data"):
        theirs, ours = getattr(wanted, what), getattr(own, what)
        if theirs != ours:
            raise FedpeftError(
                f"engine.workers: the worker on {socket.gethostname()} has another {what} than the "
                f"run (digest {ours}, not {theirs}): all machines need the same model files, data "
                f"and versions of torch, transformers and peft."
            )
