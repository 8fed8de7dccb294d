"""The seam to the world: a Federation names the clients and trains one round's messages.

Three implementations: ``CohortFederation`` (in process, clients batched or one after another),
``fedpeft.flower.FlowerFederation`` (Flower's simulation runtime or real SuperNodes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedpeft.metrics import Score
from fedpeft.strategy import Messages
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Failure:
    """A client that did not give a usable reply this round, and why."""

    client: str
    reason: str


class Federation(Protocol):
    """Who can take part, and how a round's messages get trained."""

    def clients(self) -> Mapping[str, int]:
        """Stable client names (never transport ids) -> number of training examples, sorted."""

    def run(self, round: int, messages: Messages) -> Iterator[Messages | Failure]:
        """Trains the clients of ``messages``; yields stacks of replies and failures.

        Stacks come in the order of ``messages.clients``; every client appears exactly once.
        """

    def evaluate(self, round: int, messages: Messages) -> Iterator[dict[str, Score] | Failure]:
        """Each client's score on its own hold-out, under the adapter it would use now."""

    def memory(self) -> dict[str, dict[str, Tree]]:
        """Private memory of all clients, client -> name -> tree, for a checkpoint."""

    def restore(self, memory: Mapping[str, Mapping[str, Tree]]) -> None:
        """Puts back what ``memory`` gave."""
