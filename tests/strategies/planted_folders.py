"""Strategies that change the base, send in groups or exchange twice, each with bugs to plant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedpeft import tree
from fedpeft.folding import Book, follow
from fedpeft.lowrank import concatenate, lora_pairs
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, gather
from fedpeft.strategy import weighted_mean as weighted
from fedpeft.tree import Tree


@dataclass(frozen=True)
class Kept:
    """The adapter, s by layer, and what was folded."""

    adapter: Tree
    scaling: dict[str, float]
    book: Book


@dataclass(frozen=True)
class Folder(Strategy[Kept]):
    """FedAvg of the factors; the whole residual goes into the base."""

    exact: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    bug: str = ""

    def init(self, problem: Problem) -> Kept:
        lora_pairs(problem.initial, "folder")
        return Kept(problem.initial, dict(problem.scaling), Book())

    def groups(self, state: Kept, clients: Sequence[str]) -> list[tuple[str, ...]]:
        found = state.book.groups(clients)
        if self.bug == "a group is forgotten":
            return found[:1]
        return found + found[-1:] if self.bug == "a group twice" else found

    def send(self, state: Kept, round: int, clients: Sequence[str]) -> Messages:
        trees, scalars = state.book.news(clients)
        return Messages.broadcast(clients, {"adapter": state.adapter, **trees}, scalars)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        base = {} if self.bug == "trains on the old base" else follow(messages, cohort)
        fit = cohort.fit(messages.trees["adapter"], base=base)
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: Kept, replies: Replies) -> Kept:
        stacks = list(replies)
        own, p = gather(stacks, "adapter")
        merged, update = tree.mean([(own, p)]), {}
        for layer, (a, b) in lora_pairs(merged, "folder").items():
            off_b = own[b].double() - merged[b].double()
            up, down = concatenate(off_b, own[a], p)
            s = 1.0 if self.bug == "s forgotten in the residual" else state.scaling[layer]
            dense = s * up @ down
            dense = self._spoilt(dense)
            eye = torch.eye(dense.shape[1], dtype=merged[a].dtype)
            update[layer] = dense.to(merged[b].dtype), eye
        replied = [name for stack in stacks for name in stack.clients]
        if self.bug == "all are held to have followed":
            replied = [f"client-{k}" for k in range(5)]
        book = state.book
        if self.bug == "the last residual only":
            book = replace(book, total={}, recent={})
        return Kept(merged, state.scaling, book.received(replied).changed(update))

    def _spoilt(self, dense: Tensor) -> Tensor:
        if self.bug == "transposed residual" and dense.shape[0] == dense.shape[1]:
            return dense.mT
        return -dense if self.bug == "residual taken away" else dense

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {"adapter": sent.trees["adapter"]}

    def adapter(self, state: Kept) -> Tree:
        return state.adapter

    def base(self, state: Kept) -> Tree:
        return state.book.total

    def followed(self, messages: Messages, cohort: Cohort) -> Tree:
        return {} if self.bug == "measured on the old base" else follow(messages, cohort)


@dataclass(frozen=True)
class HidesFolding(Folder):
    """Folds, and does not say so."""

    folds: ClassVar[bool] = False


@dataclass(frozen=True)
class HidesKeeping(Folder):
    """Its clients keep what they were sent, and it does not say so."""

    keeps: ClassVar[bool] = False


@dataclass(frozen=True)
class Halves:
    """The adapter; the mean of the factors between the exchanges."""

    adapter: Tree
    half: Tree


@dataclass(frozen=True)
class Twice(Strategy[Halves]):
    """FedAvg in two exchanges: the factors come first, the other tensors in the second."""

    exchanges: ClassVar[int] = 2
    linear: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    bug: str = ""

    def init(self, problem: Problem) -> Halves:
        return Halves(problem.initial, {})

    def send(self, state: Halves, round: int, clients: Sequence[str]) -> Messages:
        if not state.half:
            return Messages.broadcast(clients, {"adapter": state.adapter})
        rest = tree.select(state.adapter, lambda name: ".lora_" not in name)
        return Messages.broadcast(clients, {"rest": rest})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        if "rest" in messages.trees:
            like = messages.trees["rest"] | {"loss": cohort.weights}
            own = cohort.recall("rest", like)
            loss = own.pop("loss")
            cohort.remember("rest", {})
            if self.bug == "the neighbour's rest":
                own = {n: x.roll(1, 0) for n, x in own.items()}
            return messages.reply({"rest": own}, weight=cohort.weights, loss=loss)
        fit = cohort.fit(messages.trees["adapter"])
        rest = tree.select(fit.adapter, lambda name: ".lora_" not in name)
        cohort.remember("rest", rest | {"loss": fit.loss})
        own = tree.select(fit.adapter, lambda name: ".lora_" in name)
        return messages.reply({"factors": own}, weight=cohort.weights, loss=fit.loss)

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        if "rest" in sent.trees:
            return {"rest": sent.trees["rest"]}
        return {"factors": tree.select(sent.trees["adapter"], lambda name: ".lora_" in name)}

    def receive(self, state: Halves, replies: Replies) -> Halves:
        if not state.half:
            return replace(state, half=weighted(replies, "factors"))
        rest = weighted(replies, "rest")
        if self.bug == "the second exchange is lost":
            rest = tree.select(state.adapter, lambda name: ".lora_" not in name)
        half = {} if self.bug == "the first exchange is lost" else state.half
        return Halves(tree.sort({**state.adapter, **half, **rest}), {})

    def adapter(self, state: Halves) -> Tree:
        return state.adapter
