"""SCAFFOLD on adapters: control variates take the clients' drift out of their local steps.

Algorithm 1 of Karimireddy et al., ICML 2020 (arXiv 1910.06378): client k steps along
g - c_k + c from the global adapter x, then sets c_k to the gradients it met; the server sets
x <- x + lr (sum_k p_k y_k - x) and c <- c + |S|/N sum_k p_k (c_k' - c_k).

Option II of its equation 4, c_k' = c_k - c + (x - y_k) / (steps * local lr), is for plain SGD the
mean of the gradients g along the path; that mean is taken here directly, so the rule needs no
learning rate and means the same under AdamW, momentum and schedules. g is the clipped gradient.
Weights p_k are the recipe's (equal in the paper); with all clients present c = sum_k p_k c_k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy
from fedpeft.tree import RunningMean, Tree, add, scale, sub, zeros_like


@dataclass(frozen=True)
class State:
    """The global adapter x, the server's control variate c, and N, how many clients there are."""

    adapter: Tree
    control: Tree
    clients: int


@dataclass(frozen=True)
class Scaffold(Strategy[State]):
    """Drift-corrected local steps; each client keeps its c_k to itself and sends how it changed.

    lr: the server's step size. What the aggregate needs of |S| is no weighted mean: not linear.
    """

    remembers: ClassVar[bool] = True

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise FedpeftError(f"strategy.lr={self.lr!r}: must be a finite number > 0; 1 is usual.")

    def init(self, problem: Problem) -> State:
        return State(problem.initial, zeros_like(problem.initial), len(problem.clients))

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter, "control": state.control})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start, server = messages.trees["adapter"], messages.trees["control"]
        before = cohort.recall("control", zeros_like(server))
        met = {name: torch.zeros_like(x) for name, x in start.items()}

        def corrected(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
            for name, g in gradient.items():
                finite = torch.isfinite(g).unsqueeze(-1).flatten(1).all(dim=1)
                g = torch.where(finite.view(-1, *[1] * (g.dim() - 1)), g, 0.0)
                met[name].index_add_(0, own["row"]["k"], g)
            return add(gradient, own["drift"])

        rows = {"k": torch.arange(len(messages), device=next(iter(start.values())).device)}
        own = {"drift": sub(server, before), "row": rows}
        fit = cohort.fit(start, adjust=corrected, own=own)
        after = {n: x / fit.steps.to(x).view(-1, *[1] * (x.dim() - 1)) for n, x in met.items()}
        cohort.remember("control", after)
        trees = {"adapter": fit.adapter, "change": sub(after, before)}
        return messages.reply(trees, weight=cohort.weights, loss=fit.loss)

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {"adapter": sent.trees["adapter"], "change": sent.trees["control"]}

    def receive(self, state: State, replies: Replies) -> State:
        means, present = {"adapter": RunningMean(), "change": RunningMean()}, 0
        for reply in replies:
            present += len(reply)
            for name, running in means.items():
                running.add(reply.trees[name], reply.scalars["weight"])
        move = sub(means["adapter"].result(), state.adapter)
        change = scale(means["change"].result(), present / state.clients)
        return State(
            add(state.adapter, scale(move, self.lr)), add(state.control, change), state.clients
        )

    def adapter(self, state: State) -> Tree:
        return state.adapter
