"""Local only: every client trains alone and keeps its adapter (baseline without federation).

Baseline, not a paper's algorithm: w_k <- argmin F_k(w) by local training, round after round from
where client k stopped, and from the initial adapter in its first round. No tensor is sent either
way; the server hears each client's weight and training loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy
from fedpeft.tree import Tree, broadcast


@dataclass(frozen=True)
class State:
    """The initial adapter, which no round changes."""

    adapter: Tree


@dataclass(frozen=True)
class Local(Strategy[State]):
    """w_k stays in client k's private memory; the global adapter is the initial one."""

    remembers: ClassVar[bool] = True
    shares: ClassVar[bool] = False

    def init(self, problem: Problem) -> State:
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(self.personal(messages, cohort))
        cohort.remember("adapter", fit.adapter)
        return messages.reply({}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return state

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return cohort.recall("adapter", broadcast(cohort.initial, len(messages)))
