"""RoLoRA: rounds alternate between LoRA's factors, B in odd rounds and A in even ones.

Chen et al., NeurIPS 2025 (arXiv 2502.01755): in a round that trains B all clients hold the same A,
so sum_k p_k s B_k A = s (sum_k p_k B_k) A, and likewise for A: every round is exact, and A learns,
which FFA-LoRA's does not. The first round trains B: with B = 0 the gradient of A is zero.

Up goes the round's factor and the head, down both factors: a client keeps nothing from round to
round, and may come and go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.lowrank import is_a, is_b, lora_pairs
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree, row, select, sort


@dataclass(frozen=True)
class State:
    """The global adapter."""

    adapter: Tree


@dataclass(frozen=True)
class RoLoRA(Strategy[State]):
    """B <- sum_k p_k B_k in rounds 1, 3, ..., A <- sum_k p_k A_k in rounds 2, 4, ..."""

    exact: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "rolora")
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        frozen = select(state.adapter, is_a if round % 2 else is_b)
        trained = select(state.adapter, lambda name: name not in frozen)
        return Messages.broadcast(clients, {"trained": trained, "frozen": frozen})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["trained"], fixed=row(messages.trees["frozen"], 0))
        return messages.reply({"trained": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State({**state.adapter, **weighted_mean(replies, "trained")})

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {"trained": sent.trees["trained"]}

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return sort({**messages.trees["trained"], **messages.trees["frozen"]})
