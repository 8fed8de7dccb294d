"""Centralised: one model on the union of all clients' data (baseline that federation cannot have).

Baseline, not a paper's algorithm: w <- argmin F(w) over the pooled examples, by the same local
training as a client's. The pool is the only client; as in every strategy the optimizer starts
afresh each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree


@dataclass(frozen=True)
class State:
    """The adapter."""

    adapter: Tree


@dataclass(frozen=True)
class Centralised(Strategy[State]):
    """The mean over the one pooled client is that client's adapter."""

    pools: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def init(self, problem: Problem) -> State:
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State(weighted_mean(replies, "adapter"))

    def adapter(self, state: State) -> Tree:
        return state.adapter
