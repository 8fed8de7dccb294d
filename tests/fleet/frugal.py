"""FedAvg in which client c0 does less, and the server notes how long clients took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedpeft.strategy import (
    Cohort,
    Effort,
    Messages,
    Problem,
    Replies,
    Strategy,
    weighted_mean,
)
from fedpeft.tree import Tree


@dataclass(frozen=True)
class State:
    """The global adapter, and every round's times."""

    adapter: Tree
    times: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Frugal(Strategy[State]):
    """See the module."""

    linear: ClassVar[bool] = True

    def init(self, problem: Problem) -> State:
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State(weighted_mean(replies, "adapter"), state.times)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def efforts(self, state: State, clients: Sequence[str]) -> Mapping[str, Effort]:
        return {"c0": Effort(pruned=0.5, adapter=0.25)}

    def told(self, state: State, times: Mapping[str, float]) -> State:
        return dataclasses.replace(state, times=[*state.times, dict(times)])
