"""FedAvg on adapters (FedIT): clients train A and B of LoRA, or any adapter; the server averages.

Algorithm 1 of McMahan et al., AISTATS 2017 (arXiv 1602.05629), w <- sum_k p_k w_k, on adapter
tensors as in FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644). For LoRA the average of the
factors is not the average of the updates: they differ by the covariance of the clients' factors,
sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B) (A_k - A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree


@dataclass(frozen=True)
class State:
    """The global adapter."""

    adapter: Tree


@dataclass(frozen=True)
class FedAvg(Strategy[State]):
    """w <- sum_k p_k w_k with p_k = weight_k / sum_j weight_j over the round's valid replies."""

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
