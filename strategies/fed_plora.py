"""Fed-PLoRA: LoRA of rank r as r modules of rank 1, of which each client trains some.

Zhang, Hu and Xu, ICLR 2026 (arXiv 2602.16936): s B A = s sum_j b_j a_j. Client k draws r_k of the
modules (Select-N-Fold), folds the others into its frozen weights for the round, so that it starts
from the global model without error, and trains its own; the server averages every module over the
clients M_j that trained it, a_j <- sum_{k in M_j} p_k a_kj / sum_{k in M_j} p_k, and b_j likewise.
A module that nobody drew stays. With r_k = r for all it is FedAvg. Folding for a round and holding
still are the same thing: W_0 + s B A does not tell where a frozen part is stored.

A client draws layer by layer, from the run's seed, the round and its name; a layer with fewer than
r_k modules has all of them trained. What travels up is the trained modules and their numbers.
s = alpha / r for everybody. Open in our sources: the weights (here p_k). Heads are averaged over
all clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.lowrank import is_a, is_b, lora_pairs
from fedpeft.ranks import assign
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy, group_by
from fedpeft.streams import derive, numpy_stream
from fedpeft.tree import Tree


@dataclass(frozen=True)
class State:
    """The global adapter of rank r, every client's rank, and the seed of the draws."""

    modules: Tree
    ranks: dict[str, int]
    seed: int


@dataclass(frozen=True)
class FedPLoRA(Strategy[State]):
    """a_j, b_j <- their mean by weight over the clients that trained them.

    ranks: drawn among the clients by the run's seed, each for as many; empty: all have adapter.r.
    client_ranks: client -> its rank, for the ones that are known.
    """

    ranks: list[int] = field(default_factory=list)
    client_ranks: dict[str, int] = field(default_factory=dict)

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fed_plora")
        ranks = assign(problem, self.ranks, self.client_ranks)
        return State(problem.initial, ranks, derive(problem.seed, "fed_plora"))

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        return group_by(clients, lambda client: state.ranks[client])

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        (rank,) = {state.ranks[client] for client in clients}
        seed = {"seed": derive(state.seed, round).to_bytes(8, "little")}
        return Messages.broadcast(clients, {"adapter": state.modules}, {"rank": float(rank)}, seed)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start, rank = messages.trees["adapter"], int(messages.scalars["rank"][0])
        index: dict[str, Tensor] = {}
        for layer, names in lora_pairs(cohort.initial, "fed_plora").items():
            a = start[names[0]]
            drawn = [
                pick(int.from_bytes(seed, "little"), client, layer, a.shape[1], rank)
                for client, seed in zip(messages.clients, messages.blobs["seed"], strict=True)
            ]
            index |= dict.fromkeys(names, torch.tensor(drawn, device=a.device))
        masks = {n: spread(n, start[n].new_ones(()), at, start[n]) for n, at in index.items()}

        def masked(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
            return gradient | {name: gradient[name] * mask for name, mask in own["masks"].items()}

        fit = cohort.fit(start, adjust=masked, own={"masks": masks})
        own = {n: taken(n, x, index[n]) if n in index else x for n, x in fit.adapter.items()}
        numbers = {f"{name}.index": at.int() for name, at in index.items() if is_a(name)}
        return messages.reply({"modules": own | numbers}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        total = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in state.modules.items()}
        count = {n: torch.zeros_like(x) for n, x in total.items()}
        for reply in replies:
            own, p = reply.trees["modules"], reply.scalars["weight"]
            for name, value in total.items():
                sent, on = own[name].double(), torch.ones_like(own[name], dtype=torch.float64)
                if is_a(name) or is_b(name):
                    at = own[f"{name.replace('.lora_B.', '.lora_A.')}.index"].long()
                    at = at.clamp(0, value.shape[0 if is_a(name) else 1] - 1)  # whatever is claimed
                    sent, on = (spread(name, x, at, value[None]) for x in (sent, sent.new_ones(())))
                value += torch.tensordot(p.to(value), sent.cpu(), dims=1)
                count[name] += torch.tensordot(p.to(value), on.cpu(), dims=1)
        found = {
            n: torch.where(count[n] > 0, total[n] / count[n].clamp(min=1e-300), x.double()).to(x)
            for n, x in state.modules.items()
        }
        return State(found, state.ranks, state.seed)

    def expects(self, sent: Message) -> dict[str, Tree]:
        rank, found = int(sent.scalars["rank"]), {}
        for name, value in sent.trees["adapter"].items():
            found[name] = value
            if is_a(name) or is_b(name):
                found[name] = value[:rank] if is_a(name) else value[:, :rank]
            if is_a(name):
                few = min(rank, len(value))
                found[f"{name}.index"] = torch.zeros(few, dtype=torch.int32)
        return {"modules": found}

    def adapter(self, state: State) -> Tree:
        return state.modules


def pick(seed: int, client: str, layer: str, modules: int, rank: int) -> list[int]:
    """The numbers of the modules that a client trains in a layer, ascending."""
    chosen = numpy_stream(seed, client, layer).permutation(modules)[:rank]
    return sorted(int(j) for j in chosen)


def taken(name: str, factor: Tensor, index: Tensor) -> Tensor:
    """The rows of A ``[K, r, d_in]`` or columns of B ``[K, d_out, r]`` at ``index`` ``[K, q]``."""
    rows = factor if is_a(name) else factor.mT
    found = rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[2]))
    return found if is_a(name) else found.mT


def spread(name: str, modules: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """What ``taken`` took, or one number for all of it, back in its place; zeros elsewhere."""
    rows = like if is_a(name) else like.mT
    where = index[:, :, None].expand(-1, -1, rows.shape[2])
    put = modules if is_a(name) or not modules.dim() else modules.mT
    empty = put.new_zeros(len(index), *rows.shape[1:])
    found = empty.scatter(1, where, put.expand(where.shape))
    return found if is_a(name) else found.mT
