"""FlexLoRA: the server averages the clients' updates and hands out their best rank-r factors.

Bai et al., NeurIPS 2024 (arXiv 2402.11505): W = sum_k p_k s B_k A_k, U S V^T = svd(W),
B <- U_r S_r / s, A <- V_r^T, all of the singular values on B's side, as in the authors' code. The
error is the tail of the spectrum, ||s B A - W||_F^2 = sum_{i>r} S_i^2: exact only where W has rank
r. The dense W is never formed (``fedpeft.lowrank``).

Clients may have unequal ranks r_k. Columns come in order of their singular values, so a client is
sent the leading r_k of them, its best factors; s is the same for all and cancels (the authors have
s_k = 16 / r_k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedpeft.lowrank import concatenate, lora_pairs, truncated_svd
from fedpeft.ranks import assign, lead, padded, widen
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, gather, group_by
from fedpeft.tree import Tree, mean


@dataclass(frozen=True)
class State:
    """The adapter, rows of A orthonormal, columns of B orthogonal, descending; clients' ranks."""

    adapter: Tree
    ranks: dict[str, int]


@dataclass(frozen=True)
class FlexLoRA(Strategy[State]):
    """A, B <- the truncated SVD of sum_k p_k B_k A_k; heads <- their weighted mean.

    ranks: drawn among the clients by the run's seed, each for as many; empty: all have adapter.r.
    client_ranks: client -> its rank, for the ones that are known.
    """

    ranks: list[int] = field(default_factory=list)
    client_ranks: dict[str, int] = field(default_factory=dict)

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "flexlora")
        return State(problem.initial, assign(problem, self.ranks, self.client_ranks))

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        return group_by(clients, lambda client: state.ranks[client])

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        (rank,) = {state.ranks[client] for client in clients}
        return Messages.broadcast(clients, {"adapter": lead(state.adapter, rank)})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"], expand=widen(cohort.initial))
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        own, p = gather(padded(replies, "adapter", state.adapter), "adapter")
        merged = mean([(own, p)])
        for name_a, name_b in lora_pairs(merged, "flexlora").values():
            b, a = concatenate(own[name_b], own[name_a], p)
            u, s, vt = truncated_svd(b, a, len(merged[name_a]))
            merged[name_a] = vt.to(merged[name_a])
            merged[name_b] = (u * s).to(merged[name_b])
        return State(merged, state.ranks)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return widen(cohort.initial)(messages.trees["adapter"])
