"""FedProx on adapters: FedAvg whose clients are pulled back to the round's global adapter.

Algorithm 2 of Li et al., MLSys 2020 (arXiv 1812.06127): client k minimises, inexactly, their
equation 2, h_k(w; w_t) = F_k(w) + mu/2 ||w - w_t||^2. Here clients are drawn by the recipe and
averaged by weight, as in ``fedavg``; the paper draws by weight and averages equally.

For LoRA the distance may be taken between updates instead of factors (``space="product"``):
mu/2 ||s B A - s B_t A_t||_F^2 per layer, the same for every factorisation of an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree, add, scale, sub


@dataclass(frozen=True)
class State:
    """The global adapter, and s of every LoRA layer."""

    adapter: Tree
    scaling: dict[str, float]


@dataclass(frozen=True)
class FedProx(Strategy[State]):
    """Gradient + mu * pull on the clients, after clipping; FedAvg's mean on the server.

    mu: weight of the proximal term, >= 0 (0 is FedAvg; the paper tries 0.001, 0.01, 0.1 and 1).
    space: ``factor`` takes the distance over all trainable tensors; ``product`` over LoRA's updates
    s B A, and over the tensors themselves where they are not lora_A and lora_B (heads).
    """

    linear: ClassVar[bool] = True

    mu: float = 0.01
    space: Literal["factor", "product"] = "factor"

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise FedpeftError(
                f"strategy.mu={self.mu!r}: the weight of the proximal term must be a finite number "
                f">= 0, where 0 is FedAvg."
            )

    def init(self, problem: Problem) -> State:
        if self.space == "product" and not any(_is_a(name) for name in problem.initial):
            raise FedpeftError(
                "strategy.space='product' measures LoRA's updates B A, but the adapter has no "
                "lora_A and lora_B: set adapter.kind=lora, or strategy.space=factor."
            )
        return State(problem.initial, dict(problem.scaling))

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        scalars = state.scaling if self.space == "product" else {}
        return Messages.broadcast(clients, {"adapter": state.adapter}, scalars)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start, scaling = messages.trees["adapter"], messages[0].scalars

        def proximal(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
            pull = sub(adapter, own["start"])
            if self.space == "product":
                pull |= product_pull(adapter, own["start"], scaling)
            return add(gradient, scale(pull, self.mu))

        adjust = proximal if self.mu > 0 else None
        fit = cohort.fit(start, adjust=adjust, own={"start": start})
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State(weighted_mean(replies, "adapter"), state.scaling)

    def adapter(self, state: State) -> Tree:
        return state.adapter


def product_pull(now: Tree, then: Tree, scaling: Mapping[str, float]) -> Tree:
    """The gradient of 1/2 ||s (B A - B_t A_t)||_F^2 by A and B, for every LoRA layer.

    now, then: stacked trees with A ``[K, r, d_in]`` and B ``[K, d_out, r]``. With the difference
    D = B A - B_t A_t = (B - B_t) A + B_t (A - A_t) it is s^2 B^T D by A and s^2 D A^T by B, both
    through r x r Grams, never the dense D; at w = w_t both are exactly zero.
    """
    pull = {}
    for name in filter(_is_a, now):
        other = name.replace(".lora_A.", ".lora_B.")
        a, b, b_then = now[name], now[other], then[other]
        step_a, step_b = a - then[name], b - b_then
        squared = scaling[name.split(".lora_A.")[0]] ** 2
        pull[name] = squared * ((b.mT @ step_b) @ a + (b.mT @ b_then) @ step_a)
        pull[other] = squared * (step_b @ (a @ a.mT) + b_then @ (step_a @ a.mT))
    return pull


def _is_a(name: str) -> bool:
    return ".lora_A." in name and name.endswith(".weight")
