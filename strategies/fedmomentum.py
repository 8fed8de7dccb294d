"""FedMomentum: the mean update's leading part becomes the factors, the rest goes into the base.

Yan et al., 2026 (arXiv 2603.08014): M = sum_k p_k s B_k A_k, U S V^T = svd(M),
B <- U_r S_r^1/2 / s^1/2, A <- S_r^1/2 V_r^T / s^1/2, and the components r + 1 to e are folded,
W_0 <- W_0 + sum_{r < i <= e} S_i u_i v_i^T, with the smallest e that holds a share ``energy`` of
||M||^2. The error is the tail beyond e, at most (1 - energy) ||M||^2. M is never formed: its
factors are the clients' own side by side (``fedpeft.lowrank``); the paper's SVD is randomised.

FlexLoRA drops what is folded here; FedEx-LoRA folds as much, but keeps the means of the factors,
which need not point where M does. A layer whose mean is zero keeps its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.folding import Book, follow
from fedpeft.lowrank import concatenate, lora_pairs, truncated_svd
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, gather
from fedpeft.tree import Tree, mean


@dataclass(frozen=True)
class State:
    """The global adapter, s by layer, and what has been folded into the base."""

    factors: Tree
    scaling: dict[str, float]
    folded: Book


@dataclass(frozen=True)
class FedMomentum(Strategy[State]):
    """A, B <- the leading r components of M; W_0 <- W_0 + the next ones; heads <- their mean.

    energy: the share of ||M||^2 that survives, in (0, 1]; 1 keeps all of M, and is exact.
    """

    keeps: ClassVar[bool] = True
    folds: ClassVar[bool] = True

    energy: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise FedpeftError(f"strategy.energy={self.energy}: a share must lie in (0, 1].")

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fedmomentum")
        return State(problem.initial, dict(problem.scaling), Book())

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        return state.folded.groups(clients)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        changes, versions = state.folded.news(clients)
        return Messages.broadcast(clients, {"adapter": state.factors} | changes, versions)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"], base=follow(messages, cohort))
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        stacks = list(replies)
        own, p = gather(stacks, "adapter")
        factors, tails = mean([(own, p)]), {}
        for layer, (name_a, name_b) in lora_pairs(factors, "fedmomentum").items():
            s, a, b = state.scaling[layer], factors[name_a], factors[name_b]
            up, down = concatenate(own[name_b], own[name_a], s * p)
            u, sigma, vt = truncated_svd(up, down, min(len(up), down.shape[1], len(down)))
            tail = slice(len(a), self._kept(sigma))
            tails[layer] = (u * sigma)[:, tail].to(b), vt[tail].to(a)
            if bool(sigma.any()):
                root = (sigma[: len(a)] / s).sqrt()
                factors[name_b] = widened(u[:, : len(a)] * root, b)
                factors[name_a] = widened(root[:, None] * vt[: len(a)], a)
        replied = [name for stack in stacks for name in stack.clients]
        return State(factors, state.scaling, state.folded.received(replied).changed(tails))

    def expects(self, sent: Message) -> dict[str, Tree]:
        return {"adapter": sent.trees["adapter"]}

    def adapter(self, state: State) -> Tree:
        return state.factors

    def base(self, state: State) -> Tree:
        return state.folded.total

    def followed(self, messages: Messages, cohort: Cohort) -> Tree:
        return follow(messages, cohort)

    def _kept(self, sigma: Tensor) -> int:
        """e: how many of the descending singular values hold the share ``energy`` of all."""
        total = sigma.square().sum()
        if not float(total) > 0:
            return 0
        if self.energy == 1:
            return len(sigma)
        return int((sigma.square().cumsum(0) < self.energy * total).sum()) + 1


def widened(factor: Tensor, like: Tensor) -> Tensor:
    """A factor in the shape and dtype of ``like``, zeros where it has fewer ranks."""
    found = like.new_zeros(like.shape)
    found[: factor.shape[0], : factor.shape[1]] = factor.to(like)
    return found
