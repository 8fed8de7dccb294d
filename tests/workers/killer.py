"""FedAvg whose worker dies as it trains client c1, as often as a file says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedpeft.strategies.fedavg import FedAvg, State
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Killer(Strategy[State]):
    """deaths: a file with the number of deaths still to come."""

    linear: ClassVar[bool] = True

    deaths: str = ""

    def init(self, problem: Problem) -> State:
        return FedAvg().init(problem)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return FedAvg().send(state, round, clients)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if "c1" in cohort.clients:  # only its worker reads and writes the file
            left = int(Path(self.deaths).read_text())
            if left:
                Path(self.deaths).write_text(str(left - 1))
                os._exit(1)
        return FedAvg().train(messages, cohort)

    def receive(self, state: State, replies: Replies) -> State:
        return FedAvg().receive(state, replies)

    def adapter(self, state: State) -> Tree:
        return FedAvg().adapter(state)
