"""FLoRA: the clients' adapters are stacked, folded into the frozen weights, and begun anew.

Wang et al., NeurIPS 2024 (arXiv 2409.05976), equations 5-8 and Algorithm 1:
W_0 <- W_0 + [B_1, ..., B_m] [p_1 s A_1; ...; p_m s A_m], the weights on one side only. For the next
round every client draws A at random and starts from B = 0. Exact; what is sent down grows with the
number of clients, and who missed rounds is sent their stacks too, or the dense change where that is
smaller (the paper does not say). Clients may have unequal ranks r_k: stacks only get wider. s is
the same for all; the authors' code has s_k = alpha_k / r_k.

Each A is drawn as peft does, A's entries ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), by the client itself
from the run's seed, the round and its name; what is sent holds an empty tensor for each factor, so
that its shape in the reply is known. Heads, which the paper does not have, are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedpeft.folding import Book, follow
from fedpeft.lowrank import concatenate, fresh_pairs, lora_pairs
from fedpeft.ranks import assign, lead, widen
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, group_by
from fedpeft.streams import derive, torch_stream
from fedpeft.tree import Tree, mean, select, sort, stack


@dataclass(frozen=True)
class State:
    """Heads, the LoRA that exports start from (B = 0), s by layer, clients' ranks, the base."""

    heads: Tree
    start: Tree
    scaling: dict[str, float]
    ranks: dict[str, int]
    seed: int
    book: Book


@dataclass(frozen=True)
class FLoRA(Strategy[State]):
    """W_0 <- W_0 + sum_k p_k s B_k A_k; heads <- their weighted mean.

    ranks: drawn among the clients by the run's seed, each for as many; empty: all have adapter.r.
    client_ranks: client -> its rank, for the ones that are known.
    """

    exact: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    folds: ClassVar[bool] = True

    ranks: list[int] = field(default_factory=list)
    client_ranks: dict[str, int] = field(default_factory=dict)

    def init(self, problem: Problem) -> State:
        fresh_pairs(problem.initial, "flora")
        heads = select(problem.initial, lambda name: ".lora_" not in name)
        start = select(problem.initial, lambda name: ".lora_" in name)
        seed = derive(problem.seed, "flora")
        ranks = assign(problem, self.ranks, self.client_ranks)
        return State(heads, start, dict(problem.scaling), ranks, seed, Book())

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        same_rank = group_by(clients, lambda client: state.ranks[client])
        return [group for part in same_rank for group in state.book.groups(part)]

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        trees, scalars = state.book.news(clients)
        (rank,) = {state.ranks[client] for client in clients}
        own = lead(state.start, rank)
        like = {f"{name}.like": t.new_empty((0, *t.shape)) for name, t in own.items()}
        trees |= {"heads": state.heads, "like": like}
        seed = derive(state.seed, round).to_bytes(8, "little")
        return Messages.broadcast(clients, trees, scalars, {"seed": seed})

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        base = follow(messages, cohort)
        start = self._start(messages)
        fit = cohort.fit(start, base=base, expand=widen(cohort.initial))
        return messages.reply({"adapter": fit.adapter}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        stacks = list(replies)
        total = sum(float(r.scalars["weight"].sum()) for r in stacks)
        own = [(r.trees["adapter"], r.scalars["weight"] / total) for r in stacks]
        update = {}
        for layer, (name_a, name_b) in lora_pairs(state.start, "flora").items():
            s = state.scaling[layer]
            parts = [concatenate(x[name_b], x[name_a], s * p) for x, p in own]
            up, down = torch.cat([b for b, _ in parts], 1), torch.cat([a for _, a in parts])
            like = state.start[name_a].dtype
            update[layer] = up.to(like), down.to(like)
        heads = mean(({n: x[n] for n in state.heads}, p) for x, p in own) if state.heads else {}
        book = state.book.received(n for r in stacks for n in r.clients).changed(update)
        return replace(state, heads=heads, book=book)

    def expects(self, sent: Message) -> dict[str, Tree]:
        like = {n.removesuffix(".like"): t for n, t in sent.trees["like"].items()}
        shapes = {name: t.new_empty(t.shape[1:]) for name, t in like.items()}
        return {"adapter": {**sent.trees["heads"], **shapes}}

    def adapter(self, state: State) -> Tree:
        return sort(state.heads | state.start)

    def base(self, state: State) -> Tree:
        return state.book.total

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return widen(cohort.initial)(self._start(messages))

    def followed(self, messages: Messages, cohort: Cohort) -> Tree:
        return follow(messages, cohort)

    def _start(self, messages: Messages) -> Tree:
        """What these clients begin the round with, stacked, of their own rank."""
        like = self.expects(messages[0])["adapter"]
        own = [
            fresh(like, int.from_bytes(seed, "little"), client)
            for seed, client in zip(messages.blobs["seed"], messages.clients, strict=True)
        ]
        return sort({**messages.trees["heads"], **stack(own)})


def fresh(like: Tree, seed: int, client: str) -> Tree:
    """A client's start of a round: A ``[r, d_in]`` at random, of every layer its own, and B = 0."""
    found = {}
    for name_a, name_b in lora_pairs(like, "flora").values():
        a = like[name_a]
        stream = torch_stream(seed, "flora", client, name_a)
        uniform = 2 * torch.rand(a.shape, generator=stream, dtype=torch.float64) - 1
        found[name_a] = (uniform / math.sqrt(a.shape[1])).to(a)
        found[name_b] = torch.zeros_like(like[name_b])
    return found
