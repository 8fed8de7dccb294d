"""FedSVD: clients train B only, and the server turns A into an orthonormal basis of what B A uses.

Lee et al., NeurIPS 2025 (arXiv 2505.12805): B <- sum_k p_k B_k under a common A, then every
``period`` rounds U S V^T = svd(B A), A <- V^T, B <- U S, with rows of A orthonormal and B A as
before: exact. A layer whose B is still zero keeps its A.

The rows of the new A span no more than those of the old one: A never leaves the row space of its
start. Under SGD the updates B A are those of FFA-LoRA with an orthonormal start
(``ffa_lora``, ``init_a=orthonormal``), to rounding; under Adam they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import is_a, lora_pairs, truncated_svd
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree, row, select, sort


@dataclass(frozen=True)
class State:
    """The global adapter, and how many rounds it has behind it."""

    adapter: Tree
    rounds: int


@dataclass(frozen=True)
class FedSVD(Strategy[State]):
    """B <- sum_k p_k B_k; A, B <- V^T, U S of svd(B A).

    period: rounds from one decomposition to the next; 0 is FFA-LoRA with peft's own A.
    """

    exact: ClassVar[bool] = True
    linear: ClassVar[bool] = True

    period: int = 1

    def __post_init__(self) -> None:
        if self.period < 0:
            raise FedpeftError(f"strategy.period={self.period!r}: must be >= 0; 0 is never.")

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fedsvd")
        return State(problem.initial, 0)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        frozen = select(state.adapter, is_a)
        trained = select(state.adapter, lambda name: not is_a(name))
        return Messages.broadcast(clients, {"adapter": trained, "basis": frozen})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"], fixed=row(messages.trees["basis"], 0))
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        adapter = {**state.adapter, **weighted_mean(replies, "adapter")}
        rounds = state.rounds + 1
        if self.period and rounds % self.period == 0:
            for name_a, name_b in lora_pairs(adapter, "fedsvd").values():
                a, b = adapter[name_a], adapter[name_b]
                if bool(b.any()):
                    u, s, vt = truncated_svd(b, a, len(a))
                    adapter |= {name_a: vt.to(a.dtype), name_b: (u * s).to(b.dtype)}
        return State(adapter, rounds)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {"adapter": sent.trees["adapter"]}

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return sort({**messages.trees["adapter"], **messages.trees["basis"]})
