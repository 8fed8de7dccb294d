"""FedAvgM on adapters: the server keeps momentum of the clients' mean move.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019 (arXiv 1909.06335): v <- beta v + sum_k p_k (w_k - w), w <- w + lr v. With
beta = 0 and lr = 1 it is FedAvg. Equal moves add up to lr / (1 - beta) times one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree, add, scale, sub, zeros_like


@dataclass(frozen=True)
class State:
    """The global adapter and the momentum v of its moves."""

    adapter: Tree
    momentum: Tree


@dataclass(frozen=True)
class FedAvgM(Strategy[State]):
    """Heavy-ball momentum on the server.

    lr: the server's step size. beta: the share of v that stays from round to round.
    """

    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    lr: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise FedpeftError(f"strategy.lr={self.lr!r}: must be a finite number > 0; 1 is usual.")
        if not 0 <= self.beta < 1:
            raise FedpeftError(
                f"strategy.beta={self.beta!r}: the share of the momentum that stays must be >= 0 "
                f"and < 1, where 0 is FedAvg."
            )

    def init(self, problem: Problem) -> State:
        return State(problem.initial, zeros_like(problem.initial))

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        move = sub(weighted_mean(replies, "adapter"), state.adapter)
        momentum = add(scale(state.momentum, self.beta), move)
        return State(add(state.adapter, scale(momentum, self.lr)), momentum)

    def adapter(self, state: State) -> Tree:
        return state.adapter
