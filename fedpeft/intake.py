"""Replies on their way into an aggregate: checked, counted and, for linear strategies, averaged.

The round loop takes them in here; so does a worker that answers for many clients at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from fedpeft.comms.ledger import Entry, entries
from fedpeft.errors import ReplyError
from fedpeft.federation import Failure, Partial
from fedpeft.strategy import Messages, Replies
from fedpeft.tree import RunningMean, Tree
from fedpeft.validate import check_stack


@dataclass
class Intake:
    """Checks replies as they stream into ``receive``, and keeps the round's books.

    like: client -> the trees that its reply must hold, unstacked. weights: client -> its
    registered weight.
    excluded: as in RoundReport. entries: what was delivered. replied: clients whose replies were
    valid. loss_sum, weight_sum: of their losses times weights, and of the weights of those that
    told a loss.
    """

    like: Mapping[str, Mapping[str, Tree]]
    weights: Mapping[str, float]
    excluded: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    replied: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0

    def stream(self, replies: Iterable[Messages | Failure | Partial]) -> Iterator[Messages]:
        """The valid replies, stack by stack; a Partial was checked where it was made."""
        for reply in self._alike(replies):
            if isinstance(reply, Failure):
                self.excluded[reply.client] = reply.reason
                continue
            if isinstance(reply, Partial):
                good, clients, came = reply.replies, reply.clients, reply.up
                self.excluded.update(reply.excluded)
            else:
                came = tuple(entries(reply))
                like = self.like.get(reply.clients[0]) or next(iter(self.like.values()))
                good, reasons = check_stack(reply, like, self.weights)
                clients = len(good)
                self.excluded.update(reasons)
            self.entries.extend(came)
            if len(good):
                self._count(good, clients)
                yield good

    def _alike(
        self, replies: Iterable[Messages | Failure | Partial]
    ) -> Iterator[Messages | Failure | Partial]:
        """The replies, stacks cut where clients follow of which other trees are expected."""
        for reply in replies:
            if not isinstance(reply, Messages):
                yield reply
                continue
            for _, part in itertools.groupby(
                range(len(reply)), key=lambda k: id(self.like.get(reply.clients[k]))
            ):
                at = list(part)
                yield reply if len(at) == len(reply) else reply.rows(at)

    def _count(self, good: Messages, clients: int) -> None:
        self.replied += clients
        weight = good.scalars["weight"]
        if "loss" in good.scalars:
            self.weight_sum += float(weight.sum())
            self.loss_sum += float((weight * good.scalars["loss"]).sum())

    def partial(self, replies: Iterable[Messages | Failure], name: str) -> Partial:
        """All of ``replies``, taken in and averaged into one row called ``name``."""
        mean = average(self.stream(replies), name)
        return Partial(mean, self.replied, tuple(self.entries), self.excluded)


def average(replies: Replies, name: str) -> Messages:
    """One row, called ``name``, that a linear strategy may read in place of ``replies``.

    Its scalar ``weight`` is their total weight; trees and all other scalars are means by weight,
    summed in float64 and cast once. No row where there are no replies. Raises ReplyError for blobs,
    which have no mean, and ValueError where stacks differ in what they hold.
    """
    trees: dict[str, RunningMean] = {}
    scalars = RunningMean()
    total = 0.0
    blobs: set[str] = set()
    for stack in replies:
        weight = stack.scalars["weight"]
        total += float(weight.sum())
        blobs |= stack.blobs.keys()
        scalars.add({n: v for n, v in stack.scalars.items() if n != "weight"}, weight)
        for part, own in stack.trees.items():
            trees.setdefault(part, RunningMean()).add(own, weight)
    if blobs:
        raise ReplyError(
            f"replies hold the blob {min(blobs)!r}, which has no mean: a strategy that is declared "
            f"linear replies with trees and scalars only; take its linear=True away."
        )
    if not total > 0:
        return Messages(())
    return Messages(
        (name,),
        {part: _as_row(mean.result()) for part, mean in trees.items()},
        {"weight": torch.tensor([total], dtype=torch.float64), **_as_row(scalars.result())},
    )


def _as_row(tree: Tree) -> Tree:
    return {name: value.unsqueeze(0) for name, value in tree.items()}
