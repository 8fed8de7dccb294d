"""CohortFederation: all clients in this process, on one frozen base.

A round's clients come to the strategy in cohorts, of which ``chunk`` clients at a time are in
flight. With ``chunk=1`` and the loop lane it is the plain sequential engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import streams
from fedpeft.base import folded
from fedpeft.cohort.chunk import COHORT
from fedpeft.cohort.clients import Memory, RoundInfo, TorchCohort
from fedpeft.cohort.gradient import Gradients
from fedpeft.cohort.lanes import Lane, LoopLane
from fedpeft.cohort.shelf import PREFIX, Shelf
from fedpeft.config import Local, Rounds
from fedpeft.data.clients import ClientData, Population
from fedpeft.data.examples import Examples
from fedpeft.evaluate import score_clients
from fedpeft.federation import Failure
from fedpeft.local import Progress, Trainer
from fedpeft.metrics import Score
from fedpeft.model import Network, set_mode
from fedpeft.postprocess import NOTHING, Postprocessor
from fedpeft.privacy.record_level import RecordLevel
from fedpeft.redact import redact
from fedpeft.strategy import Messages, Strategy
from fedpeft.tree import Tree, broadcast

log = logging.getLogger(__name__)

Work = Callable[[Messages, TorchCohort], Any]


@dataclass(frozen=True)
class Settings:
    """What of the recipe a client needs to train: local settings, rounds, seed, protection.

    private: how clients train by DP-SGD. leaving: what is done to the messages that leave them.
    """

    local: Local
    rounds: Rounds
    seed: int
    private: RecordLevel | None = None
    leaving: Postprocessor = NOTHING


class CohortFederation:
    """Trains ``chunk`` clients at once; see ``fedpeft.federation.Federation``.

    on_chunk: called as clients are done with (how many, tokens that they trained on).

    When the device's memory runs out, half as many clients go on being in flight, and the cohort
    under way is trained again: nothing is lost.
    """

    def __init__(
        self,
        network: Network,
        lane: Lane,
        population: Population,
        strategy: Strategy[Any],
        settings: Settings,
        chunk: int,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> None:
        self._network = network
        self._population = population
        self._clients = population.clients
        self._strategy = strategy
        self._settings = settings
        self._chunk = chunk
        self._on_chunk = on_chunk
        self._memory: Memory = {}
        self._shelf = Shelf()
        self._one_by_one = isinstance(lane, LoopLane)
        self._waiting: set[str] = set()
        task, examples = population.task, population.examples
        self._gradients = Gradients(lane, task, examples, settings.local, network.device)

    def clients(self) -> Mapping[str, int]:
        """Client -> number of training examples, sorted by name."""
        return self._clients.roster

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure]:
        """Trains the clients cohort by cohort; yields a stack of replies, or a failure, of each."""
        for messages in stacks:
            yield from self._run(round, messages)

    def _run(self, round: int, messages: Messages) -> Iterator[Messages | Failure]:
        first = 0
        while first < len(messages):
            size = 1 if self._one_by_one else COHORT * self._chunk
            cohort = messages.rows(range(first, min(first + size, len(messages))))
            self._waiting = set(cohort.clients)
            yield from self._isolated(round, cohort, self._train)
            self._done(list(self._waiting))
            first += len(cohort)

    def _done(self, names: Sequence[str]) -> None:
        """Reports clients of the cohort under way, each once."""
        new = [name for name in names if name in self._waiting]
        self._waiting.difference_update(new)
        if new and self._on_chunk is not None:
            self._on_chunk(len(new), sum(self.tokens(name) for name in new))

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Scores on the clients' own hold-outs, chunk by chunk."""
        for chunk in self._chunks(stacks):
            yield from self._isolated(round, chunk, self._score)

    def _chunks(self, stacks: Sequence[Messages]) -> Iterator[Messages]:
        for messages in stacks:
            yield from messages.split(self._chunk)

    def evaluate_test(
        self, round: int, index: Mapping[str, np.ndarray], *stacks: Messages
    ) -> Iterator[dict[str, Score] | Failure]:
        """As ``evaluate``, but on examples of the test set: ``index`` has each client's."""
        test = self._population.test

        def work(messages: Messages, cohort: TorchCohort) -> dict[str, Score]:
            own = [index[name] for name in cohort.clients]
            return self._score_on(messages, cohort, own, test)

        for chunk in self._chunks(stacks):
            yield from self._isolated(round, chunk, work)

    def score_shared(self, adapter: Tree, names: Sequence[str]) -> dict[str, Score]:
        """One complete adapter (unstacked) on the own hold-outs of these clients."""
        found: dict[str, Score] = {}
        for start in range(0, len(names), self._chunk):
            part = names[start : start + self._chunk]
            held = [self._clients.find(name).holdout for name in part]
            stacked = broadcast(adapter, len(part))
            scores = score_clients(
                self._network, self._gradients.lane, stacked, held, self._population.examples
            )
            found.update(zip(part, scores, strict=True))
            self._population.release()
        return found

    def models(self, round: int, messages: Messages) -> tuple[Tree, Tree]:
        """The clients' own adapters, stacked, and what their models still have; empty: all."""

        def work(messages: Messages, cohort: TorchCohort) -> tuple[Tree, Tree]:
            own = self._strategy.personal(messages, cohort)
            return own, self._strategy.pruned(messages, cohort)

        found: tuple[Tree, Tree] = self._on_cohort(round, messages, work)
        return found

    def memory(self) -> Memory:
        """What all clients keep, as of now: private memory, and what they were given once."""
        given = self._shelf.memory()
        return {
            client: {**self._memory.get(client, {}), **given.get(client, {})}
            for client in sorted(self._memory.keys() | given.keys())
        }

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Puts back what ``memory`` gave."""
        self._shelf = Shelf.of(memory)
        private = {
            client: {n: t for n, t in own.items() if not n.startswith(PREFIX)}
            for client, own in memory.items()
        }
        self._memory = {client: own for client, own in private.items() if own}

    def _isolated(self, round: int, cohort: Messages, work: Work) -> Iterator[Any]:
        """Runs ``work`` on a cohort; if it fails, on each half of it, down to single clients.

        So one faulty client costs only itself. If memory ran out, the halves go with half as many
        clients in flight.
        """
        try:
            found = self._on_cohort(round, cohort, work)
        except Exception as error:
            if out_of_memory(error):
                self._halve()
            name, reason = cohort.clients[0], redact(f"{type(error).__name__}: {error}")
            if len(cohort) == 1:
                log.warning("client %s failed in round %d", name, round, exc_info=error)
        else:
            yield found
            return
        if len(cohort) == 1:
            yield Failure(name, reason)
            return
        for half in cohort.split(-(-len(cohort) // 2)):  # the failed pass's tensors are gone here
            yield from self._isolated(round, half, work)

    def _halve(self) -> None:
        """Lowers the number of clients in flight, for the rest of the run."""
        before, self._chunk = self._chunk, max(1, self._chunk // 2)
        log.warning(
            "out of memory with %d clients in flight: going on with %d", before, self._chunk
        )
        if self._network.device.type == "cuda":
            torch.cuda.empty_cache()

    def _on_cohort(self, round: int, messages: Messages, work: Work) -> Any:
        """``work`` on the cohort of ``messages``; its private memory is kept when all went well."""
        own = [self._clients.find(name) for name in messages.clients]
        memory = {c.name: dict(self._memory.get(c.name, {})) for c in own}
        progress = Progress(round, self._settings.rounds.count)
        info = RoundInfo(progress, self._settings.seed, self._settings.private)
        trainer = Trainer(self._gradients, self._chunk, lambda k: self._done([messages.clients[k]]))
        kept = (memory, self._shelf)
        cohort = TorchCohort(self._network, trainer, own, info, self._weights(own), kept)
        with torch.random.fork_rng():
            torch.manual_seed(
                streams.derive(self._settings.seed, "dropout", round, messages.clients[0])
            )
            found = work(messages.to(self._network.device), cohort)
        self._memory.update({name: kept for name, kept in memory.items() if kept})
        self._population.release()
        return found

    def _train(self, messages: Messages, cohort: TorchCohort) -> Messages:
        set_mode(self._network.model, True, self._settings.local.base_dropout)
        trained = self._strategy.train(messages, cohort)
        reply = self._settings.leaving.leave(messages, trained, cohort)
        self._strategy.left(messages, reply, cohort)
        return reply

    def _score(self, messages: Messages, cohort: TorchCohort) -> dict[str, Score]:
        held = [self._clients.find(name).holdout for name in cohort.clients]
        return self._score_on(messages, cohort, held, self._population.examples)

    def _score_on(
        self,
        messages: Messages,
        cohort: TorchCohort,
        index: Sequence[np.ndarray],
        examples: Examples,
    ) -> dict[str, Score]:
        base = self._strategy.followed(messages, cohort)
        adapters = self._strategy.personal(messages, cohort)
        alive, lane = self._strategy.pruned(messages, cohort), self._gradients.lane
        smaller = cohort.pruned(alive) if alive else nullcontext()
        with folded(self._network, base), smaller:
            scores = score_clients(self._network, lane, adapters, index, examples)
        return dict(zip(cohort.clients, scores, strict=True))

    def _weights(self, data: list[ClientData]) -> Tensor:
        return client_weights([len(c.train) for c in data], self._settings.rounds)

    def tokens(self, name: str) -> int:
        """Tokens that a client trains on in a round, on average."""
        data, local = self._clients.find(name), self._settings.local
        per_example = float(self._population.examples.lengths_of(data.train).mean())
        if local.steps:
            seen = local.steps * min(len(data.train), local.batch_size * local.accumulate)
        else:
            seen = local.epochs * len(data.train)
        return int(per_example * seen)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)


def client_weights(examples: list[int], rounds: Rounds) -> Tensor:
    """Aggregation weights ``[K]`` (float64) that the recipe gives clients of these sizes."""
    if rounds.weighting == "equal":
        return torch.ones(len(examples), dtype=torch.float64)
    return torch.tensor(examples, dtype=torch.float64)
