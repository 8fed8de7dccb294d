"""Replies on their way into an aggregate: checked, counted and, for linear strategies, averaged.

The round loop takes them in here; so does a worker that answers for many clients at once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedpeft.comms.ledger import Entry, entries
from fedpeft.errors import ReplyError
from fedpeft.federation import Failure, Partial
from fedpeft.postprocess import norms
from fedpeft.strategy import Messages, Replies
from fedpeft.tree import RunningMean, Tree, shared
from fedpeft.validate import LOSS, check_stack


@dataclass
class Intake:
    """Checks replies as they stream into ``receive``, and keeps the round's books.

    like: client -> the trees that its reply must hold, unstacked. weights: client -> its
    registered weight. tells: scalars that a reply must have. sent: what the clients were sent.
    reject_norm: replies whose update is longer are refused (0: none are). most: so are those of
    more bytes.
    excluded: as in RoundReport. entries: what was delivered. replied: clients whose replies were
    valid. zeros: those whose update is zero. loss_sum, weight_sum: of their losses times weights,
    and of the weights of those that told a finite loss.
    """

    like: Mapping[str, Mapping[str, Tree]]
    weights: Mapping[str, float]
    tells: Sequence[str] = ("weight",)
    sent: Sequence[Messages] = ()
    reject_norm: float = 0.0
    most: float = math.inf
    excluded: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    replied: int = 0
    zeros: list[str] = field(default_factory=list)
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
                self.zeros.extend(reply.zeros)
            else:
                came = tuple(entries(reply))
                like = self.like.get(reply.clients[0]) or next(iter(self.like.values()))
                light = self._light(reply, came)
                good, reasons = check_stack(light, like, self.weights, self.tells)
                good = self._measured(good)
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

    def _light(self, replies: Messages, came: Iterable[Entry]) -> Messages:
        """Those of the replies that are not too large."""
        sizes = [(entry.clients, sum(entry.each.values())) for entry in came]
        large = {name: size for names, size in sizes if size > self.most for name in names}
        for client, size in large.items():
            why = f"its reply has {size} bytes, above the {self.most} of rounds.max_reply"
            self.excluded[client] = why
        kept = [k for k, client in enumerate(replies.clients) if client not in large]
        return replies if not large else replies.rows(kept)

    def _measured(self, replies: Messages) -> Messages:
        """Those of the replies (of one stack of requests) whose updates are not too long."""
        rows = self._rows(replies.clients)
        if rows is None or not replies.trees:
            return replies
        found = norms(rows, replies).tolist()
        longest = self.reject_norm or math.inf
        for client, norm in zip(replies.clients, found, strict=True):
            if norm > longest:
                self.excluded[client] = (
                    f"its update has norm {norm:.4g}, above rounds.reject_norm={longest:g}"
                )
            elif norm == 0:
                self.zeros.append(client)
        kept = [k for k, norm in enumerate(found) if norm <= longest]
        return replies if len(kept) == len(replies) else replies.rows(kept)

    def _rows(self, clients: Sequence[str]) -> Messages | None:
        """What these clients were sent; None where that is not known."""
        if not clients or clients[0] not in self._place:
            return None
        number, _ = self._place[clients[0]]
        stack, at = self.sent[number], [self._place[name][1] for name in clients]
        same = all(shared(x) for tree in stack.trees.values() for x in tree.values())
        return stack.rows([at[0]]) if same else stack.rows(at)

    @functools.cached_property
    def _place(self) -> dict[str, tuple[int, int]]:
        """Client -> which stack it was sent, and its row there."""
        return {c: (n, k) for n, one in enumerate(self.sent) for k, c in enumerate(one.clients)}

    def _count(self, good: Messages, clients: int) -> None:
        self.replied += clients
        weight = good.scalars["weight"]
        if LOSS in good.scalars:
            told = good.scalars[LOSS].isfinite()
            self.weight_sum += float(weight[told].sum())
            self.loss_sum += float((weight * good.scalars[LOSS])[told].sum())

    def partial(self, replies: Iterable[Messages | Failure], name: str) -> Partial:
        """All of ``replies``, taken in and averaged into one row called ``name``."""
        mean = average(self.stream(replies), name)
        up, zeros = tuple(self.entries), tuple(self.zeros)
        return Partial(mean, self.replied, up, self.excluded, zeros)


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
