"""LoRA-FAIR: FedAvg of A and B, and a correction of B towards the mean of the clients' updates.

Bian et al., ICCV 2025 (arXiv 2411.14961): find D that makes (B + D) A similar to
M = sum_k p_k B_k A_k while lambda ||D|| keeps it small; send A and B + D. Clients go on from them.
The paper minimises 1 - cos by SGD on the server, of which no step size or count was found; here the
distance is ||M - (B + D) A||_F^2 + ridge ||D||_F^2 and D its exact minimum,
D = (sum_k p_k B_k A_k - B A) A^T (A A^T + ridge I)^-1. Only what lies in the row space of A can be
corrected, so it is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import lora_pairs
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, gather
from fedpeft.tree import Tree, mean


@dataclass(frozen=True)
class State:
    """The global adapter."""

    adapter: Tree


@dataclass(frozen=True)
class LoraFair(Strategy[State]):
    """A <- sum_k p_k A_k, B <- sum_k p_k B_k + D.

    ridge: the weight of ||D||^2, >= 0; large values leave FedAvg. Its unit is that of A A^T, whose
    diagonal is about 1/3 as peft initialises A.
    """

    ridge: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < math.inf:
            raise FedpeftError(f"strategy.ridge={self.ridge!r}: must be a finite number >= 0.")

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "lora_fair")
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        own, p = gather(replies, "adapter")
        merged = mean([(own, p)])
        for name_a, name_b in lora_pairs(merged, "lora_fair").values():
            b = correct(own[name_b].double(), own[name_a].double(), p, self.ridge)
            merged[name_b] = b.to(merged[name_b])
        return State(merged)

    def adapter(self, state: State) -> Tree:
        return state.adapter


def correct(b: Tensor, a: Tensor, p: Tensor, ridge: float) -> Tensor:
    """B + D ``[d_out, r]`` of one layer; b ``[K, d_out, r]``, a ``[K, r, d_in]``, p ``[K]``."""
    weight = p.to(b)
    mean_a, mean_b = torch.einsum("k,kij->ij", weight, a), torch.einsum("k,kij->ij", weight, b)
    gram = mean_a @ mean_a.mT
    missing = torch.einsum("k,kor,krq->oq", weight, b, a @ mean_a.mT) - mean_b @ gram
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: Tensor = mean_b + missing @ torch.linalg.pinv(damped, hermitian=True)
    return found
