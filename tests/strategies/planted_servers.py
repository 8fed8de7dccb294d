"""Small servers, right as they stand and each wrong in ways of its own under ``bug``.

The faults are those that papers' own code had (spec lora.md, section 10) and that reviews met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedavg import State as Adapter
from fedpeft.strategies.ffa_lora import FfaLora
from fedpeft.strategy import (
    Cohort,
    Effort,
    Message,
    Messages,
    Problem,
    Replies,
    Strategy,
    weighted_mean,
)
from fedpeft.tree import Tree

A, B, HEAD = ".lora_A.", ".lora_B.", ".modules_to_save."
SEEN: list[Tree] = []


def gather(replies: Replies, part: str = "adapter") -> tuple[Tree, Tensor]:
    """All replies as one stack, and their weights p of sum 1."""
    stacks = list(replies)
    w = torch.cat([r.scalars["weight"] for r in stacks])
    names = stacks[0].trees[part]
    return {n: torch.cat([r.trees[part][n] for r in stacks]) for n in names}, w / w.sum()


def mean(p: Tensor, stacked: Tree) -> Tree:
    return {n: torch.einsum("k,k...->...", p.to(x.dtype), x) for n, x in stacked.items()}


def lora(adapter: Tree) -> Tree:
    return tree.select(adapter, lambda name: ".lora_" in name)


def in_turn(own: Tree) -> Tree:
    found = {}
    for name, value in own.items():
        found[name] = value[0]
        for one in value[1:]:
            found[name] = (found[name] + one) / 2
    return found


def in_place(state: Tree, new: Tree) -> Tree:
    for name, value in state.items():
        value.copy_(new[name])
    return state


def with_all_before(new: Tree) -> Tree:
    SEEN.append(new)
    same = [t for t in SEEN if all(t[n].dtype == x.dtype for n, x in new.items())]
    fits = [t for t in same if all(t[n].shape == x.shape for n, x in new.items())]
    return tree.mean([(tree.stack(fits), torch.ones(len(fits)))])


Rule = Callable[[Tensor, Tree, Tree], Tree]

RULES: dict[str, Rule] = {
    "": lambda p, own, w: mean(p, own),
    "weights ignored": lambda p, own, w: mean(p * 0 + 1 / len(p), own),
    "weights not normalised": lambda p, own, w: mean(p * len(p), own),
    "weights squared": lambda p, own, w: mean(p**2 / (p**2).sum(), own),
    "weights ignored in lora": lambda p, own, w: mean(p, own) | mean(p * 0 + 1 / len(p), lora(own)),
    "only client 0": lambda p, own, w: tree.row(own, 0),
    "only client 0 in lora": lambda p, own, w: mean(p, own) | tree.row(lora(own), 0),
    "divided by all clients": lambda p, own, w: tree.scale(
        mean(p, own), len(p) / 5 if len(p) > 1 else 1.0
    ),
    "mean of squares": lambda p, own, w: mean(p, {n: x.square() for n, x in own.items()}),
    "divided by the count": lambda p, own, w: tree.scale(mean(p, own), 1 / len(p)),
    "times the largest weight": lambda p, own, w: tree.scale(mean(p, own), float(p.max())),
    "result in float64": lambda p, own, w: {n: x.double() for n, x in mean(p, own).items()},
    "noise without a seed": lambda p, own, w: {
        n: x + 1e-6 * torch.randn_like(x) for n, x in mean(p, own).items()
    },
    "half a step": lambda p, own, w: {n: (x + w[n]) / 2 for n, x in mean(p, own).items()},
    "half of what came before": lambda p, own, w: in_turn(own),
    "writes into the state": lambda p, own, w: in_place(w, mean(p, own)),
    "history in the module": lambda p, own, w: with_all_before(mean(p, own)),
    "head trained and lost": lambda p, own, w: (
        mean(p, own) | tree.select(w, lambda name: HEAD in name)
    ),
}


@dataclass(frozen=True)
class Mean(FedAvg):
    """FedAvg by one of the RULES, or with another fault."""

    bug: str = ""
    linear: ClassVar[bool] = False

    def receive(self, state: Adapter, replies: Replies) -> Adapter:
        if self.bug == "only the last stack":
            for reply in replies:
                state = Adapter(weighted_mean([reply], "adapter"))
            return state
        own, p = gather(replies)
        return Adapter(tree.sort(RULES.get(self.bug, RULES[""])(p, own, state.adapter)))

    def adapter(self, state: Adapter) -> Tree:
        if self.bug == "a tensor is missing":
            return tree.select(state.adapter, lambda name: "bias" not in name)
        return state.adapter


@dataclass(frozen=True)
class Slow(FedAvg):
    """FedAvg whose clients' efforts, or times, are told wrongly."""

    bug: str = ""

    def efforts(self, state: Adapter, clients: Sequence[str]) -> Mapping[str, Effort]:
        share = 1.0 if self.bug == "everything pruned" else 0.5
        if self.bug == "all that there are":
            clients = [*clients, "another"]
        if self.bug == "by place":
            return {c: Effort(adapter=1 / (1 + k)) for k, c in enumerate(clients)}
        return dict.fromkeys(clients, Effort(pruned=share))

    def told(self, state: Adapter, times: Mapping[str, float]) -> Adapter:
        if self.bug == "writes into the state":
            next(iter(state.adapter.values())).add_(1.0)
        return state


@dataclass(frozen=True)
class Claim(Mean):
    """FedAvg that says of itself what is not so; ``bug`` as in Mean."""

    linear: ClassVar[bool] = True


@dataclass(frozen=True)
class ClaimsExact(FedAvg):
    exact: ClassVar[bool] = True


@dataclass(frozen=True)
class HidesExact(FfaLora):
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Past:
    """An adapter, and what else a server kept."""

    adapter: Tree
    kept: Any = None


@dataclass(frozen=True)
class History(Strategy[Past]):
    """FedAvg, with faults of what the state remembers."""

    bug: str = ""

    def init(self, problem: Problem) -> Past:
        return Past(problem.initial, {"odd"} if self.bug == "a set in the state" else [])

    def send(self, state: Past, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: Past, replies: Replies) -> Past:
        new = weighted_mean(replies, "adapter")
        if self.bug == "averages over history":
            every = [*state.kept, new]
            return Past(tree.mean([(tree.stack(every), torch.ones(len(every)))]), every)
        if self.bug == "a round behind":
            return Past(state.kept[-1] if state.kept else state.adapter, [new])
        return Past(new, state.kept)

    def adapter(self, state: Past) -> Tree:
        return state.adapter


@dataclass(frozen=True)
class Svd(Strategy[Past]):
    """FlexLoRA: the mean update, back to rank r by a dense SVD: B = U S / s, A = V^T."""

    bug: str = ""

    def init(self, problem: Problem) -> Past:
        return Past(problem.initial, dict(problem.scaling))

    def send(self, state: Past, round: int, clients: Sequence[str]) -> Messages:
        return Messages.broadcast(clients, {"adapter": state.adapter})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fit = cohort.fit(messages.trees["adapter"])
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: Past, replies: Replies) -> Past:
        own, p = gather(replies)
        new = mean(p, own)
        for layer, s in state.kept.items():
            a, b = f"{layer}{A}default.weight", f"{layer}{B}default.weight"
            if self.bug == "factors by shape" and own[b].shape[1] == own[a].shape[1]:
                a, b = b, a
            q = p**2 if self.bug == "weights on both factors" else p
            scale = 1.0 if self.bug == "s forgotten in the mean" else s
            dense = scale * torch.einsum("k,kor,kri->oi", q, own[b].double(), own[a].double())
            if self.bug == "by the norms of ranks":
                dense = dense / own[a].norm(dim=2).clamp(max=1).sign().prod()
            if self.bug == "transposed" and dense.shape[0] == dense.shape[1]:
                dense = dense.mT
            new[b], new[a] = self._factors(dense, s, own[b], own[a].shape[1])
        return Past(tree.sort(new), state.kept)

    def _factors(self, dense: Tensor, s: float, like: Tensor, r: int) -> tuple[Tensor, Tensor]:
        u, values, vt = torch.linalg.svd(dense, full_matrices=False)
        values = values.sqrt() if self.bug == "root of S on one side" else values
        divisor = 1.0 if self.bug == "alpha over r forgotten" else s
        rank = r - 1 if self.bug == "a rank lost" else r
        b, a = u[:, :r] * values[:r] / divisor, vt[:r].clone()
        b[:, rank:] = 0
        return b.to(like), a.to(like)

    def adapter(self, state: Past) -> Tree:
        return state.adapter


@dataclass(frozen=True)
class Momentum(Strategy[Past]):
    """Trains B in odd rounds, A in even ones; heads always; server momentum on what was trained."""

    averages: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    bug: str = ""
    beta: float = 0.9

    def init(self, problem: Problem) -> Past:
        return Past(problem.initial, [tree.zeros_like(problem.initial), 1])

    def send(self, state: Past, round: int, clients: Sequence[str]) -> Messages:
        other = A if round % 2 else B
        parts = {"active": lambda n: other not in n, "frozen": lambda n: other in n}
        split = {part: tree.select(state.adapter, keep) for part, keep in parts.items()}
        return Messages.broadcast(clients, split)

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {"active": sent.trees["active"]}

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        fixed = tree.row(messages.trees["frozen"], 0)
        fit = cohort.fit(messages.trees["active"], fixed=fixed)
        return messages.reply({"active": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: Past, replies: Replies) -> Past:
        new, (velocity, round) = weighted_mean(replies, "active"), state.kept
        beta = self.beta**2 if self.bug == "beta squared" else self.beta
        step = {n: beta * velocity[n] + x - state.adapter[n] for n, x in new.items()}
        if self.bug == "moves what is frozen":
            step = {n: beta * v for n, v in velocity.items()} | step
        moved = {n: state.adapter[n] + x for n, x in step.items()}
        return Past({**state.adapter, **moved}, [{**velocity, **step}, round + 1])

    def adapter(self, state: Past) -> Tree:
        return tree.sort(state.adapter)

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return tree.sort({**messages.trees["active"], **messages.trees["frozen"]})
