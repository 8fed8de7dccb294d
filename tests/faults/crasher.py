"""FedAvg whose client c1 ends its process, or stays in it for good, as a file says."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpeft.strategies.fedavg import FedAvg, State
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Crasher(Strategy[State]):
    """orders: a file: ``hang``, or the number of deaths still to come."""

    orders: str = ""

    def init(self, problem: Problem) -> State:
        return FedAvg().init(problem)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return FedAvg().send(state, round, clients)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if "c1" in cohort.clients:  # only its process reads and writes the file
            order = Path(self.orders).read_text()
            left = 0 if order == "hang" else int(order)
            Path(self.orders).write_text(str(max(0, left - 1)))
            if order == "hang":
                threading.Event().wait()
            if left:
                os._exit(1)
        return FedAvg().train(messages, cohort)

    def receive(self, state: State, replies: Replies) -> State:
        return FedAvg().receive(state, replies)

    def adapter(self, state: State) -> Tree:
        return FedAvg().adapter(state)
