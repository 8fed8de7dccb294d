"""FedYogi on adapters: FedAdam whose second moment falls slowly after a large move.

Algorithm 2 of Reddi et al., ICLR 2021 (arXiv 2003.00295), on adapter tensors: with D the weighted
mean of the clients' moves, v <- v - (1 - beta2) D^2 sign(v - D^2); m and the step
w <- w + lr m / (sqrt(v) + tau) as in ``fedpeft.server_optimizer``. So v changes by
(1 - beta2) D^2 at most, where Adam's falls by (1 - beta2) v. The paper weighs clients equally
(``rounds.weighting=equal``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedpeft.server_optimizer import State, adaptive_step, start
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy
from fedpeft.tree import Tree


@dataclass(frozen=True)
class FedYogi(Strategy[State]):
    """v follows squared moves by steps that their own size bounds.

    lr: the server's step size. beta1: the share of the past in m. beta2: 1 - beta2 is the share of
    a squared move that v changes by. tau: what is added to sqrt(v).
    """

    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def init(self, problem: Problem) -> State:
        return start(problem.initial, self.lr, self.tau, [self.beta1, self.beta2])

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return adaptive_step(state, replies, self._second, self.beta1, self.lr, self.tau)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def _second(self, v: Tensor, move: Tensor) -> Tensor:
        squared = move.square()
        return v - (1 - self.beta2) * squared * (v - squared).sign()
