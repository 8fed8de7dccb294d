"""FLoRA: the clients' adapters are stacked, folded into the frozen weights, and begun anew.

Wang et al., NeurIPS 2024 (arXiv 2409.05976), equations 5-8 and Algorithm 1:
W_0 <- W_0 + [B_1, ..., B_m] [p_1 s A_1; ...; p_m s A_m], the weights on one side only. For the next
round every client draws A at random and starts from B = 0. Exact; what is sent down grows with the
number of clients, and who missed rounds is sent their stacks too, or the dense change where that is
smaller (the paper does not say).

Each A is drawn as peft does, A's entries ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), by the client itself
from the run's seed, the round and its name; what is sent holds an empty tensor for each factor, so
that its shape in the reply is known. Heads, which the paper does not have, are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedpeft.folding import Book, follow
from fedpeft.lowrank import concatenate, fresh_pairs, lora_pairs
from fedpeft.strategy import (
    Cohort,
    Message,
    Messages,
    Problem,
    Replies,
    Strategy,
    gather,
)
from fedpeft.streams import derive, torch_stream
from fedpeft.tree import Tree, mean, select, sort, stack


@dataclass(frozen=True)
class State:
    """The heads, the adapter that exports start from (B = 0), s by layer, and the base's book."""

    heads: Tree
    start: Tree
    scaling: dict[str, float]
    seed: int
    book: Book


@dataclass(frozen=True)
class FLoRA(Strategy[State]):
    """W_0 <- W_0 + sum_k p_k s B_k A_k; heads <- their weighted mean."""

    exact: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    folds: ClassVar[bool] = True

    def init(self, problem: Problem) -> State:
        fresh_pairs(problem.initial, "flora")
        heads = select(problem.initial, lambda name: ".lora_" not in name)
        start = select(problem.initial, lambda name: ".lora_" in name)
        seed = derive(problem.seed, "flora")
        return State(heads, start, dict(problem.scaling), seed, Book())

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        return state.book.groups(clients)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        trees, scalars = state.book.news(clients)
        like = {f"{name}.like": t.new_empty((0, *t.shape)) for name, t in state.start.items()}
        trees |= {"heads": state.heads, "like": like}
        seed = derive(state.seed, round).to_bytes(8, "little")
        return Messages.broadcast(clients, trees, scalars, {"seed": seed})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        base = follow(messages, cohort)
        fit = cohort.fit(self.personal(messages, cohort), base=base)
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        stacks = list(replies)
        own, p = gather(stacks, "adapter")
        update = {}
        for layer, (name_a, name_b) in lora_pairs(state.start, "flora").items():
            up, down = concatenate(own[name_b], own[name_a], state.scaling[layer] * p)
            update[layer] = up.to(own[name_b].dtype), down.to(own[name_a].dtype)
        heads = mean([({name: own[name] for name in state.heads}, p)])
        replied = [name for stack in stacks for name in stack.clients]
        book = state.book.received(replied).changed(update)
        return State(heads, state.start, state.scaling, state.seed, book)

    def expects(self, sent: Message) -> dict[str, Tree]:
        like = {n.removesuffix(".like"): t for n, t in sent.trees["like"].items()}
        shapes = {name: t.new_empty(t.shape[1:]) for name, t in like.items()}
        return {"adapter": {**sent.trees["heads"], **shapes}}

    def adapter(self, state: State) -> Tree:
        return sort(state.heads | state.start)

    def base(self, state: State) -> Tree:
        return state.book.total

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        own = [
            fresh(cohort.initial, int.from_bytes(seed, "little"), client)
            for seed, client in zip(messages.blobs["seed"], messages.clients, strict=True)
        ]
        return sort({**messages.trees["heads"], **stack(own)})

    def followed(self, messages: Messages, cohort: Cohort) -> Tree:
        return follow(messages, cohort)


def fresh(initial: Tree, seed: int, client: str) -> Tree:
    """A client's start of a round: A ``[r, d_in]`` at random, of every layer its own, and B = 0."""
    found = {}
    for name_a, name_b in lora_pairs(initial, "flora").values():
        a = initial[name_a]
        stream = torch_stream(seed, "flora", client, name_a)
        uniform = 2 * torch.rand(a.shape, generator=stream, dtype=torch.float64) - 1
        found[name_a] = (uniform / math.sqrt(a.shape[1])).to(a)
        found[name_b] = torch.zeros_like(initial[name_b])
    return found
