"""One-shot merging: clients train on their own, and their adapters are merged once.

With t_k = w_k - w what client k trained, w <- w + scale * merge(t_1, ..., t_m), where merge is

- ``task_arithmetic``: sum_k p_k t_k (Ilharco et al., ICLR 2023, arXiv 2212.04089; their factor on
  the plain sum is scale / m);
- ``ties``: keep the largest ``density`` of each t_k, elect every entry's sign by sum_k p_k t_k, and
  average what has that sign (Yadav et al., NeurIPS 2023, arXiv 2306.01708, algorithm 1);
- ``pcb``: sum_k p_k b_k t_k / sum_k p_k b_k with b_k in [0, 1] from parameter competition (Du et
  al., NeurIPS 2024, arXiv 2410.02396): exp(m z_k^2) tanh(t_k sum_j t_j), z_k = |t_k| rescaled to
  [0, 1], then all but the largest ``density`` of it cut off and the rest rescaled to [0, 1]. As in
  the authors' code, less its clipping of t_k at its 0.01 % quantiles.

Weights p_k are the recipe's; the papers merge equal ones (``rounds.weighting=equal``) and once:
``rounds.count=1`` with many epochs. In more rounds each merges what that round trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, gather
from fedpeft.tree import Layout, Tree, row


@dataclass(frozen=True)
class State:
    """The global adapter: before the merge the initial one."""

    adapter: Tree


@dataclass(frozen=True)
class OneShot(Strategy[State]):
    """w <- w + scale * merge(w_k - w); the whole adapter, heads included, is one vector.

    density: the share of each client's entries that ``ties`` and ``pcb`` keep (0.2 and 0.1 in their
    papers). scale: factor on the merged move.
    """

    averages: ClassVar[bool] = False

    rule: Literal["task_arithmetic", "ties", "pcb"] = "ties"
    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise FedpeftError(f"strategy.density={self.density!r}: a share must be > 0 and <= 1.")
        if not 0 < self.scale < math.inf:
            raise FedpeftError(f"strategy.scale={self.scale!r}: must be a finite number > 0.")

    def init(self, problem: Problem) -> State:
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        own, p = gather(replies, "adapter")
        layout = Layout.of(state.adapter)
        before = layout.pack({n: x[None] for n, x in state.adapter.items()}).double()
        moves = layout.pack(own).to(before) - before
        if self.rule == "ties":
            merged = ties(moves, p, self.density)
        elif self.rule == "pcb":
            merged = pcb(moves, p, self.density)
        else:
            merged = p @ moves
        after = row(layout.unpack(before + self.scale * merged), 0)
        return State({n: after[n].to(x.dtype) for n, x in state.adapter.items()})

    def adapter(self, state: State) -> Tree:
        return state.adapter


def ties(moves: Tensor, p: Tensor, density: float) -> Tensor:
    """Trim, elect, average what agrees: ``[P]`` from moves ``[m, P]`` and weights ``[m]``."""
    size = moves.abs()
    kept = moves * (size >= _largest(size, density)[:, -1:])
    agree = (kept.sign() == (p @ kept).sign()) & (kept != 0)
    weight = p @ agree.double()
    return (p @ (kept * agree)) / torch.where(weight > 0, weight, 1.0)


def pcb(moves: Tensor, p: Tensor, density: float) -> Tensor:
    """Parameter-competition balancing: ``[P]`` from moves ``[m, P]`` and weights ``[m]``."""
    m, size = len(moves), moves.abs()
    low = size.amin(dim=1, keepdim=True)
    within = torch.exp(m * _rescale(size, low) ** 2)
    score = within * torch.tanh(moves * (m * p @ moves))
    balance = _rescale(score, _largest(score, density, 1)[:, -1:])
    weight = p @ balance
    return (p @ (balance * moves)) / weight.clamp(min=1e-12)


def _largest(x: Tensor, density: float, more: int = 0) -> Tensor:
    """The largest ``density`` of each row, in descending order, and ``more`` numbers."""
    count = max(1, round(density * x.shape[1])) + more
    return x.topk(min(count, x.shape[1]), dim=1).values


def _rescale(x: Tensor, low: Tensor) -> Tensor:
    """Each row from [low, its largest] to [0, 1]; what is below ``low`` is 0."""
    width = x.amax(dim=1, keepdim=True) - low
    return (x - low).clamp(min=0) / torch.where(width > 0, width, 1.0)
