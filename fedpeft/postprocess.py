"""The seam for what is not the algorithm: clip and noise, secure sums, robust rules, attacks.

A postprocessor acts in two places: on the message that leaves a client, and on the replies before
they enter the strategy's ``receive``. Clients apply a chain in its order, the server in the
opposite one.

An *update* is a reply as a difference: each tensor minus what the client was sent under the same
tree and name; where nothing like it was sent, the tensor itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedpeft.message import Messages, Replies
from fedpeft.tree import Tree, shared


class Kept(Protocol):
    """What clients have at hand when their messages leave: a ``Cohort``'s private memory.

    round: counts from 1.
    """

    @property
    def round(self) -> int:
        """The round that is being played."""

    def recall(self, name: str, default: Tree) -> Tree:
        """See ``Cohort.recall``."""

    def remember(self, name: str, value: Tree) -> None:
        """See ``Cohort.remember``."""


class Postprocessor:
    """One transform at the seam. By default it changes nothing, and remembers nothing.

    individual: it must see each client's reply in ``enter``; else means over clients will do.
    always: ``enter`` gives a reply even where no client did. tells: scalars that it reads in
    replies. remembers: clients keep something of
    it between rounds.
    """

    individual: bool = False
    always: bool = False
    tells: tuple[str, ...] = ()
    remembers: bool = False

    def announce(self, sent: Messages) -> Messages:
        """On the server: the messages with what clients must know, before they are sent."""
        return sent

    def leave(self, sent: Messages, reply: Messages, kept: Kept) -> Messages:
        """On the clients: what goes out in place of ``reply``."""
        return reply

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Replies:
        """On the server: what the strategy receives in place of the valid ``replies``.

        sent: all that was sent in the exchange, one stack per group. like: the trees of a reply to
        the first of them, unstacked, as to names, shapes and dtypes.
        """
        return replies

    def arrived(self, clients: Sequence[str]) -> None:
        """On the server: the exchange is over, and these clients' replies to it were valid."""

    def told(self, times: Mapping[str, float]) -> None:
        """On the server, after a round that waited: how long they took, see ``Strategy.told``."""

    def memory(self) -> dict[str, Tree]:
        """What the server half must keep from round to round, for a checkpoint."""
        return {}

    def restore(self, memory: Mapping[str, Tree]) -> None:
        """Puts back what ``memory`` gave."""


@dataclass(frozen=True)
class Chain(Postprocessor):
    """Several, in the order in which clients apply them. Those that remember keep apart by type."""

    links: tuple[Postprocessor, ...] = ()

    @property
    def individual(self) -> bool:  # type: ignore[override]
        return any(link.individual for link in self.links)

    @property
    def always(self) -> bool:  # type: ignore[override]
        return any(link.always for link in self.links)

    @property
    def tells(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for link in self.links for name in link.tells)

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return any(link.remembers for link in self.links)

    def announce(self, sent: Messages) -> Messages:
        for link in self.links:
            sent = link.announce(sent)
        return sent

    def leave(self, sent: Messages, reply: Messages, kept: Kept) -> Messages:
        for link in self.links:
            reply = link.leave(sent, reply, kept)
        return reply

    def enter(
        self, sent: Sequence[Messages], like: Mapping[str, Tree], replies: Replies
    ) -> Replies:
        for link in reversed(self.links):
            replies = link.enter(sent, like, replies)
        return replies

    def arrived(self, clients: Sequence[str]) -> None:
        for link in self.links:
            link.arrived(clients)

    def told(self, times: Mapping[str, float]) -> None:
        for link in self.links:
            link.told(times)

    def memory(self) -> dict[str, Tree]:
        return {
            f"{type(link).__name__}.{name}": tree
            for link in self.links
            for name, tree in link.memory().items()
        }

    def restore(self, memory: Mapping[str, Tree]) -> None:
        for link in self.links:
            prefix = f"{type(link).__name__}."
            own = {n.removeprefix(prefix): t for n, t in memory.items() if n.startswith(prefix)}
            link.restore(own)


NOTHING = Chain()


def updates(sent: Messages, reply: Messages) -> dict[str, Tree]:
    """The replies' trees as updates, float64, stacked."""
    return {
        part: {
            name: value.double() - _was(sent, part, name, value.shape[1:]).to(value.device)
            for name, value in tree.items()
        }
        for part, tree in reply.trees.items()
    }


def norms(sent: Messages, reply: Messages) -> Tensor:
    """The Euclidean norm of each reply's update, float64 ``[K]``; one tensor at a time."""
    total: Tensor | float = 0.0
    for part, tree in reply.trees.items():
        for name, value in tree.items():
            was = _was(sent, part, name, value.shape[1:]).to(value.device, torch.float32)
            moved = (value.float() - was).reshape(len(reply), -1)
            total = total + torch.linalg.vector_norm(moved, dim=1).double().square()
    return torch.as_tensor(total, dtype=torch.float64).sqrt().cpu().expand(len(reply))


def applied(sent: Messages, moved: Mapping[str, Tree]) -> dict[str, Tree]:
    """Trees from updates (stacked, as many rows as ``sent``, or one): ``updates`` undone."""
    return {
        part: {
            name: value + _was(sent, part, name, value.shape[1:]).to(value.device)
            for name, value in tree.items()
        }
        for part, tree in moved.items()
    }


def flat(trees: Mapping[str, Tree]) -> Tree:
    """Several trees as one, each name behind its tree's."""
    return {f"{part}/{name}": value for part, tree in trees.items() for name, value in tree.items()}


def unflat(flat_: Tree, like: Mapping[str, Tree]) -> dict[str, Tree]:
    """The opposite of ``flat``."""
    return {part: {name: flat_[f"{part}/{name}"] for name in tree} for part, tree in like.items()}


def _was(sent: Messages, part: str, name: str, shape: Sequence[int]) -> Tensor:
    """What was sent under a name, float64: as rows, one row if all are alike, or zero."""
    found = sent.trees.get(part, {}).get(name)
    if found is None or found.shape[1:] != torch.Size(shape):
        return torch.zeros((), dtype=torch.float64)
    return (found[:1] if shared(found) else found).double()
