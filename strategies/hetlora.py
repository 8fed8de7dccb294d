"""HetLoRA: clients of unequal ranks, which shrink where the last columns do little.

Cho et al., EMNLP 2024 (arXiv 2401.06432), section 4. The server keeps factors of rank r; client k
is sent its first r_k columns of B and rows of A, and minimises
F_k + lambda ||B[:, c:]|| ||A[c:, :]|| with c = floor(gamma r_k); where that product fell, it goes
on with r_k <- max(r_min, c). The server pads with zeros and weights by the size of the updates,
A <- sum_k w_k pad(A_k), B <- sum_k w_k pad(B_k), w_k = ||B_k A_k|| / sum_j ||B_j A_j||.

Norms are over all LoRA layers together, ||B_k A_k|| through Grams and with each layer's s; the
paper leaves both open. Heads, which it does not have, are averaged by the recipe's weights. What a
client has just cut off it sends once more, as zeros. Not exact: factors are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedpeft.bandits.agents import Bandits, Policy, seen_of_ranks
from fedpeft.bandits.arms import pick
from fedpeft.errors import FedpeftError
from fedpeft.lowrank import is_a, is_b, lora_pairs, squared_norms
from fedpeft.ranks import assign, chosen, lead, padded, penalty_gradient, tail, tails, widen
from fedpeft.strategy import Cohort, Effort, Messages, Problem, Replies, Strategy, gather, group_by
from fedpeft.tree import Tree, mean, numel, sort


@dataclass(frozen=True)
class State:
    """The global adapter of rank r, s by layer, and every client's rank; what bandits know."""

    adapter: Tree
    scaling: dict[str, float]
    ranks: dict[str, int]
    bandits: Bandits
    losses: dict[str, float]
    options: tuple[int, ...]


@dataclass(frozen=True)
class HetLoRA(Strategy[State]):
    """Padded factors <- their mean weighted by the size of the updates; ranks only shrink.

    ranks: drawn among the clients by the run's seed, each for as many; empty: all have adapter.r.
    client_ranks: client -> its rank, for the ones that are known. gamma, penalty, least: of the
    paper's gamma, lambda and r_min. bandit: each client's rank is chosen from ``ranks`` (empty: 2,
    4, 8, ... adapter.r) anew after every round, by the fall of its loss and by its time.
    """

    tells: ClassVar[tuple[str, ...]] = ("rank",)

    ranks: list[int] = field(default_factory=list)
    client_ranks: dict[str, int] = field(default_factory=dict)
    gamma: float = 0.99
    penalty: float = 0.01
    least: int = 1
    bandit: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.gamma <= 1 and self.penalty >= 0 and self.least >= 1):
            raise FedpeftError(
                f"strategy.gamma={self.gamma}, penalty={self.penalty}, least={self.least}: they "
                f"must lie in (0, 1], in [0, inf) and from 1 up; gamma=1 never prunes."
            )

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "hetlora")
        bandits, options = Bandits(problem.seed), chosen(problem.initial, self.ranks)
        first = [pick(options, 0.5)] if self.bandit else self.ranks
        ranks = assign(problem, first, {} if self.bandit else self.client_ranks)
        return State(problem.initial, dict(problem.scaling), ranks, bandits, {}, options)

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        return group_by(clients, lambda client: state.ranks[client])

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        (rank,) = {state.ranks[client] for client in clients}
        scalars = {"rank": float(rank)}
        return Messages.broadcast(clients, {"adapter": lead(state.adapter, rank)}, scalars)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        start, rank = messages.trees["adapter"], int(messages.scalars["rank"][0])
        cut = rank if self.bandit else max(self.least, int(self.gamma * rank + 1e-9))

        def penalised(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
            added = penalty_gradient(adapter, cut)
            return gradient | {n: gradient[n] + self.penalty * g for n, g in added.items()}

        adjust = penalised if self.penalty > 0 and cut < rank else None
        fit = cohort.fit(start, adjust=adjust, expand=widen(cohort.initial))
        (a_then, b_then), (a_now, b_now) = tails(start, cut), tails(fit.adapter, cut)
        pruned = a_now * b_now < a_then * b_then
        kept = {
            n: torch.where(pruned[:, None, None], v - tail(n, v, cut), v) if v.dim() == 3 else v
            for n, v in fit.adapter.items()
        }
        ranks = torch.where(pruned, float(cut), float(rank))
        return messages.reply({"adapter": kept}, weight=cohort.weights, loss=fit.loss, rank=ranks)

    def receive(self, state: State, replies: Replies) -> State:
        stacks = list(padded(replies, "adapter", state.adapter))
        ranks = dict(state.ranks)
        for reply in stacks:
            ranks |= zip(reply.clients, map(int, reply.scalars["rank"].tolist()), strict=True)
        own, p = gather(stacks, "adapter")
        sizes = squared_norms(own, state.scaling).sqrt()
        w = sizes / sizes.sum() if bool(sizes.sum() > 0) else p
        factors = {n: v for n, v in own.items() if is_a(n) or is_b(n)}
        heads = {n: v for n, v in own.items() if n not in factors}
        merged = mean([(factors, w)]) | (mean([(heads, p)]) if heads else {})
        after = replace(state, adapter=sort(merged), ranks=ranks)
        return self._chosen(after, stacks) if self.bandit else after

    def _chosen(self, state: State, stacks: Sequence[Messages]) -> State:
        """Every client whose loss was known before has its next rank."""
        loss = {
            c: x for s in stacks for c, x in zip(s.clients, s.scalars["loss"].tolist(), strict=True)
        }
        fall = {c: state.losses[c] - x for c, x in loss.items() if c in state.losses}
        size = [float(numel(lead(state.adapter, state.ranks[c]))) for c in fall]
        seen = seen_of_ranks(fall, torch.tensor(size), state.bandits.seed)
        bandits = state.bandits.closed(self._policy(state), seen)
        return self._next(replace(state, bandits=bandits, losses=state.losses | loss))

    def _policy(self, state: State) -> Policy:
        return Policy("grid", state.options, levels=(0.0,))

    def _next(self, state: State) -> State:
        names = state.bandits.seen.clients
        ranks = state.bandits.orders(self._policy(state), names)[1].tolist()
        return replace(state, ranks=state.ranks | dict(zip(names, ranks, strict=True)))

    def told(self, state: State, times: Mapping[str, float]) -> State:
        if not self.bandit:
            return state
        bandits = state.bandits.timed(self._policy(state), times)
        return self._next(replace(state, bandits=bandits))

    def efforts(self, state: State, clients: Sequence[str]) -> Mapping[str, Effort]:
        full = max(len(value) for name, value in state.adapter.items() if is_a(name))
        return {client: Effort(adapter=state.ranks[client] / full) for client in clients}

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        return widen(cohort.initial)(messages.trees["adapter"])
