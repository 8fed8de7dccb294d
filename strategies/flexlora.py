"""FlexLoRA: the server averages the clients' updates and hands out their best rank-r factors.

Bai et al., NeurIPS 2024 (arXiv 2402.11505): W = sum_k p_k s B_k A_k, U S V^T = svd(W),
B <- U_r S_r / s, A <- V_r^T, all of the singular values on B's side, as in the authors' code. The
error is the tail of the spectrum, ||s B A - W||_F^2 = sum_{i>r} S_i^2: exact only where W has rank
r. The dense W is never formed (``fedpeft.lowrank``).

Ranks are equal here, and so is s, which cancels. Columns come in order of their singular values:
the leading q of them are what a client of rank q would be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.lowrank import concatenate, lora_pairs, truncated_svd
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, gather
from fedpeft.tree import Tree, mean


@dataclass(frozen=True)
class State:
    """The global adapter: rows of A orthonormal, columns of B orthogonal and descending in norm."""

    adapter: Tree


@dataclass(frozen=True)
class FlexLoRA(Strategy[State]):
    """A, B <- the truncated SVD of sum_k p_k B_k A_k; heads <- their weighted mean."""

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "flexlora")
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        own, p = gather(replies, "adapter")
        merged = mean([(own, p)])
        for name_a, name_b in lora_pairs(merged, "flexlora").values():
            b, a = concatenate(own[name_b], own[name_a], p)
            u, s, vt = truncated_svd(b, a, len(merged[name_a]))
            merged[name_a] = vt.to(merged[name_a])
            merged[name_b] = (u * s).to(merged[name_b])
        return State(merged)

    def adapter(self, state: State) -> Tree:
        return state.adapter
