"""FedKSeed, right as it stands, and wrong in ways of its own under ``bug``: what walks invite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft.strategies.fedkseed import FedKSeed
from fedpeft.strategies.fedkseed import State as Sums
from fedpeft.strategy import Cohort, Messages, Replies
from fedpeft.tree import Tree, broadcast


@dataclass(frozen=True)
class Steps(FedKSeed):
    """FedKSeed with few candidates."""

    candidates: int = 16
    bug: str = ""

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        reply = super().train(messages, cohort)
        pairs = dict(reply.trees["walk"])
        if self.bug == "the next seed":
            pairs["j"] = (pairs["j"] + 1) % self.candidates
        if self.bug == "all moves of the first client":
            pairs["m"] = broadcast({"m": pairs["m"][0]}, len(reply))["m"]
        if self.bug == "the walk is ignored":
            pairs["m"] = torch.zeros_like(pairs["m"])
        if self.bug == "a move is lost":
            pairs["m"] = pairs["m"].clone()
            pairs["m"][:, -1] = 0
        return replace(reply, trees={"walk": pairs})

    def receive(self, state: Sums, replies: Replies) -> Sums:
        new = super().receive(state, replies)
        if self.bug == "the other way":
            new = replace(new, sums=2 * state.sums - new.sums)
        if self.bug == "a of this round only":
            new = replace(new, sums=new.sums - state.sums)
        return new

    def send(self, state: Sums, round: int, clients: Sequence[str]) -> Messages:
        return super().send(state, 1 if self.bug == "draws of round 1" else round, clients)

    def _model(self, messages: Messages, cohort: Cohort) -> tuple[Tree, Tensor]:
        model, seeds = super()._model(messages, cohort)
        if self.bug == "clients forget a":
            model = {n: x.to(model[n]) for n, x in cohort.initial.items()}
        return model, seeds

    def _factors(self, p: Tensor) -> Tensor:
        if self.bug == "moves times K p":
            return self.candidates * p
        return super()._factors(p)


@dataclass(frozen=True)
class HidesWalking(Steps):
    """Walks, and does not say so: nobody would check the recipe's local settings."""

    walks: ClassVar[bool] = False
