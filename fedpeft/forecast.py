"""What a run will send, before it is run: its rounds with clients that do not train.

The run's own strategy, codecs and secure sums play every round, with the clients and dropouts that
the seed draws; only local training is left out, in whose place adapters move a little at random. So
every message has the length that it will have, unless lengths depend on what is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.codecs.settings import varies
from fedpeft.cohort.clients import Memory
from fedpeft.cohort.federation import client_weights
from fedpeft.cohort.shelf import Shelf
from fedpeft.comms.ledger import Bytes, Ledger
from fedpeft.config_comms import budget_of
from fedpeft.defence import Attackers, RobustRule
from fedpeft.engine import AbortedRoundError, Seam, play_round
from fedpeft.errors import FedpeftError
from fedpeft.federation import Failure
from fedpeft.metrics import Score
from fedpeft.postprocess import Chain
from fedpeft.prepare import Prepared
from fedpeft.pruning.structure import Structure
from fedpeft.strategy import Adjust, Cohort, Expand, Fit, Messages, Route, Walk
from fedpeft.tree import Tree, row, stack

AT_ONCE = 64
"""Clients of one stack of replies."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of all messages of a run.

    down, up: by kind. rounds: both ways, round by round. requests, replies: how many messages.
    dense: what so many messages with all trainable numbers as float32 would take, without names.
    exact: whether lengths are certain; else they depend on what clients learn, or on secret draws
    of who takes part, and are typical.
    """

    down: Bytes
    up: Bytes
    rounds: tuple[int, ...]
    requests: int
    replies: int
    dense: int
    exact: bool


class BytesSpentError(FedpeftError):
    """The next round would go beyond ``comms.budget``."""


@dataclass(frozen=True)
class Purse:
    """The bytes that a run may send: ``comms.budget``, and what each round will take of it."""

    budget: int
    rounds: tuple[int, ...]

    @staticmethod
    def of(prepared: Prepared) -> Purse | None:
        """None without a budget. Raises BytesSpentError where it does not pay for one round."""
        budget = budget_of(prepared.recipe.comms)
        if not budget:
            return None
        purse = Purse(budget, forecast(prepared).rounds)
        purse.check(1, 0)
        return purse

    def check(self, number: int, spent: int) -> None:
        """Raises BytesSpentError where round ``number`` does not fit in what is left."""
        need = self.rounds[min(number, len(self.rounds)) - 1] if self.rounds else 0
        if spent + need > self.budget:
            raise BytesSpentError(
                f"round {number}: it would send {need:,} bytes, and {self.budget - spent:,} of "
                f"comms.budget are left. "
                + (
                    "The adapter of the last round is kept."
                    if number > 1
                    else "Raise comms.budget, sample fewer clients, or set comms.up.codec and "
                    "comms.down.codec."
                )
            )


def forecast(prepared: Prepared) -> Forecast:
    """The bytes of the run's rounds; those that the quorum stops are not among them."""
    own = dataclasses.replace(prepared)  # nothing of what the run itself will remember
    recipe, strategy = own.recipe, own.strategy
    links = [x for x in own.post.links if not isinstance(x, RobustRule | Attackers)]
    seam, federation = Seam(Chain(tuple(links))), own.secured(_Still(own))
    ledger, each, state = Ledger(), list[int](), strategy.init(own.problem)
    requests = replies = short = 0
    for number in range(1, recipe.rounds.count + 1):
        try:
            state, report = play_round(
                strategy, state, federation, recipe.rounds, recipe.seed, number, seam
            )
            short = 0
        except AbortedRoundError as error:
            report, short = error.report, short + 1
            if short > recipe.rounds.aborts:
                break
        ledger.add(report.down, report.up)
        each.append(sum(report.down.values()) + sum(report.up.values()))
        requests += sum(len(entry.clients) for entry in report.sent)
        replies += sum(len(entry.clients) for entry in report.came)
    dense = 4 * own.network.layout.size * (requests + replies)
    books = (ledger.down, ledger.up, tuple(each), requests, replies)
    return Forecast(*books, dense, _exact(own))


def _exact(prepared: Prepared) -> bool:
    recipe, terms = prepared.recipe, prepared.terms
    secret = terms is not None and terms.sampled == "poisson"
    masked = recipe.secure_aggregation.enabled and recipe.engine.kind == "flower"
    learned = "pruned" in prepared.strategy.asks()
    return not (learned or secret or masked or varies(recipe.comms.up) or varies(recipe.comms.down))


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
        for sent in stacks:
            reply = self._reply(round, sent)
            for part in sent.split(AT_ONCE):
                same = reply.rows([0] * len(part))
                sizes = [self.clients()[name] for name in part.clients]
                weight = client_weights(sizes, self._prepared.recipe.rounds)
                scalars = {**same.scalars, "weight": weight}
                yield dataclasses.replace(same, clients=part.clients, scalars=scalars)
            for name in sent.clients:
                self._memory[name] = dict(self._memory.get(sent.clients[0], {}))

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Nobody is measured."""
        yield from ()

    def memory(self) -> Memory:
        """What clients keep."""
        return self._memory

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Clients begin with nothing."""

    def _reply(self, round: int, all_sent: Messages) -> Messages:
        """The first client's; what it is given to keep is kept by all."""
        sent, own = all_sent.rows([0]), (self._memory, self._shelf)
        cohort = _Cohort(self._prepared, sent.clients, all_sent.clients, round, own)
        reply = self._prepared.strategy.train(sent, cohort)
        left = self._prepared.settings.leaving.leave(sent, reply, cohort)
        self._prepared.strategy.left(sent, left, cohort)
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
