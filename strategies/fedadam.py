"""FedAdam on adapters: the server steps by Adam, with the clients' mean move as its gradient.

Algorithm 2 of Reddi et al., ICLR 2021 (arXiv 2003.00295), on adapter tensors: with D the weighted
mean of the clients' moves, v <- beta2 v + (1 - beta2) D^2; m and the step
w <- w + lr m / (sqrt(v) + tau) as in ``fedpeft.server_optimizer``. The paper weighs clients equally
(``rounds.weighting=equal``). Tune lr: the first step moves no entry by more than
lr (1 - beta1) / sqrt(1 - beta2), LoRA's B, which starts from zero, and A alike.
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
class FedAdam(Strategy[State]):
    """v is a running mean of squared moves.

    lr: the server's step size. beta1, beta2: the share of the past in m and in v. tau: what is
    added to sqrt(v); moves far below it are taken as by plain averaging times lr / tau.
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
        return self.beta2 * v + (1 - self.beta2) * move.square()
