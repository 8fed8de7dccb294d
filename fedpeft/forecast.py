"""What a run will send, before it is run: its rounds with clients that do not train.

The run's own strategy, codecs and secure sums play every round, with the clients and dropouts that
the seed draws; only local training is left out, in whose place adapters move a little at random. So
every message has the length that it will have, unless lengths depend on what is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.codecs.settings import varies
from fedpeft.cohort.clients import Memory
from fedpeft.cohort.federation import client_weights
from fedpeft.cohort.shelf import Shelf
from fedpeft.comms.ledger import Bytes, Ledger
from fedpeft.defence import Attackers, RobustRule
from fedpeft.engine import Seam, play_round
from fedpeft.errors import QuorumError
from fedpeft.federation import Failure
from fedpeft.metrics import Score
from fedpeft.postprocess import Chain
from fedpeft.prepare import Prepared
from fedpeft.strategy import Adjust, Cohort, Expand, Fit, Messages
from fedpeft.tree import Tree, row, stack

AT_ONCE = 64
"""Clients of one stack of replies."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of all messages of a run.

    down, up: by kind. rounds: both ways, round by round. exact: whether lengths are certain; else
    they depend on what clients learn, or on secret draws of who takes part, and are typical.
    """

    down: Bytes
    up: Bytes
    rounds: tuple[int, ...]
    exact: bool


def forecast(prepared: Prepared) -> Forecast:
    """The bytes of the run's rounds; a round without quorum ends them."""
    own = dataclasses.replace(prepared)  # nothing of what the run itself will remember
    recipe, strategy = own.recipe, own.strategy
    links = [x for x in own.post.links if not isinstance(x, RobustRule | Attackers)]
    seam, federation = Seam(Chain(tuple(links))), own.secured(_Still(own))
    ledger, each, state = Ledger(), list[int](), strategy.init(own.problem)
    for number in range(1, recipe.rounds.count + 1):
        try:
            state, report = play_round(
                strategy, state, federation, recipe.rounds, recipe.seed, number, seam
            )
        except QuorumError:
            break
        ledger.add(report.down, report.up)
        each.append(sum(report.down.values()) + sum(report.up.values()))
    return Forecast(ledger.down, ledger.up, tuple(each), _exact(own))


def _exact(prepared: Prepared) -> bool:
    recipe, terms = prepared.recipe, prepared.terms
    secret = terms is not None and terms.sampled == "poisson"
    masked = recipe.secure_aggregation.enabled and recipe.engine.kind == "flower"
    return not (secret or masked or varies(recipe.comms.up) or varies(recipe.comms.down))


class _Still:
    """The clients of a run, who do not train; see ``fedpeft.federation.Federation``."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._memory: Memory = {}
        self._shelf = Shelf()

    def clients(self) -> Mapping[str, int]:
        """Client -> number of training examples, sorted by name."""
        return self._prepared.population.clients.roster

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages]:
        """What the clients reply; those of a stack all reply like the first of them."""
        for stack in stacks:
            reply = self._reply(round, stack.rows([0]))
            for part in stack.split(AT_ONCE):
                same = reply.rows([0] * len(part))
                sizes = [self.clients()[name] for name in part.clients]
                weight = client_weights(sizes, self._prepared.recipe.rounds)
                scalars = {**same.scalars, "weight": weight}
                yield dataclasses.replace(same, clients=part.clients, scalars=scalars)
            for name in stack.clients:
                self._memory[name] = dict(self._memory.get(stack.clients[0], {}))

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Nobody is measured."""
        yield from ()

    def memory(self) -> Memory:
        """What clients keep."""
        return self._memory

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Clients begin with nothing."""

    def _reply(self, round: int, sent: Messages) -> Messages:
        cohort = _Cohort(self._prepared, sent.clients, round, (self._memory, self._shelf))
        trained = self._prepared.strategy.train(sent, cohort)
        reply = self._prepared.settings.leaving.leave(sent, trained, cohort)
        self._prepared.strategy.left(sent, reply, cohort)
        return reply


class _Cohort(Cohort):
    """Clients whose local training moves every number a little, at random."""

    def __init__(
        self,
        prepared: Prepared,
        clients: tuple[str, ...],
        round: int,
        own: tuple[Memory, Shelf],
    ) -> None:
        self.clients = clients
        self.weights = torch.ones(len(clients), dtype=torch.float64)
        self.initial = prepared.network.initial
        self.lr = prepared.recipe.local.lr
        self.round = round
        self._layers = prepared.network.scaling
        self._weight = prepared.problem.weight
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
    ) -> Tensor:
        return torch.zeros(len(self.clients))

    def weight_gradients(self, at: Tree, *, fixed: Tree | None = None) -> Tree:
        count = len(self.clients)
        return {
            layer: self._noise(self._weight(layer).expand(count, -1, -1)) for layer in self._layers
        }

    def recall(self, name: str, default: Tree) -> Tree:
        kept = [self._memory.get(client, {}).get(name) for client in self.clients]
        if None in kept:
            return {key: value.clone() for key, value in default.items()}
        return stack([tree for tree in kept if tree is not None])

    def remember(self, name: str, value: Tree) -> None:
        for k, client in enumerate(self.clients):
            self._memory.setdefault(client, {})[name] = row(value, k)

    def keep(self, name: str, version: int, value: Tree) -> None:
        self._shelf.keep(self.clients, name, version, value)

    def kept(self, name: str, since: int) -> tuple[int, Tree]:
        return self._shelf.kept(self.clients, name, since)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._draws, dtype=like.dtype)
