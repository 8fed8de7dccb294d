"""FedEx-LoRA: FedAvg of the factors, and what that average misses goes into the frozen weights.

Singhal et al., ACL 2025 (arXiv 2410.09432), equations 5-9: A <- sum_k p_k A_k, B <- sum_k p_k B_k,
W_0 <- W_0 + s E with the residual E = sum_k p_k B_k A_k - B A, so that every client goes on from
the mean of the clients' models: exact in every round.

E travels as factors without an SVD: since sum_k p_k (B_k - B) = 0, it is
sum_{k<m} [p_k (B_k - B)] [A_k - A_m] for m clients, of rank at most (m - 1) r. The authors' code
folds the transpose of E, and weights clients equally; here p_k is used throughout.
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
    """The global adapter, s of every LoRA layer, and the book of the base's residuals."""

    adapter: Tree
    scaling: dict[str, float]
    book: Book


@dataclass(frozen=True)
class FedExLoRA(Strategy[State]):
    """Factors and heads <- their weighted means; W_0 <- W_0 + s E.

    residual_rank: keep the leading singular values of E only, in each round (section 3.3: the best
    such approximation, no longer exact); 0 keeps all.
    """

    exact: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    folds: ClassVar[bool] = True

    residual_rank: int = 0

    def __post_init__(self) -> None:
        if self.residual_rank < 0:
            raise FedpeftError(
                f"strategy.residual_rank={self.residual_rank}: a rank is at least 1; 0 keeps all."
            )

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fedex_lora")
        return State(problem.initial, dict(problem.scaling), Book())

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        return state.book.groups(clients)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        trees, scalars = state.book.news(clients)
        return Messages.broadcast(clients, {"adapter": state.adapter, **trees}, scalars)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        base = follow(messages, cohort)
        fit = cohort.fit(messages.trees["adapter"], base=base)
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        stacks = list(replies)
        own, p = gather(stacks, "adapter")
        merged = mean([(own, p)])
        update = {}
        for layer, (name_a, name_b) in lora_pairs(merged, "fedex_lora").items():
            up, down = residual(own[name_b], own[name_a], merged[name_b], p)
            if self.residual_rank and len(down):
                u, sigma, vt = truncated_svd(up, down, min(self.residual_rank, len(down)))
                up, down = u * sigma, vt
            up = state.scaling[layer] * up
            update[layer] = up.to(merged[name_b].dtype), down.to(merged[name_a].dtype)
        replied = [name for stack in stacks for name in stack.clients]
        return State(merged, state.scaling, state.book.received(replied).changed(update))

    def expects(self, sent: Message) -> dict[str, Tree]:
        return {"adapter": sent.trees["adapter"]}

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def base(self, state: State) -> Tree:
        return state.book.total

    def followed(self, messages: Messages, cohort: Cohort) -> Tree:
        return follow(messages, cohort)


def residual(b: Tensor, a: Tensor, b_mean: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of E, float64: ``[d_out, (m - 1) r]`` and ``[(m - 1) r, d_in]``.

    b ``[m, d_out, r]``, a ``[m, r, d_in]``, their mean b_mean ``[d_out, r]``, p ``[m]`` of sum 1.
    """
    off_b, off_a = b.double() - b_mean.double(), a.double() - a[-1].double()
    return concatenate(off_b[:-1], off_a[:-1], p[:-1])
