"""The seam to the world: a Federation names the clients and trains one round's messages.

Three implementations: ``CohortFederation`` (in process, clients batched or one after another),
``fedpeft.workers.WorkersFederation`` (the same in several processes, one per GPU) and
``fedpeft.flower.FlowerFederation`` (Flower's simulation runtime or real SuperNodes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedpeft.comms.ledger import Entry
from fedpeft.metrics import Score
from fedpeft.strategy import Messages
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Failure:
    """A client that did not give a usable reply this round, and why."""

    client: str
    reason: str


@dataclass(frozen=True)
class Partial:
    """The replies of several clients to a linear strategy, checked and averaged by weight.

    replies: one row that stands for all of them, as ``fedpeft.intake.average`` makes it; no row
    where none was valid. clients: how many it stands for. up: what was delivered, refused replies
    included. excluded: client -> why its training failed or its reply was refused. zeros: of those
    that it stands for, the ones whose update is zero.
    """

    replies: Messages
    clients: int
    up: tuple[Entry, ...]
    excluded: Mapping[str, str]
    zeros: tuple[str, ...] = ()


class Federation(Protocol):
    """Who can take part, and how a round's messages get trained."""

    def clients(self) -> Mapping[str, int]:
        """Stable client names (never transport ids) -> number of training examples, sorted."""

    def run(self, round: int, *stacks: Messages) -> Iterator[Messages | Failure | Partial]:
        """Trains the clients of all stacks; yields stacks of replies and failures.

        Within a stack messages are alike in names and shapes. Every client appears exactly once, in
        an order that the messages alone decide: that of the stacks and their clients, or shard by
        shard. For a linear strategy a shard's replies may come as one Partial.
        """

    def evaluate(self, round: int, *stacks: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Each client's score on its own hold-out, under the adapter it would use now."""

    def memory(self) -> dict[str, dict[str, Tree]]:
        """What all clients keep, client -> name -> tree, for a checkpoint."""

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Puts back what ``memory`` gave."""
