"""Light-PEFT, federated: a few rounds estimate what matters, then all clients train less of it.

Gu et al., Findings of ACL 2024 (arXiv 2406.03792); one structure for all clients is our way to
federate it. For ``estimate`` rounds everything is trained, and clients' scores averaged,
I <- sum_k p_k I_k, over the second half of them. Then the server removes the lowest: of each
block's heads and channels, by importance; of LoRA's modules, by ||s B A|| / ||W||; of the ranks
that are left, by I_j = |mean A_j dA_j| + |mean B_j dB_j|; exactly the floor of each share, ties by
index. The rest is FedAvg on what is left, and only that travels. The paper learns masks under an L1
penalty, and compares modules' outputs; here groups go by LoRA's gradients, modules by weights.
``estimate: 0`` prunes by weights before the first round, and no module or rank: the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedpeft.errors import FedpeftError
from fedpeft.lowrank import ranks_of, squared_norms
from fedpeft.pruning import schedule
from fedpeft.pruning.importance import RankMeter, Recorder, magnitude
from fedpeft.pruning.structure import Part
from fedpeft.pruning.wire import Common, Plain, parts_of, plain
from fedpeft.strategy import Cohort, Effort, Message, Messages, Problem, Replies, Strategy
from fedpeft.tree import Tree, add, broadcast, mean, row, sort, zeros_like


@dataclass(frozen=True)
class State:
    """The adapter; s, ||W|| by layer; the model's parts, weights; what is there; scores; rounds."""

    adapter: Tree
    scaling: dict[str, float]
    norms: dict[str, float]
    parts: list[Plain]
    weights: int
    common: Common
    scores: Tree
    round: int = 0


@dataclass(frozen=True)
class LightPEFT(Strategy[State]):
    """Everything, then what matters <- the weighted mean of the clients'.

    estimate: rounds before the server decides. heads, channels, modules, ranks: shares that go.
    """

    estimate: int = 2
    heads: float = 1 / 3
    channels: float = 1 / 3
    modules: float = 0.75
    ranks: float = 0.5

    averages: ClassVar[bool] = False
    codable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        shares = (self.heads, self.channels, self.modules, self.ranks)
        if self.estimate < 0 or not all(0 <= share < 1 for share in shares):
            own = f"strategy.estimate={self.estimate}, heads, channels, modules, ranks={shares}"
            raise FedpeftError(f"{own}: rounds must be from 0 up, shares in [0, 1).")

    def asks(self) -> frozenset[str]:
        return frozenset({"pruned"})

    def init(self, problem: Problem) -> State:
        layers, own = ranks_of(problem.initial, "light_peft"), problem.structure()
        groups = {p.name: torch.ones(p.groups) for p in own.parts}
        ranks, scaling = {n: torch.ones(r) for n, r in layers.items()}, dict(problem.scaling)
        alive, scores = {n: v.bool() for n, v in groups.items()}, zeros_like(groups | ranks)
        if self.estimate == 0:
            alive = self._left(own.parts, {p.name: magnitude(own, p)[0].cpu() for p in own.parts})
        common = Common(alive, {n: v.bool() for n, v in ranks.items()})
        norms = {layer: float(problem.weight(layer).norm()) for layer in scaling}
        known = (problem.initial, scaling, norms, plain(own.parts), own.weights)
        return State(*known, common, scores)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        parts, own = parts_of(state.parts), state.common
        scores = {"scores": zeros_like(state.scores)} if state.round < self.estimate else {}
        small = own.take(parts, state.adapter, state.adapter)
        trees = {"adapter": small, "structure": own.bits(parts), **scores}
        return Messages.broadcast(clients, trees)

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        return {name: own for name, own in sent.trees.items() if name != "structure"}

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        structure, common = cohort.structure(), self._common(messages, cohort)
        alive, like = self.pruned(messages, cohort), cohort.initial
        start = common.put(structure.parts, messages.trees["adapter"], like)
        fixed = {n: torch.zeros_like(v) for n, v in like.items() if n not in start}
        none = {name: torch.zeros(there.shape) for name, there in alive.items()}
        meter = RankMeter(Recorder(structure, none), ranks_of(like, "light_peft"))
        estimating = "scores" in messages.trees
        with cohort.pruned(alive):
            adjust = meter.adjust if estimating else None
            fit = cohort.fit(start, fixed=fixed, adjust=adjust, own=meter.own)
        trees = {"adapter": common.take(structure.parts, fit.adapter, like)}
        trees |= {"scores": meter.average} if estimating else {}
        return messages.reply(trees, weight=cohort.weights, loss=fit.loss)

    def receive(self, state: State, replies: Replies) -> State:
        came, number, common = list(replies), state.round + 1, state.common
        parts, scores = parts_of(state.parts), state.scores
        small = mean((r.trees["adapter"], r.scalars["weight"]) for r in came)
        adapter = zeros_like(state.adapter) | common.put(parts, small, state.adapter)
        if self.estimate < 2 * number <= 2 * self.estimate:
            scores = add(scores, mean((r.trees["scores"], r.scalars["weight"]) for r in came))
        if number == self.estimate:
            common = Common(self._left(parts, scores), self._ranks(state, adapter, scores))
            adapter = common.alone(parts, adapter)
        return replace(state, adapter=sort(adapter), common=common, scores=scores, round=number)

    def efforts(self, state: State, clients: Sequence[str]) -> Mapping[str, Effort]:
        own = state.common.shares(parts_of(state.parts), state.weights, state.adapter)
        return dict.fromkeys(clients, Effort(*own))

    def _left(self, parts: Sequence[Part], scores: Tree) -> Tree:
        shares = {"heads": self.heads, "channels": self.channels}
        return schedule.at_once(parts, scores, shares)

    def _ranks(self, state: State, adapter: Tree, scores: Tree) -> Tree:
        """Which ranks stay, of which modules."""
        one = {name: value[None] for name, value in adapter.items()}
        norms = {n: squared_norms(one, {n: s}).sqrt() for n, s in state.scaling.items()}
        values = {n: norm / state.norms[n] for n, norm in norms.items()}
        stay = [n for n, own in schedule.lowest(values, self.modules).items() if bool(own)]
        none = {n: torch.zeros_like(scores[n], dtype=torch.bool) for n in state.scaling}
        return none | schedule.lowest({n: scores[n] for n in stay}, self.ranks)

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        none = broadcast(zeros_like(cohort.initial), len(cohort.clients))
        parts, own = cohort.structure().parts, messages.trees["adapter"]
        return none | self._common(messages, cohort).put(parts, own, cohort.initial)

    def pruned(self, messages: Messages, cohort: Cohort) -> Tree:
        alive, clients = self._common(messages, cohort).alive, len(cohort.clients)
        return {name: own.expand(clients, -1) for name, own in alive.items()}

    def _common(self, messages: Messages, cohort: Cohort) -> Common:
        bits = {n: own.cpu() for n, own in row(messages.trees["structure"], 0).items()}
        return Common.of(cohort.structure().parts, bits, cohort.initial)
