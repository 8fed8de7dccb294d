"""FedSA-LoRA: all clients share A of LoRA; every client keeps its own B and head.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025
(arXiv 2410.01463): client k trains A and B_k, sends A_k only, and uses W_k = W_0 + s B_k A with
A <- sum_k p_k A_k. It is measured by every client's own model on that client's data.

Noise on A alone is not differential privacy: A's gradient depends on B_k, which private examples
have moved. All that is trained must be clipped and noised together, what stays at home included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.lowrank import is_a, lora_pairs
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree, broadcast, select, sort


@dataclass(frozen=True)
class State:
    """The shared A, and everything else as it was before round 1."""

    shared: Tree
    initial: Tree


@dataclass(frozen=True)
class FedSALoRA(Strategy[State]):
    """A <- sum_k p_k A_k; B_k and heads stay in the clients' private memory."""

    remembers: ClassVar[bool] = True
    shares: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fedsa_lora")
        return State(select(problem.initial, is_a), _kept(problem.initial))

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"shared": state.shared})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(self.personal(messages, cohort))
        cohort.remember("own", _kept(fit.adapter))
        shared = select(fit.adapter, is_a)
        return messages.reply({"shared": shared}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State(weighted_mean(replies, "shared"), state.initial)

    def adapter(self, state: State) -> Tree:
        return sort({**state.shared, **state.initial})

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        shared = messages.trees["shared"]
        device = next(iter(shared.values())).device
        initial = {name: x.to(device) for name, x in _kept(cohort.initial).items()}
        return sort({**shared, **cohort.recall("own", broadcast(initial, len(messages)))})


def _kept(adapter: Tree) -> Tree:
    """All that a client keeps to itself: B and heads."""
    return select(adapter, lambda name: not is_a(name))
