"""CohortFederation: all clients in this process, trained in chunks on one frozen base.

With ``chunk=1`` and the loop lane it is the plain sequential engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import streams
from fedpeft.cohort.clients import Memory, RoundInfo, TorchCohort
from fedpeft.cohort.lanes import Lane
from fedpeft.config import Local, Rounds
from fedpeft.data.clients import ClientData, Population
from fedpeft.data.examples import Examples
from fedpeft.evaluate import score_clients
from fedpeft.federation import Failure
from fedpeft.local import Progress, Trainer, steps_of
from fedpeft.metrics import Score
from fedpeft.model import Network, set_mode
from fedpeft.strategy import Messages, Strategy
from fedpeft.tree import Tree, broadcast

log = logging.getLogger(__name__)

Work = Callable[[Messages, TorchCohort], Any]


@dataclass(frozen=True)
class Settings:
    """What of the recipe a client needs to train: local settings, rounds, seed."""

    local: Local
    rounds: Rounds
    seed: int


class CohortFederation:
    """Trains a round's clients in chunks of ``chunk``; see ``fedpeft.federation.Federation``.

    on_chunk: called after each chunk with (clients done in it, tokens trained in it).
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
        self._trainer = Trainer(
            lane, population.task, population.examples, settings.local, network.device
        )

    def clients(self) -> Mapping[str, int]:
        """Client -> number of training examples, sorted by name."""
        return self._clients.roster

    def run(self, round: int, messages: Messages) -> Iterator[Messages | Failure]:
        """Trains the clients chunk by chunk; a stack of replies, or a failure, as each is done."""
        for chunk in messages.split(self._chunk):
            yield from self._isolated(round, chunk, self._train)
            if self._on_chunk is not None:
                self._on_chunk(len(chunk), sum(self.tokens(name) for name in chunk.clients))

    def evaluate(self, round: int, messages: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Scores on the clients' own hold-outs, chunk by chunk."""
        for chunk in messages.split(self._chunk):
            yield from self._isolated(round, chunk, self._score)

    def evaluate_on(
        self, round: int, messages: Messages, examples: Examples, index: np.ndarray
    ) -> Iterator[dict[str, Score] | Failure]:
        """As ``evaluate``, but every client's adapter on the same ``examples[index]``."""

        def work(messages: Messages, cohort: TorchCohort) -> dict[str, Score]:
            return self._score_on(messages, cohort, [index] * len(messages), examples)

        for chunk in messages.split(self._chunk):
            yield from self._isolated(round, chunk, work)

    def score_shared(self, adapter: Tree, names: Sequence[str]) -> dict[str, Score]:
        """One complete adapter (unstacked) on the own hold-outs of these clients."""
        found: dict[str, Score] = {}
        for start in range(0, len(names), self._chunk):
            part = names[start : start + self._chunk]
            held = [self._clients.find(name).holdout for name in part]
            stacked = broadcast(adapter, len(part))
            scores = score_clients(
                self._network, self._trainer.lane, stacked, held, self._population.examples
            )
            found.update(zip(part, scores, strict=True))
            self._population.release()
        return found

    def memory(self) -> Memory:
        """Private memory of all clients, as of now."""
        return dict(self._memory)

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Puts back what ``memory`` gave."""
        self._memory = {client: dict(kept) for client, kept in memory.items()}

    def _isolated(self, round: int, chunk: Messages, work: Work) -> Iterator[Any]:
        """Runs ``work`` on a chunk; if it fails, on each client alone.

        So one faulty client costs only itself.
        """
        try:
            yield self._on_cohort(round, chunk, work)
            return
        except Exception as error:
            if len(chunk) == 1:
                log.warning("client %s failed in round %d", chunk.clients[0], round, exc_info=error)
                yield Failure(chunk.clients[0], f"{type(error).__name__}: {error}")
                return
        for k in range(len(chunk)):
            yield from self._isolated(round, chunk.rows([k]), work)

    def _on_cohort(self, round: int, chunk: Messages, work: Work) -> Any:
        """``work`` on the chunk's cohort, rows in order of steps, most first, and back again."""
        data = [self._clients.find(name) for name in chunk.clients]
        steps = [steps_of(len(c.train), self._settings.local) for c in data]
        order = sorted(range(len(data)), key=lambda k: -steps[k])
        own = [data[k] for k in order]
        memory = {c.name: dict(self._memory.get(c.name, {})) for c in own}
        progress = Progress(round, self._settings.rounds.count)
        info = RoundInfo(progress, self._settings.seed)
        weights = self._weights(own)
        cohort = TorchCohort(self._network, self._trainer, own, info, weights, memory)
        with torch.random.fork_rng():
            torch.manual_seed(
                streams.derive(self._settings.seed, "dropout", round, chunk.clients[0])
            )
            found = work(chunk.rows(order).to(self._network.device), cohort)
        self._memory.update({name: kept for name, kept in memory.items() if kept})
        self._population.release()
        if not isinstance(found, Messages):
            return {name: found[name] for name in chunk.clients}
        back = sorted(range(len(order)), key=lambda i: order[i])
        return found.rows(back)

    def _train(self, messages: Messages, cohort: TorchCohort) -> Messages:
        set_mode(self._network.model, True, self._settings.local.base_dropout)
        return self._strategy.train(messages, cohort)

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
        adapters = self._strategy.personal(messages, cohort)
        scores = score_clients(self._network, self._trainer.lane, adapters, index, examples)
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


def client_weights(examples: list[int], rounds: Rounds) -> Tensor:
    """Aggregation weights ``[K]`` (float64) that the recipe gives clients of these sizes."""
    if rounds.weighting == "equal":
        return torch.ones(len(examples), dtype=torch.float64)
    return torch.tensor(examples, dtype=torch.float64)
