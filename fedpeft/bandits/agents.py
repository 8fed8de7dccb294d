"""One agent per client: what each is to play next, and what it learns when a round is over.

An agent exists from the first time that its client was there; everybody else is to play the middle
arm. All of it is plain data that a strategy's state can hold; draws come from streams named by
client and round, so that neither order nor engine nor resume changes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedpeft.bandits import linear
from fedpeft.bandits.arms import Arm, Rule, choose, grid, learn, middle, pick, tree
from fedpeft.bandits.costs import seconds
from fedpeft.bandits.rewards import Worth, away, fedmp, share, spine
from fedpeft.errors import FedpeftError
from fedpeft.streams import numpy_stream

LEVELS = (0.0, 1 / 3, 2 / 3, 1.0)
"""The pruning steps of a grid, as shares of the largest."""


Kind = Literal["grid", "tree", "linear", "random", "fixed"]
"""How a policy chooses; the last two learn nothing, to compare with."""


@dataclass(frozen=True)
class Agents:
    """tables: client -> its arms (``arms``), or its fit (``linear``). orders: client -> its arm."""

    tables: dict[str, Tensor] = field(default_factory=dict)
    orders: dict[str, tuple[int, float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What is known of a round's clients beside their times; tensors are float64 ``[m]``.

    fall: of the local loss, nats. progress: by how much the share of what is left to prune fell,
    over the largest step. importance: of what was trained. left: share of the prunable weights that
    they still have; at ``goal`` they have nothing left to prune. seconds: by the cost model.
    """

    clients: tuple[str, ...]
    fall: Tensor
    progress: Tensor
    importance: Tensor
    left: Tensor
    seconds: Tensor
    goal: float = 0.0


def seen_of_ranks(falls: Mapping[str, float], numbers: Tensor, seed: int) -> Seen:
    """What is seen of clients that choose a rank alone: client -> fall of its loss.

    numbers: how many each sends, ``[K]``; the cost model's time is that of both ways, in float32.
    """
    return seen_of_bytes(falls, 8 * numbers, seed)


def seen_of_bytes(falls: Mapping[str, float], sizes: Tensor, seed: int) -> Seen:
    """What is seen of clients that prune nothing; sizes: bytes both ways, ``[K]``."""
    none, names = torch.zeros(len(falls), dtype=torch.float64), tuple(falls)
    fall = torch.tensor(list(falls.values()), dtype=torch.float64)
    times = seconds(names, seed, none, sizes.double())
    return Seen(names, fall, none, none, none + 1, times, goal=1.0)


@dataclass(frozen=True)
class Policy:
    """How arms are chosen.

    kind: S-UCB on a ``grid`` of arms or a ``tree`` of cells, the ``linear`` model of times, any arm
    of the grid at ``random``, or always the ``fixed`` one: u = 1 and the middle rank.
    ranks: what v chooses among. levels: the grid's u. step: share that u = 1 prunes of what is
    left. reward: ``spine`` or ``fedmp``; the linear policy has its own.
    """

    kind: Kind
    ranks: tuple[int, ...]
    levels: tuple[float, ...] = LEVELS
    step: float = 0.1
    reward: str = "spine"
    rule: Rule = field(default_factory=Rule)
    worth: Worth = field(default_factory=Worth)

    def __post_init__(self) -> None:
        if self.reward not in ("spine", "fedmp"):
            raise FedpeftError(
                f"bandit: reward={self.reward!r} does not exist: it is 'spine' or 'fedmp'."
            )

    def start(self) -> Tensor:
        """The arms before anything was learned."""
        if self.kind == "fixed":
            return grid((1.0,), 1)
        return tree() if self.kind == "tree" else grid(self.levels, len(self.ranks))

    def order(self, agents: Agents, client: str) -> Arm:
        """What a client is to play; without importances nothing can be pruned, so u = 0 at first.

        A client that is there for the first time plays the middle arm.
        """
        own = agents.orders.get(client)
        return middle(self.start(), still=True) if own is None else Arm(*own)

    def credit(
        self, agents: Agents, seen: Seen, times: Mapping[str, float], draws: tuple[int, int]
    ) -> Agents:
        """The agents after a round: each has learned, and has chosen its next arm.

        times: client -> seconds, of those of ``seen``; the cost model's where one is missing.
        draws: the run's seed and the number of the round.
        """
        own = seen.seconds.tolist()
        seconds = [times.get(c, own[k]) for k, c in enumerate(seen.clients)]
        rewards = self._rewards(seen, torch.tensor(seconds, dtype=torch.float64)).tolist()
        mean = sum(seconds) / len(seconds)
        tables, orders = dict(agents.tables), dict(agents.orders)
        for k, client in enumerate(seen.clients):
            arm, left = self.order(agents, client), float(seen.left[k])
            still = left <= seen.goal + 1e-9
            if self.kind == "linear":
                fit = tables.get(client, linear.nothing())
                cost = torch.tensor([left, left * self._rank_share(arm.v)], dtype=torch.float64)
                tables[client] = linear.observe(fit, cost, seconds[k])
                choice = linear.best(
                    tables[client], self._costs(left), self.start(), self.ranks, mean, still
                )
            else:
                table = tables.get(client, self.start())
                tables[client] = learn(table, self.rule, arm, rewards[k])
                draw = numpy_stream(draws[0], "bandit", client, draws[1])
                known = self.start() if self.kind == "random" else tables[client]
                choice = choose(known, self.rule, draw, still)
            orders[client] = (choice.cell, choice.u, choice.v)
        return Agents(tables, orders)

    def _rewards(self, seen: Seen, times: Tensor) -> Tensor:
        if self.reward == "fedmp":
            return fedmp(times, seen.fall)
        gains, done = share(seen.fall), seen.left <= seen.goal + 1e-9
        return spine(away(times), gains, seen.progress, share(seen.importance), done, self.worth)

    def _rank_share(self, v: float) -> float:
        return pick(self.ranks, v) / max(self.ranks)

    def _costs(self, left: float) -> Tensor:
        """Work and bytes ``[M, 2]`` of the grid's arms for a client that has so much left."""
        table = self.start()
        after = left * (1 - self.step * table[:, 0])
        ranks = torch.tensor([self._rank_share(v) for v in table[:, 2].tolist()]).double()
        return torch.stack([after, after * ranks], dim=1)


@dataclass(frozen=True)
class Bandits:
    """The agents of a run, as a strategy's state holds them.

    before, seen: the last round's agents as they were before it, and what was seen in it, so that
    times may still take the place of the cost model's. round: how many there were.
    """

    seed: int
    agents: Agents = field(default_factory=Agents)
    before: Agents = field(default_factory=Agents)
    seen: Seen = field(default_factory=lambda: _nobody())
    round: int = 0

    def orders(self, policy: Policy, clients: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What clients are to do next: the share of what is left to prune, and a rank; ``[K]``."""
        arms = [policy.order(self.agents, client) for client in clients]
        steps = torch.tensor([policy.step * arm.u for arm in arms], dtype=torch.float64)
        return steps, torch.tensor([pick(policy.ranks, arm.v) for arm in arms])

    def closed(self, policy: Policy, seen: Seen) -> Bandits:
        """After a round, with the cost model's times."""
        own = set(seen.clients)
        tables = {c: t for c, t in self.agents.tables.items() if c in own}
        orders = {c: t for c, t in self.agents.orders.items() if c in own}
        before = Agents(tables, orders)
        return Bandits(self.seed, self.agents, before, seen, self.round + 1).timed(policy, {})

    def timed(self, policy: Policy, times: Mapping[str, float]) -> Bandits:
        """After a round, with these times (client -> seconds) where they are known."""
        if not self.seen.clients:
            return self
        new = policy.credit(self.before, self.seen, times, (self.seed, self.round))
        tables, orders = self.agents.tables | new.tables, self.agents.orders | new.orders
        return replace(self, agents=Agents(tables, orders))


def _nobody() -> Seen:
    none = torch.zeros(0, dtype=torch.float64)
    return Seen((), none, none, none, none, none)
