"""FedAdagrad on adapters: the server's steps shrink with the sum of all squared moves so far.

Algorithm 2 of Reddi et al., ICLR 2021 (arXiv 2003.00295), on adapter tensors: with D the weighted
mean of the clients' moves, v <- v + D^2; m and the step w <- w + lr m / (sqrt(v) + tau) as in
``fedpeft.server_optimizer``. The paper weighs clients equally (``rounds.weighting=equal``) and runs
it without momentum, beta1 = 0.
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
class FedAdagrad(Strategy[State]):
    """v is a sum over all rounds, so that no entry's steps ever grow for equal moves.

    lr: the server's step size, which the first step of an entry does not exceed. beta1: the share
    of the past in m. tau: what is added to sqrt(v).
    """

    linear: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    lr: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3

    def init(self, problem: Problem) -> State:
        return start(problem.initial, self.lr, self.tau, [self.beta1])

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
        return v + move.square()
