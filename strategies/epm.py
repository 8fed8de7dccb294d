"""EPM: clients train parts of the adapter within their budgets; every number has its own mean.

Zhou et al., "Every Parameter Matters", NeurIPS 2023 (arXiv 2310.08670): client k has a mask m_k, is
sent w * m_k, steps along m_k * gradient, and the server takes, entry by entry, the mean over the
clients that trained it, w_e <- sum_{k: m_ke = 1} p_k w_ke / sum_{k: m_ke = 1} p_k. What nobody
trained stays; the paper assumes that there is no such entry. Its error falls with Gamma_min, the
fewest clients of an entry, and grows with delta^2, what masks take off the weights; both are in
every round's figures. The masks of HeteroFL, FjORD, FedRolex and others are policies of this rule.

The paper's mean is that of rounds.weighting=equal. Rounds without a result do not count for
``rolling`` and the draws. Differences: FjORD draws a width at every step, here ordered_dropout
draws once in a round; clipping comes before the mask of elements. s = alpha / r for everybody, so
that a part of the ranks is the model of that rank. Heads are trained by everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fedpeft import masks
from fedpeft.coverage import Coverage, reduction, update_reduction
from fedpeft.lowrank import lora_pairs
from fedpeft.masks import Ask, Level
from fedpeft.ranks import deal, widen
from fedpeft.strategy import Cohort, Effort, Messages, Problem, Replies, Strategy, group_by
from fedpeft.streams import derive
from fedpeft.tree import Tree, broadcast, select, sort, zeros_like


@dataclass(frozen=True)
class State:
    """The global adapter, s by layer, the clients' budgets; rounds with a result, their figures."""

    adapter: Tree
    scaling: dict[str, float]
    budgets: dict[str, float]
    seed: int
    turn: int
    figures: dict[str, float | list[float]]


@dataclass(frozen=True)
class EPM(Strategy[State]):
    """w_e <- its mean by weight over the clients whose mask has e.

    policy, level: see ``fedpeft.masks``. budgets: shares of the units (quartile: types 1 to 7),
    drawn among the clients by the run's seed, each for as many; empty: everybody trains all.
    client_budgets: client -> its budget, for the ones that are known. uncovered: clients that did
    not train an entry have no say in it (the paper), or vote for its old value.
    """

    policy: str = "rolling"
    level: Level = "ranks"
    budgets: list[float] = field(default_factory=list)
    client_budgets: dict[str, float] = field(default_factory=dict)
    uncovered: Literal["silent", "old"] = "silent"

    def __post_init__(self) -> None:
        masks.check(self.policy, [*self.budgets, *self.client_budgets.values()])

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "epm")
        budgets = deal(problem, self.budgets or [1.0], self.client_budgets, "budgets")
        scaling, seed = dict(problem.scaling), derive(problem.seed, "epm")
        ask = Ask(("",), (max(budgets.values()),), 0, seed)
        masks.masks(self.policy, self.level, problem.initial, ask)  # refuses what it cannot divide
        return State(problem.initial, scaling, budgets, seed, 0, {})

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        ask = self._ask(state, clients)
        widths = sorted(set(ask.budgets))
        keys = [widths.index(budget) for budget in ask.budgets]
        if self.level == "modules":
            keys = masks.pattern(self._masks(state, clients))
        return group_by(clients, dict(zip(clients, keys, strict=True)).__getitem__)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        own = self._masks(state, clients)
        part = masks.take(self.level, broadcast(state.adapter, len(clients)), own)
        blobs = {"masks": masks.to_bytes(own)} if self.level == "elements" else {}
        return Messages(tuple(clients), {"adapter": part}, blobs=blobs)

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        part = messages.trees["adapter"]
        if self.level == "elements":
            own = masks.from_bytes(messages.blobs["masks"], cohort.initial)
            fit = cohort.fit(masks.put(part, own), adjust=_masked, own={"masks": own})
            trained = masks.take(self.level, fit.adapter, own)
        else:
            absent = zeros_like(select(cohort.initial, lambda name: name not in part))
            fit = cohort.fit(part, fixed=absent, expand=widen(cohort.initial))
            trained = fit.adapter
        return messages.reply({"adapter": trained}, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        cover, clients, noise = Coverage(state.adapter), 0, []
        for reply in replies:
            own = self._masks(state, reply.clients)
            cover.add(masks.put(reply.trees["adapter"], own), own, reply.scalars["weight"])
            dense = update_reduction(state.adapter, own, state.scaling)
            noise.append(torch.stack([reduction(state.adapter, own), dense]))
            clients += len(reply)
        each = torch.cat(noise, dim=1)
        figures: dict[str, float | list[float]] = {
            "gamma_min": cover.least(),
            "coverage": [*cover.histogram(clients)],
            "reduction_max": each.amax(1).tolist(),
            "reduction_mean": each.mean(1).tolist(),
        }
        merged = cover.mean() if self.uncovered == "silent" else cover.fill()
        return replace(state, adapter=merged, turn=state.turn + 1, figures=figures)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def figures(self, state: State) -> Mapping[str, float | Sequence[float]]:
        return state.figures

    def efforts(self, state: State, clients: Sequence[str]) -> Mapping[str, Effort]:
        own = zip(clients, self._ask(state, clients).budgets, strict=True)
        return {c: Effort(adapter=b) for c, b in own if self.level == "ranks" and b <= 1}

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        part = messages.trees["adapter"]
        if self.level == "elements":
            return sort(masks.put(part, masks.from_bytes(messages.blobs["masks"], cohort.initial)))
        empty = broadcast(zeros_like(cohort.initial), len(messages))
        return sort(empty | widen(cohort.initial)(part))

    def _ask(self, state: State, clients: Sequence[str]) -> Ask:
        own = tuple(state.budgets[client] for client in clients)
        ask = Ask(tuple(clients), own, state.turn, state.seed)
        if self.policy != "ordered_dropout":
            return ask
        return masks.draw_budgets(ask, [*(self.budgets or [1.0]), *self.client_budgets.values()])

    def _masks(self, state: State, clients: Sequence[str]) -> Tree:
        return masks.masks(self.policy, self.level, state.adapter, self._ask(state, clients))


def _masked(gradient: Tree, adapter: Tree, own: Mapping[str, Tree]) -> Tree:
    return gradient | {name: gradient[name] * mask for name, mask in own["masks"].items()}
