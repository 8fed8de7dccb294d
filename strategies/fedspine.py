"""FedSpine: clients prune and tune in turns; a bandit per client says how much, and at which rank.

Yao et al. (arXiv 2501.02438); what is not public of it is completed (``fedpeft.bandits``). Client
k is ordered (p_k, r_k): it prunes P_k <- min(P*, 1 - (1 - P_k)(1 - p_k)) of the heads and channels
of every block, the least important by LoRA's gradients (from its second round on, when it has
some), trains r_k rows of A and columns of B on what is left, and replies with them. The server
takes, entry by entry, the mean over the clients that have it, with w_k = n_k ||B_k A_k|| /
sqrt(share left), or n_k, or the norm: ``factor`` of A and B; ``r2sp``: who lacks it votes for the
old value; ``product``: of s B A, split by SVD. Beside bandits: policies ``random`` and ``fixed``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedpeft import partial_means
from fedpeft.bandits.agents import Bandits, Kind, Policy
from fedpeft.lowrank import lora_pairs
from fedpeft.pruning import schedule, wire
from fedpeft.pruning.importance import Recorder
from fedpeft.pruning.roll import Roll
from fedpeft.pruning.structure import pack, unpack
from fedpeft.ranks import chosen, lead, widen
from fedpeft.strategy import Cohort, Effort, Message, Messages, Problem, Replies, Strategy, group_by
from fedpeft.tree import Tree, broadcast


@dataclass(frozen=True)
class State:
    """The adapter, s by layer, the ranks to choose from, what clients have, and their bandits."""

    adapter: Tree
    scaling: dict[str, float]
    ranks: tuple[int, ...]
    roll: Roll
    bandits: Bandits


@dataclass(frozen=True)
class FedSpine(Strategy[State]):
    """A, B <- means over the clients that have each entry; heads <- their weighted mean.

    target: P*. step: the largest p_k. ranks: r_k is one of them; empty: 2, 4, 8, ... adapter.r.
    weights: ``norm_samples``, ``samples``, ``norm``. reward: ``spine``, ``fedmp``. probe: of loss.
    """

    target: float = 0.5
    step: float = 0.1
    ranks: list[int] = field(default_factory=list)
    policy: Kind = "grid"
    aggregate: Literal["factor", "product", "r2sp"] = "factor"
    weights: str = "norm_samples"
    reward: str = "spine"
    probe: int = 64

    remembers: ClassVar[bool] = True
    averages: ClassVar[bool] = False
    codable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        partial_means.check(self.weights, self.target, self.step, self.probe)
        self._policy((1,))

    def _policy(self, ranks: tuple[int, ...]) -> Policy:
        return Policy(self.policy, ranks, step=self.step, reward=self.reward)

    def _orders(self, state: State, clients: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Of these clients: what they prune, what is gone then, and their rank; ``[K]`` each."""
        steps, ranks = state.bandits.orders(self._policy(state.ranks), clients)
        return steps, state.roll.share(clients, steps, self.target), ranks

    def asks(self) -> frozenset[str]:
        return frozenset({"losses", "pruned"})

    def init(self, problem: Problem) -> State:
        lora_pairs(problem.initial, "fedspine")
        ranks, roll = chosen(problem.initial, self.ranks), Roll.of(problem.structure())
        return State(problem.initial, dict(problem.scaling), ranks, roll, Bandits(problem.seed))

    def groups(self, state: State, clients: Sequence[str]) -> list[tuple[str, ...]]:
        steps, _, ranks = self._orders(state, clients)
        rows = torch.stack([ranks, steps > 0, state.roll.before(clients)], dim=1).tolist()
        return group_by(clients, dict(zip(clients, map(tuple, rows), strict=True)).__getitem__)

    def send(self, state: State, round: int, clients: Sequence[str]) -> Messages:
        steps, share, ranks = self._orders(state, clients)
        parts, alive = state.roll.known, state.roll.alive(clients)
        whole = lead(broadcast(state.adapter, len(clients)), int(ranks[0]), dim=1)
        trees = {"adapter": wire.take(parts, whole, alive), "groups": {"bits": pack(parts, alive)}}
        return Messages(tuple(clients), trees, {"step": steps, "share": share})

    def expects(self, sent: Message) -> Mapping[str, Tree]:
        told = {"groups": sent.trees["groups"]} if sent.scalars["step"] > 0 else {}
        return {"adapter": sent.trees["adapter"], **told}

    def train(self, messages: Messages, cohort: Cohort) -> Messages:
        structure, expand = cohort.structure(), widen(cohort.initial)
        parts, alive = structure.parts, self.pruned(messages, cohort)
        start = wire.put(parts, messages.trees["adapter"], alive, cohort.initial)
        none = {name: torch.zeros(there.shape) for name, there in alive.items()}
        recorder = Recorder(structure, cohort.recall("importance", none))
        left = schedule.prune(parts, alive, recorder.average, messages.scalars["share"])
        with cohort.pruned(alive):
            before = cohort.losses(start, expand=expand, most=self.probe)
        with cohort.pruned(left):
            fit = cohort.fit(start, adjust=recorder.adjust, own=recorder.own, expand=expand)
            after = cohort.losses(fit.adapter, expand=expand, most=self.probe)
        cohort.remember("importance", recorder.average)
        told = {"groups": {"bits": pack(parts, left)}} if messages.scalars["step"][0] > 0 else {}
        trees = {"adapter": wire.take(parts, fit.adapter, alive), **told}
        known = {"loss": fit.loss, "before": before, "after": after, "importance": recorder.total}
        return messages.reply(trees, weight=cohort.weights, **known)

    def receive(self, state: State, replies: Replies) -> State:
        came, how = list(replies), (self.aggregate, self.weights)
        _, share, ranks = self._orders(state, names := [n for one in came for n in one.clients])
        got = partial_means.collect(came, state.roll, state.adapter, share)
        adapter = partial_means.merged(got, state.adapter, ranks, state.scaling, how)
        told = (got, state.roll, self.step, self.target, state.bandits.seed)
        bandits = state.bandits.closed(self._policy(state.ranks), partial_means.observed(*told))
        roll = state.roll.update(names, got.left, got.gone)
        return replace(state, adapter=adapter, roll=roll, bandits=bandits)

    def efforts(self, state: State, clients: Sequence[str]) -> Mapping[str, Effort]:
        _, share, ranks = self._orders(state, clients)
        own = (state.roll, share, ranks, state.adapter)
        return partial_means.efforts(clients, *own, self.probe)

    def told(self, state: State, times: Mapping[str, float]) -> State:
        return replace(state, bandits=state.bandits.timed(self._policy(state.ranks), times))

    def figures(self, state: State) -> Mapping[str, float | Sequence[float]]:
        return state.roll.figures()

    def adapter(self, state: State) -> Tree:
        return state.adapter

    def personal(self, messages: Messages, cohort: Cohort) -> Tree:
        parts, alive = cohort.structure().parts, self.pruned(messages, cohort)
        own = wire.put(parts, messages.trees["adapter"], alive, cohort.initial)
        return widen(cohort.initial)(own)

    def pruned(self, messages: Messages, cohort: Cohort) -> Tree:
        return unpack(cohort.structure().parts, messages.trees["groups"]["bits"])
