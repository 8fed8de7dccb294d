"""Clients that do not train: what a run sends, and how long that takes, can be had without.

They take part with the run's own strategy and codecs; in place of local training adapters move a
little at random, so that every reply has the length that it will have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fedpeft.cohort.clients import Memory
from fedpeft.cohort.federation import client_weights
from fedpeft.cohort.shelf import PREFIX, Shelf
from fedpeft.comms.densities import alike
from fedpeft.federation import Failure
from fedpeft.metrics import Score
from fedpeft.prepare import Prepared
from fedpeft.pruning.structure import Structure
from fedpeft.strategy import Adjust, Cohort, Expand, Fit, Messages, Route, Walk
from fedpeft.tree import Tree, row, stack

AT_ONCE = 64
"""Clients of one stack of replies."""


class Still:
    """The clients of a run, who do not train; see ``fedpeft.federation.Federation``."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._memory: Memory = {}
        self._shelf = Shelf()

    def clients(self) -> Mapping[str, int]:
        """Client -> number of training examples, sorted by name."""
        return self._prepared.population.clients.roster

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages]:
        """What the clients reply; those who are sent the like all reply like the first of them."""
        for sent in (part for one in stacks for part in alike(one)):
            reply = self.reply(round, sent)
            for part in sent.split(AT_ONCE):
                same = reply.rows([0] * len(part))
                sizes = [self.clients()[name] for name in part.clients]
                weight = client_weights(sizes, self._prepared.recipe.rounds)
                scalars = {**same.scalars, "weight": weight}
                yield dataclasses.replace(same, clients=part.clients, scalars=scalars)

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Nobody is measured."""
        yield from ()

    def memory(self) -> Memory:
        """What clients keep."""
        return self._memory

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """What clients keep is what ``memory`` gave, or another federation of the run."""
        self._shelf = Shelf.of(memory)
        self._memory = {
            client: {n: dict(t) for n, t in own.items() if not n.startswith(PREFIX)}
            for client, own in memory.items()
        }

    def reply(self, round: int, all_sent: Messages) -> Messages:
        """The first client's, one row; what it remembers and keeps, all do."""
        sent, own = all_sent.rows([0]), (self._memory, self._shelf)
        cohort = _Cohort(self._prepared, sent.clients, all_sent.clients, round, own)
        reply = self._prepared.strategy.train(sent, cohort)
        left = self._prepared.settings.leaving.leave(sent, reply, cohort)
        self._prepared.strategy.left(sent, left, cohort)
        kept = self._memory.get(sent.clients[0], {})
        for name in all_sent.clients if kept else ():
            self._memory[name] = dict(kept)
        return left


class _Cohort(Cohort):
    """Clients whose local training moves every number a little, at random."""

    def __init__(
        self,
        prepared: Prepared,
        clients: tuple[str, ...],
        keepers: tuple[str, ...],
        round: int,
        own: tuple[Memory, Shelf],
    ) -> None:
        self.clients = clients
        self.weights = torch.ones(len(clients), dtype=torch.float64)
        self.initial = prepared.network.initial
        self.lr = prepared.recipe.local.lr
        self.round = round
        self._keepers = keepers
        self._layers = prepared.network.scaling
        self._weight, self._structure = prepared.problem.weight, prepared.problem.structure
        self._memory, self._shelf = own
        self._draws = torch.Generator().manual_seed(round)

    def fit(
        self,
        start: Tree,
        *,
        fixed: Tree | None = None,
        adjust: Adjust | None = None,
        own: Mapping[str, Tree] | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
        steps: int | None = None,
    ) -> Fit:
        none = torch.zeros(len(self.clients))
        moved = {name: value + 1e-3 * self._noise(value) for name, value in start.items()}
        return Fit(moved, none, none.long() + 1)

    def walk(
        self,
        start: Tree,
        route: Route,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Walk:
        fit = self.fit(start)
        moves = self._noise(torch.zeros(route.seeds.shape))
        return Walk(fit.adapter, moves, fit.loss)

    def gradients(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
    ) -> Tree:
        return {name: self._noise(value) for name, value in at.items()}

    def losses(
        self,
        at: Tree,
        *,
        fixed: Tree | None = None,
        expand: Expand | None = None,
        base: Tree | None = None,
        most: int | None = None,
    ) -> Tensor:
        return torch.zeros(len(self.clients))

    def weight_gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        count = len(self.clients)
        return {
            layer: self._noise(self._weight(layer).expand(count, -1, -1)) for layer in self._layers
        }

    def structure(self) -> Structure:
        return self._structure()

    def pruned(self, alive: Tree) -> AbstractContextManager[None]:
        return nullcontext()

    def recall(self, name: str, default: Tree) -> Tree:
        kept = [self._memory.get(client, {}).get(name) for client in self.clients]
        if None in kept:
            return {key: value.clone() for key, value in default.items()}
        return stack([tree for tree in kept if tree is not None])

    def remember(self, name: str, value: Tree) -> None:
        for k, client in enumerate(self.clients):
            self._memory.setdefault(client, {})[name] = row(value, k)

    def keep(self, name: str, version: int, value: Tree) -> None:
        self._shelf.keep(self._keepers, name, version, value)

    def kept(self, name: str, since: int) -> tuple[int, Tree]:
        return self._shelf.kept(self.clients, name, since)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._draws, dtype=like.dtype)
