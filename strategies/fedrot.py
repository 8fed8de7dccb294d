"""FedRot-LoRA: clients rotate their factors towards the global ones before the server averages.

FedRot-LoRA, ICML 2026 (arXiv 2602.23638). B A = (B R)(R^T A) for every rotation R, so clients agree
on R without changing their updates: R* = argmin over SO(r) of ||R^T A_k - A|| in one round, of
||B_k R - B|| in the next, by Procrustes, and R is the rotation nearest to (1 - soft) I + soft R*.
The server averages R^T A_k and B_k R as FedAvg does. In round 1, where all of the global B is zero,
nothing turns; nor does a layer whose B is still zero when it is B's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import lora_pairs
from fedpeft.strategy import Cohort, Messages, Problem, Replies, Strategy, weighted_mean
from fedpeft.tree import Tree


@dataclass(frozen=True)
class State:
    """The global adapter."""

    adapter: Tree


@dataclass(frozen=True)
class FedRot(Strategy[State]):
    """A <- sum_k p_k R_k^T A_k, B <- sum_k p_k B_k R_k; by A in even rounds, by B in odd ones.

    soft: how far to turn, from 0 (not at all: FedAvg) to 1 (the best rotation).
    """

    linear: ClassVar[bool] = True

    soft: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.soft <= 1:
            raise FedpeftError(
                f"strategy.soft={self.soft!r}: how far clients turn must lie between 0 (FedAvg) "
                f"and 1 (the best rotation)."
            )

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fedrot")
        return State(problem.initial)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter}, {"round": round})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        then, round = messages.trees["adapter"], int(messages.scalars["round"][0])
        fit = cohort.fit(then)
        sent = dict(fit.adapter)
        if self.soft > 0:
            for name_a, name_b in lora_pairs(cohort.initial, "fedrot").values():
                a, b = sent[name_a].double(), sent[name_b].double()
                by_a = then[name_a].double() @ a.mT
                by_b = then[name_b].double().mT @ b
                turn = rotation(by_b if round % 2 else by_a, self.soft)
                sent[name_a] = (turn.mT @ a).to(sent[name_a].dtype)
                sent[name_b] = (b @ turn).to(sent[name_b].dtype)
        return messages.reply({"adapter": sent}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        return State(weighted_mean(replies, "adapter"))

    def adapter(self, state: State) -> Tree:
        return state.adapter


def rotation(agreement: Tensor, soft: float) -> Tensor:
    """The rotation nearest to (1 - soft) I + soft R*, where R* maximises tr(agreement R).

    agreement: float64 ``[K, r, r]``, A A_k^T or B^T B_k. Where it is zero or not finite: I.
    """
    eye = torch.eye(agreement.shape[-1], dtype=agreement.dtype, device=agreement.device)
    safe = torch.where(torch.isfinite(agreement).all(dim=(-2, -1), keepdim=True), agreement, 0.0)
    best = nearest_rotation(safe.mT)
    turn = nearest_rotation((1 - soft) * eye + soft * best)
    known = (safe != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
    return torch.where(known, turn, eye)


def nearest_rotation(x: Tensor) -> Tensor:
    """The matrix of SO(r) nearest to each x in Frobenius norm, ``[K, r, r]``."""
    u, _, vt = torch.linalg.svd(x)
    sign = torch.linalg.det(u @ vt).sign()
    u = torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], dim=-1)
    found: Tensor = u @ vt
    return found
