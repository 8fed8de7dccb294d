"""LoRA-A2: rounds alternate between B and A, and a client trains only its most important ranks.

Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients",
ACL 2025 (arXiv 2410.22815). All clients hold the same other factor, as in RoLoRA, so rounds are
exact: X <- X + sum_k p_k dX_k. Client k scores rank i of each of N layers by ||dB[:, i] A[i, :]||_F
= ||dB[:, i]|| ||A[i, :]|| (rounds of A: ||B[:, i]|| ||dA[i, :]||), trains the rank * N best of all
layers together, and sends these columns (rows) of dX_k with their numbers, padded to the widest.

Differences: the paper's probe, an epoch of training, is here one gradient over the client's data,
dX = -dF_k/dX, and s multiplies the norms, as it may differ between layers; heads are trained and
averaged, the paper freezes its head; one learning rate, the paper's is 5 times larger for B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import is_a, is_b, lora_pairs
from fedpeft.strategy import Cohort, Message, Messages, Problem, Replies, Strategy
from fedpeft.tree import Tree, add, mean, row, select, sort, sub


@dataclass(frozen=True)
class State:
    """The global adapter, of all ranks that clients may choose from, and s of every layer."""

    adapter: Tree
    scaling: dict[str, float]


@dataclass(frozen=True)
class LoraA2(Strategy[State]):
    """X <- X + sum_k p_k (dX_k of the ranks that k chose); X = B in rounds 1, 3, ..., else A.

    rank: how many ranks a client trains per layer, on average over layers; adapter.r is how many
    there are to choose from, and from rank=adapter.r on all are trained (RoLoRA). Replies name
    their ranks, so their mean is no mean of what they hold: not linear.
    """

    exact: ClassVar[bool] = True

    rank: int = 2

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise FedpeftError(f"strategy.rank={self.rank!r}: a client must train at least 1.")

    def asks(self) -> frozenset[str]:
        return frozenset({"gradients"})

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "lora_a2")
        return State(problem.initial, dict(problem.scaling))

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        frozen = select(state.adapter, is_a if round % 2 else is_b)
        trained = select(state.adapter, lambda name: name not in frozen)
        return Messages.broadcast(clients, {"trained": trained, "frozen": frozen}, state.scaling)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start, fixed = messages.trees["trained"], row(messages.trees["frozen"], 0)
        scored = scores(cohort.gradients(start, fixed=fixed), fixed, messages[0].scalars)
        x, heads = select(start, _lora), select(start, lambda name: not _lora(name))
        table = as_rows(x)
        index = scored.topk(min(self.rank * len(x), scored.shape[1])).indices.sort().values
        where = index[:, :, None].expand(-1, -1, table.shape[2])
        masks = from_rows(torch.zeros_like(table).scatter(1, where, 1.0), x)

        def masked(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
            return gradient | {name: gradient[name] * mask for name, mask in own["masks"].items()}

        fit = cohort.fit(start, fixed=fixed, adjust=masked, own={"masks": masks})
        move = sub(fit.adapter, start)
        ranks = {"index": index.int(), "move": as_rows(select(move, _lora)).gather(1, where)}
        reply = {_letter(x): ranks | {name: move[name] for name in heads}}
        return messages.reply(reply, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        move = mean((self._dense(state, r), r.scalars["weight"]) for r in replies)
        moved = add({name: state.adapter[name] for name in move}, move)
        return State({**state.adapter, **moved}, state.scaling)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        x = select(sent.trees["trained"], _lora)
        table = as_rows(x)
        move = table.new_zeros(min(self.rank * len(x), len(table)), table.shape[1])
        ranks = {"index": torch.zeros(len(move), dtype=torch.int32), "move": move}
        heads = select(sent.trees["trained"], lambda name: not _lora(name))
        return {_letter(x): ranks | heads}

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return sort({**messages.trees["trained"], **messages.trees["frozen"]})

    def _dense(self, state: State, reply: Messages) -> Tree:
        """The moves of a stack of replies, zero where a client did not train; stacked."""
        letter = "A" if "A" in reply.trees else "B"
        x, ranks = select(state.adapter, is_a if letter == "A" else is_b), reply.trees[letter]
        table = as_rows(x)
        index = ranks["index"].long().clamp(0, len(table) - 1)  # whatever a client may claim
        where = index[:, :, None].expand(-1, -1, table.shape[1])
        empty = ranks["move"].new_zeros(len(reply), *table.shape)
        heads = {name: own for name, own in ranks.items() if name in state.adapter}
        return from_rows(empty.scatter(1, where, ranks["move"]), x) | heads


def scores(gradient: Tree, fixed: Tree, scaling: Mapping[str, float]) -> Tensor:
    """s ||dB[:, i]|| ||A[i, :]|| of every rank, or its mirror; ``[K, ranks]`` as in ``as_rows``."""
    found = []
    for name in sorted(filter(_lora, gradient)):
        swap = (".lora_A.", ".lora_B.") if is_a(name) else (".lora_B.", ".lora_A.")
        of_move = gradient[name].norm(dim=2 if is_a(name) else 1)
        of_other = fixed[name.replace(*swap)].norm(dim=0 if is_a(name) else 1)
        found.append(scaling[name.split(swap[0])[0]] * of_move * of_other)
    return torch.cat(found, dim=1)


def as_rows(x: Tree) -> Tensor:
    """A row for every rank of every layer, in the order of names: ``[..., ranks, widest]``."""
    rows = [x[name] if is_a(name) else x[name].mT for name in sorted(x)]
    widest = max(own.shape[-1] for own in rows)
    return torch.cat([pad(own, (0, widest - own.shape[-1])) for own in rows], dim=-2)


def from_rows(rows: Tensor, like: Tree) -> Tree:
    """The factors that ``as_rows`` was given, those of ``like`` in names and last two sizes."""
    found, first = {}, 0
    for name in sorted(like):
        own = like[name] if is_a(name) else like[name].mT
        ranks, width = own.shape[-2:]
        part = rows[..., first : first + ranks, :width]
        found[name], first = part if is_a(name) else part.mT, first + ranks
    return found


def _letter(x: Tree) -> str:
    return "A" if any(map(is_a, x)) else "B"


def _lora(name: str) -> bool:
    return is_a(name) or is_b(name)
